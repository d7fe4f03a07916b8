"""The stack (SDM vol. 1, 6.2; vol. 2, PUSH, POP, PUSHF, POPF, ENTER, LEAVE)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.model.cpu.flags import DF, IF, OF, STATUS, TF
from pykvm.model.cpu.instruction import SS
from pykvm.x86.bits import Cr0, Cr4, Rflags
from pykvm.x86.registers import Segment
from tests.model.chip import DATA, SIZE, Chip

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
TOP = DATA + 0x800
IOPL, NT, AC, ID, VM, RF, VIF, VIP = (
    int(each) for each in (
        Rflags.IOPL3, Rflags.NT, Rflags.AC, Rflags.ID, Rflags.VM, Rflags.RF, Rflags.VIF, Rflags.VIP
    )
)  # fmt: skip


def stack(bits: int = 64, cpl: int = 0) -> Chip:
    chip = Chip(bits, cpl)
    chip.regs[RSP] = TOP
    return chip


def vm86(iopl: int, vme: bool) -> Chip:
    """Virtual-8086 mode; segments at 0."""
    chip = Chip(16)
    chip.cr0 |= Cr0.PE
    chip.cr4 = Cr4.VME if vme else 0
    chip.segments = [Segment(type=3, dpl=3) for _ in range(6)]
    chip.set_rflags(2 | VM | iopl << 12)
    chip.regs[RSP] = TOP
    return chip


@pytest.mark.parametrize(
    ("bits", "code", "size", "value"),
    [
        (64, "50", 8, 0x1122334455667788),
        (64, "6650", 2, 0x7788),
        (64, "ff33", 8, 0xCAFE),
        (64, "6aff", 8, 2**64 - 1),
        (64, "6880000080", 8, 2**64 - 0x7FFFFF80),
        (64, "666aff", 2, 0xFFFF),
        (32, "50", 4, 0x55667788),
        (32, "6650", 2, 0x7788),
        (16, "50", 2, 0x7788),
        (16, "6650", 4, 0x55667788),
        (16, "6a80", 2, 0xFF80),
        (64, "54", 8, TOP),  # the old RSP
    ],
)
def test_push(bits: int, code: str, size: int, value: int) -> None:
    chip = stack(bits)
    chip.regs[RAX] = 0x1122334455667788 % (1 << (64 if bits == 64 else 32))
    chip.regs[RBX] = DATA
    chip.put(DATA, (0xCAFE).to_bytes(8, "little"))
    assert chip.do(code) is None
    assert chip.regs[RSP] == TOP - size
    assert chip.at(TOP - size, size) == value


@pytest.mark.parametrize(
    ("code", "size", "rax"), [("58", 8, 0x0123456789ABCDEF), ("6658", 2, 0xFFFFFFFFFFFFCDEF)]
)
def test_pop(code: str, size: int, rax: int) -> None:
    chip = stack()
    chip.regs[RAX] = 2**64 - 1
    chip.put(TOP, (0x0123456789ABCDEF).to_bytes(8, "little"))
    assert chip.do(code) is None
    assert (chip.regs[RAX], chip.regs[RSP]) == (rax, TOP + size)


def test_pop_with_the_stack_pointer() -> None:
    """POP RSP takes the value; an address with RSP is that after the increment (SDM vol. 2, POP)."""
    chip = stack()
    chip.put(TOP, (0x1234).to_bytes(8, "little"))
    assert chip.do("8f0424") is None  # pop [rsp]
    assert (chip.regs[RSP], chip.at(TOP + 8, 8)) == (TOP + 8, 0x1234)
    chip.regs[RSP] = TOP
    assert chip.do("5c") is None
    assert chip.regs[RSP] == 0x1234


def test_a_failed_pop_to_memory_leaves_the_stack_pointer() -> None:
    chip = stack()
    chip.regs[RBX] = 1 << 62
    assert chip.do("8f03") == "#GP(0x0)"
    assert chip.regs[RSP] == TOP


def test_only_sp_moves_on_a_16_bit_stack() -> None:
    chip = stack(32)
    chip.set_segment(SS, replace(chip.segments[SS], db=0, limit=0xFFFF))
    chip.regs[RSP] = 0xABCD0000
    assert chip.do("6650") is None
    assert chip.regs[RSP] == 0xABCDFFFE
    assert chip.do("6658") is None
    assert chip.regs[RSP] == 0xABCD0000


def test_the_stack_segment_limits() -> None:
    chip = stack(32)
    chip.set_segment(SS, replace(chip.segments[SS], limit=TOP - 3))
    assert chip.do("50") == "#SS(0x0)"
    assert chip.do("6650") == "#SS(0x0)"
    chip.regs[RSP] = TOP - 2
    assert chip.do("50") is None


@pytest.mark.parametrize(("prefix", "size"), [("", 4), ("66", 2)])
def test_all_registers(prefix: str, size: int) -> None:
    chip = stack(32)
    mask = (1 << 8 * size) - 1
    values = [0x11111111 * (each + 1) for each in range(8)]
    values[RSP] = TOP
    chip.regs[:8] = values
    assert chip.do(prefix + "60") is None
    assert chip.regs[RSP] == TOP - 8 * size
    assert [chip.at(TOP - (each + 1) * size, size) for each in range(8)] == [value & mask for value in values]
    before = [0] * 8
    before[RSP] = TOP - 8 * size
    chip.regs[:8] = before
    assert chip.do(prefix + "61") is None
    assert chip.regs[:8] == [value & mask if each != RSP else TOP for each, value in enumerate(values)]


def test_the_slot_of_the_stack_pointer_is_not_read() -> None:
    """It lies across the segment's limit, at SP FFFFh; the next ones wrap (SDM vol. 2, POPA: "skip")."""
    chip = stack(16)
    chip.regs[RSP] = 0xFFF3
    assert chip.do("6661") is None
    assert chip.regs[RSP] == 0x13


def test_frames() -> None:
    """ENTER with nesting copies the display (SDM vol. 2, ENTER, "Operation"); LEAVE undoes it."""
    chip = stack()
    chip.regs[RBP] = DATA + 0x400
    chip.put(DATA + 0x400 - 16, (0xBBBB).to_bytes(8, "little") + (0xAAAA).to_bytes(8, "little"))
    assert chip.do("c8200003") is None  # enter 32, 3
    pushed = [chip.at(TOP - 8 * each, 8) for each in range(1, 5)]
    assert pushed == [DATA + 0x400, 0xAAAA, 0xBBBB, TOP - 8]
    assert (chip.regs[RBP], chip.regs[RSP]) == (TOP - 8, TOP - 32 - 32)
    assert chip.do("c9") is None
    assert (chip.regs[RBP], chip.regs[RSP]) == (DATA + 0x400, TOP)


@pytest.mark.parametrize("level", ["00", "20"])
def test_a_frame_without_display(level: str) -> None:
    """The level is taken modulo 32."""
    chip = stack(32)
    chip.regs[RBP] = 0x1234
    assert chip.do("c80010" + level) is None
    assert (chip.regs[RBP], chip.regs[RSP], chip.at(TOP - 4, 4)) == (TOP - 4, TOP - 4 - 0x1000, 0x1234)


def test_a_frame_needs_its_whole_stack() -> None:
    """SDM vol. 2, ENTER: a fault where the new top could not be written; nothing changes."""
    chip = stack(32)
    chip.regs[RSP] = SIZE - 0x1000
    chip.set_segment(SS, replace(chip.segments[SS], type=7, limit=SIZE - 0x2000))  # expand-down
    assert chip.do("c8001000") == "#SS(0x0)"
    assert chip.regs[RSP] == SIZE - 0x1000


# --- flags -----------------------------------------------------------------------------------------------

EVERY = STATUS | TF | IF | DF | IOPL | NT | AC | ID


@pytest.mark.parametrize(("prefix", "size"), [("", 8), ("66", 2)])
def test_pushed_flags(prefix: str, size: int) -> None:
    """RF and VM are pushed as zeros."""
    chip = stack()
    chip.rflags = 2 | STATUS | RF | AC | ID | NT
    assert chip.do(prefix + "9c") is None
    assert chip.at(TOP - size, size) == (2 | STATUS | AC | ID | NT) % (1 << 8 * size)


@pytest.mark.parametrize(
    ("bits", "cpl", "iopl", "prefix", "changeable"),
    [
        # SDM vol. 2, POPF, table "Effect of POPF/POPFD on the EFLAGS Register"
        (64, 0, 0, "", EVERY),
        (64, 0, 0, "66", EVERY & 0xFFFF),
        (64, 3, 3, "", EVERY & ~IOPL),
        (64, 3, 2, "", EVERY & ~(IOPL | IF)),
        (64, 3, 0, "66", EVERY & 0xFFFF & ~(IOPL | IF)),
        (32, 3, 3, "", EVERY & ~IOPL),
        (32, 2, 2, "", EVERY & ~IOPL),
        (32, 1, 0, "", EVERY & ~(IOPL | IF)),
        (16, 0, 0, "", EVERY & 0xFFFF),
        (16, 0, 0, "66", EVERY),
    ],
)
def test_popped_flags(bits: int, cpl: int, iopl: int, prefix: str, changeable: int) -> None:
    for old, new in ((0, 2**32 - 1), (EVERY & ~(IOPL | TF), 0)):
        chip = stack(bits, cpl)
        chip.set_rflags(2 | old & ~IOPL | iopl << 12)
        before = chip.rflags
        chip.put(TOP, new.to_bytes(8, "little"))
        assert chip.do(prefix + "9d") is None
        assert chip.rflags == before & ~changeable | new & changeable | 2


@pytest.mark.parametrize(
    ("iopl", "vme", "prefix", "fault"),
    [(3, False, "", None), (3, False, "66", None), (2, False, "", "#GP(0x0)"), (2, True, "66", "#GP(0x0)"),
     (0, True, "", None)],
)  # fmt: skip
def test_flags_in_virtual_8086_mode(iopl: int, vme: bool, prefix: str, fault: str | None) -> None:
    """IOPL-sensitive without VME, 32-bit forms always (SDM vol. 3, 20.2.7 and 20.3)."""
    for code in ("9c", "9d"):
        chip = vm86(iopl, vme)
        chip.put(TOP, bytes(8))
        assert chip.do(prefix + code) == fault


def test_virtual_interrupt_flag() -> None:
    """With VME and IOPL below 3 IF is VIF in the program's eyes (SDM vol. 3, 20.3; vol. 2, PUSHF, POPF)."""
    chip = vm86(0, vme=True)
    chip.rflags |= VIF
    assert chip.do("9c") is None
    assert chip.at(TOP - 2, 2) == 2 | IF | IOPL
    chip.put(TOP - 2, (OF).to_bytes(2, "little"))
    assert chip.do("9d") is None
    assert chip.rflags == 2 | VM | OF
    chip.regs[RSP] = TOP
    chip.put(TOP, (IF).to_bytes(2, "little"))
    assert chip.do("9d") is None
    assert chip.rflags == 2 | VM | VIF
    for image, pending in ((TF, 0), (IF, VIP)):
        chip = vm86(0, vme=True)
        chip.rflags |= pending
        chip.put(TOP, image.to_bytes(2, "little"))
        assert chip.do("9d") == "#GP(0x0)"
