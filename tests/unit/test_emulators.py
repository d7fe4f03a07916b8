"""What KVM is told differently below an emulator, and that processors get nothing of it."""

from __future__ import annotations

import pytest

from pykvm.abi import ffi
from pykvm.kvm import emulators
from pykvm.kvm.registers import fill_special
from pykvm.machine import Segment, SpecialRegisters
from pykvm.machine.emulation import QEMU_TCG, emulator


def filled(type_: int) -> int:
    """The type of TR's segment that KVM gets."""
    sregs = ffi.new("struct kvm_sregs *")
    fill_special(sregs, SpecialRegisters(tr=Segment(type=type_, s=0)))
    return int(sregs.tr.type)


def test_processors_get_a_busy_task_register_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulators, "_UNDER_TCG", False)
    assert [filled(type_) for type_ in (0xB, 0x3, 0x9)] == [0xB, 0x3, 0x9]


def test_tcg_gets_the_task_register_as_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulators, "_UNDER_TCG", True)
    assert [filled(type_) for type_ in (0xB, 0x3, 0x9)] == [0x9, 0x1, 0x9]


def test_a_lab_says_what_its_processor_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYKVM_LAB_EMULATOR", raising=False)
    assert emulator() == ""
    monkeypatch.setenv("PYKVM_LAB_EMULATOR", "qemu-tcg")
    assert emulator() == QEMU_TCG
