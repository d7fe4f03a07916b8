"""Every refusal of the kernel is an exception of its own, with a sentence that says what to do.

One table: each class of errors.py that can come from a KVM, how to get it on a real one, and the words of
its remedy.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pykvm import errors
from pykvm.errors import KvmError, PykvmError
from pykvm.kvm import KvmSystem
from pykvm.machine import SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.track import RingTracker
from tests.rings import LEAST_RING

from .tiny import DONE, SPIN, Tiny, ring_guest, running

LOG = SlotFlags.LOG_DIRTY_PAGES


def ones(n: int) -> np.ndarray:
    return np.full(n, (1 << 64) - 1, dtype=np.uint64)


def closed(system: KvmSystem) -> None:
    vm = system.create_machine()
    vm.close()
    vm.create_vcpu()


def busy(system: KvmSystem) -> None:
    with Tiny(system.create_machine(), pages=64) as guest:
        guest.load(SPIN)
        with running(guest.vcpu):
            guest.vcpu.get_registers()


def usage(system: KvmSystem) -> None:
    with Tiny(system.create_machine(), pages=64) as guest:
        guest.run(DONE)
        guest.vcpu.reply(b"nobody asked")


def overlap(system: KvmSystem) -> None:
    with system.create_machine() as vm, GuestMemory(PAGE_SIZE) as memory:
        vm.create_slot(memory, 0)
        vm.create_slot(memory, 0)


def alignment(system: KvmSystem) -> None:
    with system.create_machine() as vm, GuestMemory(PAGE_SIZE) as memory:
        vm.create_slot(memory, 0x10)


def change(system: KvmSystem) -> None:
    with system.create_machine() as vm, GuestMemory(PAGE_SIZE) as memory:
        vm.create_slot(memory, 0).set_flags(SlotFlags.READONLY)


def absent(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vm.set_user_memory_region(5, 0, 0, 0, 0)


def other_slot(system: KvmSystem) -> None:
    with system.create_machine() as vm, GuestMemory(PAGE_SIZE) as memory:
        vm.create_slot(memory, 0, slot_id=32764)


def no_logging(system: KvmSystem) -> None:
    with Tiny(system.create_machine(), pages=64, flags=SlotFlags.NONE) as guest:
        guest.vm.get_dirty_log(guest.slot)


def ring_mode(system: KvmSystem) -> None:
    with ring_guest(system, LEAST_RING) as guest:
        guest.vm.get_dirty_log(guest.slot)


def no_ring(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vm.collect_rings()


def clear_range(system: KvmSystem) -> None:
    with Tiny(system.create_machine(), pages=128) as guest:
        guest.vm.clear_dirty_log(guest.slot, 1, 64, ones(2))


def ring_size(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vm.enable_dirty_ring(128)


def ring_too_large(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vm.enable_dirty_ring(1 << 20)


def ring_odd(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vm.enable_dirty_ring(1000)


def ring_order(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vm.create_vcpu()
        vm.enable_dirty_ring(4096)


def tracker_too_late(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vm.create_vcpu()
        RingTracker(4096).prepare(vm)


def device_missing(_: KvmSystem) -> None:
    KvmSystem("/nonexistent/kvm")


def not_a_device(_: KvmSystem) -> None:
    KvmSystem("/dev/null")


def late_kick(system: KvmSystem) -> None:
    with Tiny(system.create_machine(), pages=64) as guest:
        guest.load(SPIN)
        with running(guest.vcpu):
            # A negative time-out: not even the shortest kick is in time.
            for _ in range(50):
                guest.vcpu.kick(wait=-1)
                threading.Event().wait(0.002)


def bad_registers(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vcpu = vm.create_vcpu()
        special = vcpu.get_special_registers()
        special.cr0 |= 0x80000000  # PG without PE
        special.cr0 &= ~1
        vcpu.set_special_registers(special)


def vcpu_exists(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vm.create_vcpu(3)
        vm.create_vcpu(3)


def unknown_msr(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        vm.create_vcpu().get_msrs([0x10, 0xDEADBEEF])


def vm_type(system: KvmSystem) -> None:
    system.create_machine(vm_type=77)


CASES: dict[str, tuple[Callable[[KvmSystem], None], type[PykvmError], str]] = {
    "closed": (closed, errors.ClosedError, "create a new one"),
    "busy": (busy, errors.BusyError, "kick it and wait"),
    "usage": (usage, errors.UsageError, "no IoIn or MmioRead"),
    "slot overlap": (overlap, errors.SlotOverlapError, "move one"),
    "slot alignment": (alignment, errors.SlotAlignmentError, "multiples of 4096"),
    "slot change": (change, errors.SlotChangeError, "delete it and create another"),
    "slot absent": (absent, errors.SlotAbsentError, "no slot 5"),
    "slot id": (other_slot, errors.SlotError, "KVM_CAP_NR_MEMSLOTS"),
    "no logging": (no_logging, errors.LoggingDisabledError, "set SlotFlags.LOG_DIRTY_PAGES"),
    "bitmap in ring mode": (ring_mode, errors.DirtyRingModeError, "use collect_rings"),
    "no ring": (no_ring, errors.DirtyRingModeError, "enable them"),
    "clear range": (clear_range, errors.ClearRangeError, "multiple of 64"),
    "ring too small": (ring_size, errors.RingSizeError, "256 to 65536"),
    "ring too large": (ring_too_large, errors.RingSizeError, "limit"),
    "ring odd": (ring_odd, errors.RingSizeError, "power"),
    "ring too late": (ring_order, errors.RingOrderError, "before the first vCPU"),
    "ring tracker too late": (tracker_too_late, errors.RingOrderError, "before the first vCPU"),
    "device missing": (device_missing, errors.DeviceMissingError, "load the kvm module"),
    "not a device": (not_a_device, errors.DeviceMissingError, "not a KVM device"),
    "late kick": (late_kick, errors.GuestTimeoutError, "allow it more time"),
    "registers": (bad_registers, errors.KvmError, "CR0.PG without PE"),
    "vCPU exists": (vcpu_exists, errors.KvmError, "has a vCPU 3 already"),
    "MSR": (unknown_msr, errors.MsrError, "stopped at MSR 0xdeadbeef"),
    "VM type": (vm_type, errors.KvmError, "KVM_CAP_VM_TYPES"),
}


def check_sentence(error: PykvmError) -> str:
    """The message: whole sentences, readable alone, and the exit status of its class."""
    text = str(error)
    assert text.endswith("."), text
    assert re.match(r"[A-Z\[/0-9]|vCPU", text), text
    assert len(text.split()) >= 5, text
    assert not re.search(r"<.* object at 0x|None|\bTrue\b|%[sd]|\{\w*\}", text), text
    assert error.exit_status >= 1
    if isinstance(error, KvmError):
        assert error.errno
        assert error.operation.startswith("KVM_")
        assert error.operation in text
    return text


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_names_its_remedy(system: KvmSystem, name: str) -> None:
    provoke, kind, remedy = CASES[name]
    with pytest.raises(PykvmError) as caught:
        provoke(system)
    assert type(caught.value) is kind
    assert remedy in check_sentence(caught.value)


def test_a_device_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may open anything, so the refusal itself is played."""

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(errors.DevicePermissionError) as caught:
        KvmSystem(str(tmp_path / "kvm"))
    assert "usermod -aG kvm" in check_sentence(caught.value)


ELSEWHERE = {
    "PykvmError", "HostError", "KvmError", "DirtyLogError", "RingOverflowError", "DevicePermissionError",
    "CapabilityError", "EmulationError", "ImageError", "GuestError", "GuestCorruptionError",
    "MigrationError", "WireError", "ChannelError", "VerificationError", "HandoverUnknownError",
    "DestinationLostError", "PendingExitError", "DisagreementError", "UnsupportedInstruction", "LabError",
    "LabTimeoutError", "LabDiedError",
}  # fmt: skip
"""Bases, classes tested above by themselves, and those of other rooms, which have their own tests."""


def test_every_class_has_its_case() -> None:
    """A new refusal in errors.py needs a way to be reached in the table."""
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, PykvmError)
    }
    covered = {kind.__name__ for _, kind, _ in CASES.values()}
    assert classes - covered <= ELSEWHERE, sorted(classes - covered - ELSEWHERE)
