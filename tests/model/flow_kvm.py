"""A world of flow.py on a real KVM, and what KVM and emulators below it are known to do otherwise."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from pykvm.cli.modes import measure_mode
from pykvm.guest.boot import BootMode
from pykvm.kvm import KvmSystem, KvmVcpu
from pykvm.machine.emulation import QEMU_TCG
from pykvm.machine.exits import Exit
from pykvm.memory import GuestMemory
from tests.model.chip import SIZE
from tests.model.flow import World
from tests.patience import patient

_SECONDS = patient(2)


def under_tcg(
    names: Iterable[str], bugs: Mapping[str, str], fatal: Mapping[str, str] | None = None
) -> list[object]:
    """The names as parameters: those in ``bugs`` may fail where QEMU's TCG is the processor, and those in
    ``fatal`` are not run there, since they end or hang the host.
    """
    fatal = fatal or {}
    assert {*bugs, *fatal} <= set(names), sorted({*bugs, *fatal} - set(names))
    marks = {name: pytest.mark.emulator_bug(QEMU_TCG, why) for name, why in bugs.items()}
    marks |= {name: pytest.mark.emulator_bug(QEMU_TCG, why, kills=True) for name, why in fatal.items()}
    return [pytest.param(name, marks=[marks[name]] if name in marks else []) for name in names]


_emulates: list[bool] = []


def emulates_cpl0(system: KvmSystem) -> bool:
    """Whether KVM's instruction emulator, not the processor, runs guest code at CPL 0."""
    if not _emulates:
        _emulates.append(measure_mode(system, BootMode.PROTECTED32, 0).execution == "emulated")
    return _emulates[0]


@contextmanager
def ended_on_kvm(system: KvmSystem, world: World) -> Iterator[tuple[Exit, KvmVcpu, GuestMemory]]:
    """Run the world to its first exit (Kicked when it takes too long): that, its vCPU and its memory."""
    with system.create_machine() as vm, GuestMemory(SIZE) as memory:
        memory.write(0, bytes(world.memory))
        vm.create_slot(memory, 0)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(vm.supported_cpuid)
        world.special.apic_base = vcpu.get_special_registers().apic_base
        vcpu.set_special_registers(world.special)
        vcpu.set_registers(world.registers)
        timer = threading.Timer(_SECONDS, vcpu.kick)
        timer.start()
        try:
            exit_ = vcpu.run()
        finally:
            timer.cancel()
        yield exit_, vcpu, memory
