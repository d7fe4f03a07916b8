"""Single flags, LAHF, SAHF, CLI and STI (SDM vol. 2; who may: vol. 3, 6.8.1 and 20.3)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.model.cpu.flags import AF, CF, DF, IF, OF, PF, SF, STATUS, ZF
from pykvm.x86.bits import Cr0, Cr4, Rflags
from pykvm.x86.registers import Segment
from tests.model.chip import Chip

RAX = 0
VIF, VIP = int(Rflags.VIF), int(Rflags.VIP)


@pytest.mark.parametrize(
    ("code", "flag", "after"),
    [("f8", CF, (0, 0)), ("f9", CF, (1, 1)), ("f5", CF, (1, 0)), ("fc", DF, (0, 0)), ("fd", DF, (1, 1))],
)
def test_single_flags(code: str, flag: int, after: tuple[int, int]) -> None:
    chip = Chip()
    for before, wanted in enumerate(after):
        for others in (0, (STATUS | DF) & ~flag):
            chip.rflags = 2 | others | flag * before
            assert chip.do(code) is None
            assert chip.rflags == 2 | others | flag * wanted


def test_flags_in_ah() -> None:
    chip = Chip()
    chip.regs[RAX], chip.rflags = 0x1234, 2 | STATUS
    assert chip.do("9f") is None
    assert chip.regs[RAX] == (SF | ZF | AF | PF | CF | 2) << 8 | 0x34
    chip.regs[RAX] = 0
    assert chip.do("9e") is None
    assert chip.rflags == 2 | OF
    chip.regs[RAX] = 0xFF00
    assert chip.do("9e") is None
    assert chip.rflags == 2 | STATUS
    chip.features = replace(chip.features, lahf_lm=False)
    assert (chip.do("9e"), chip.do("9f")) == ("#UD", "#UD")


def in_vm86(iopl: int) -> Chip:
    chip = Chip(16)
    chip.cr0 |= Cr0.PE
    chip.segments = [Segment(type=3, dpl=3) for _ in range(6)]
    chip.set_rflags(2 | int(Rflags.VM) | iopl << 12)
    return chip


@pytest.mark.parametrize(
    ("vm86", "cpl", "iopl", "cr4", "flag"),
    [
        # SDM vol. 2, STI, table "Decision Table for STI Results"
        (False, 0, 0, 0, IF),
        (False, 3, 3, Cr4.PVI, IF),
        (False, 2, 1, 0, None),
        (False, 2, 1, Cr4.PVI, None),
        (False, 3, 2, 0, None),
        (False, 3, 2, Cr4.PVI, VIF),
        (False, 3, 2, Cr4.VME, None),
        (True, 3, 3, 0, IF),
        (True, 3, 3, Cr4.VME, IF),
        (True, 3, 0, 0, None),
        (True, 3, 0, Cr4.PVI, None),
        (True, 3, 0, Cr4.VME, VIF),
    ],
)
def test_interrupt_flag(vm86: bool, cpl: int, iopl: int, cr4: int, flag: int | None) -> None:
    chip = in_vm86(iopl) if vm86 else Chip(32, cpl)
    chip.cr4 = cr4
    chip.rflags = chip.rflags & ~int(Rflags.IOPL3) | iopl << 12
    before = chip.rflags
    assert chip.do("fb") == ("#GP(0x0)" if flag is None else None)
    assert chip.rflags == before | (flag or 0)
    chip.rflags |= IF | VIF
    assert chip.do("fa") == ("#GP(0x0)" if flag is None else None)
    assert chip.rflags == (before | IF | VIF) & ~(flag or 0)
    if flag == VIF:
        chip.rflags |= VIP
        assert chip.do("fb") == "#GP(0x0)"


def test_real_mode_has_no_privileges() -> None:
    chip = Chip(16)
    assert chip.do("fb") is None
    assert chip.rflags & IF


def test_the_shadow_of_sti() -> None:
    """Interrupts wait for one more instruction, if they were disabled before (SDM vol. 2, STI)."""
    chip = Chip()
    assert chip.do("fb") is None
    assert chip.shadow
    assert chip.do("fb") is None
    assert not chip.shadow
