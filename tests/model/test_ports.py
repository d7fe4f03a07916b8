"""IN, OUT, INS, OUTS and who may use them (SDM vol. 1, 19.5; what the host sees: hosts.md, C.3)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.machine.exits import IoIn, IoOut
from pykvm.model.cpu.faults import NeedInput
from pykvm.model.cpu.flags import DF
from pykvm.model.cpu.instruction import ES
from pykvm.x86.bits import Cr0, Rflags
from pykvm.x86.registers import Segment
from tests.model.chip import CODE, DATA, Chip

RAX, RCX, RDX, RSI, RDI = 0, 1, 2, 6, 7
TSS = 0x6000
BITMAP = 0x68


def asked(chip: Chip, code: str) -> IoIn:
    """The question of an instruction that needs the host; the registers are as before."""
    before = list(chip.regs)
    with pytest.raises(NeedInput) as caught:
        chip.do(code)
    assert (chip.regs, chip.rip) == (before, CODE)
    assert isinstance(caught.value.exit, IoIn)
    return caught.value.exit


@pytest.mark.parametrize(
    ("code", "port", "size", "rax"),
    [
        ("e480", 0x80, 1, 0xFFFFFFFFFFFFFF44),
        ("66e5ff", 0xFF, 2, 0xFFFFFFFFFFFF3344),
        ("ed", 0x3F8, 4, 0x11223344),
        ("48ed", 0x3F8, 4, 0x11223344),  # REX.W does nothing: ports are at most 4 bytes wide
        ("ec", 0x3F8, 1, 0xFFFFFFFFFFFFFF44),
    ],
)
def test_in(code: str, port: int, size: int, rax: int) -> None:
    chip = Chip()
    chip.regs[RAX], chip.regs[RDX] = 2**64 - 1, 0xAAAA03F8
    assert asked(chip, code) == IoIn(port, size)
    chip.replies.append(bytes.fromhex("44332211"))
    assert chip.do(code) is None
    assert chip.regs[RAX] == rax
    assert chip.exits == []


@pytest.mark.parametrize(
    ("code", "exit"),
    [
        ("e680", IoOut(0x80, 1, b"\x44")),
        ("66e780", IoOut(0x80, 2, b"\x44\x33")),
        ("ef", IoOut(0x3F8, 4, b"\x44\x33\x22\x11")),
        ("48ef", IoOut(0x3F8, 4, b"\x44\x33\x22\x11")),
    ],
)
def test_out(code: str, exit: IoOut) -> None:
    chip = Chip()
    chip.regs[RAX], chip.regs[RDX] = 0x11223344, 0x3F8
    assert chip.do(code) is None
    assert chip.exits == [exit]
    assert chip.next_rip == CODE + len(bytes.fromhex(code))


def test_outs_exits_for_each_element() -> None:
    chip = Chip()
    chip.put(DATA, b"abcdef")
    chip.regs[RDX], chip.regs[RSI], chip.regs[RCX] = 0x10, DATA, 3
    for left, data in ((2, b"ab"), (1, b"cd"), (0, b"ef")):
        assert chip.do("66f36f") is None
        assert chip.exits == [IoOut(0x10, 2, data)]
        assert (chip.regs[RCX], chip.next_rip == CODE) == (left, left > 0)
        chip.exits.clear()


@pytest.mark.parametrize(
    ("code", "rdi", "rcx", "down", "size", "batch"),
    [
        ("f36c", DATA, 5, False, 1, 5),
        ("f36c", DATA, 5000, False, 1, 1024),  # at most 1024 bytes …
        ("f36d", DATA, 5000, False, 4, 256),
        ("f36c", DATA + 0xFF0, 100, False, 1, 16),  # … to the end of the page
        ("66f36d", DATA + 0xFFF, 100, False, 2, 1),  # at least one
        ("f36c", DATA + 7, 100, True, 1, 8),  # backwards: to its start
        ("6c", DATA, 5, False, 1, 1),
        ("f3486d", DATA, 5, False, 4, 5),  # REX.W does nothing
    ],
)
def test_ins_asks_for_many(code: str, rdi: int, rcx: int, down: bool, size: int, batch: int) -> None:
    chip = Chip()
    chip.rflags = 2 | DF * down
    chip.regs[RDX], chip.regs[RDI], chip.regs[RCX] = 0x10, rdi, rcx
    assert asked(chip, code) == IoIn(0x10, size, batch)
    data = bytes(range(1, 251)) * 5
    chip.replies.append(data)
    assert chip.do(code) is None
    elements = [data[at : at + size] for at in range(0, batch * size, size)]
    step = -size if down else size
    for number, element in enumerate(elements):
        at = rdi + number * step
        assert chip.bus.bytes[at : at + size] == element
    assert chip.regs[RDI] == rdi + batch * step
    repeats = "f3" in code
    assert chip.regs[RCX] == (rcx - batch if repeats else rcx)
    assert (chip.next_rip == CODE) == (repeats and rcx > batch)


def test_ins_faults_before_it_asks() -> None:
    chip = Chip(32)
    chip.set_segment(ES, replace(chip.segments[ES], limit=DATA - 1))
    chip.regs[RDI] = DATA
    assert chip.do("6c") == "#GP(0x0)"


def with_bitmap(cpl: int, iopl: int, *, vm86: bool = False) -> Chip:
    """Ports 0x10, 0x20 to 0x27 and 0x3F forbidden; the map covers ports up to 0x3F and its final byte."""
    chip = Chip(16 if vm86 else 32, cpl)
    if vm86:
        chip.cr0 |= Cr0.PE
        chip.segments = [Segment(type=3, dpl=3) for _ in range(6)]
    chip.set_rflags(2 | iopl << 12 | (Rflags.VM if vm86 else 0))
    chip.put(TSS + 0x66, BITMAP.to_bytes(2, "little"))
    chip.put(TSS + BITMAP, bytes([0, 0, 1, 0, 0xFF, 0, 0, 0x80, 0]))
    chip.tr = Segment(base=TSS, limit=BITMAP + 8, type=0xB, s=0)
    return chip


@pytest.mark.parametrize(
    ("cpl", "iopl", "vm86", "port", "size", "allowed"),
    [
        (0, 0, False, 0x10, 1, True),
        (3, 3, False, 0x10, 1, True),
        (3, 2, False, 0x10, 1, False),
        (3, 0, False, 0x0F, 1, True),
        (3, 0, False, 0x0F, 2, False),  # every byte's bit is looked at
        (3, 0, False, 0x11, 4, True),
        (3, 0, False, 0x1D, 4, False),
        (3, 0, False, 0x28, 4, True),
        (3, 0, False, 0x3E, 1, True),
        (3, 0, False, 0x3E, 2, False),
        (3, 0, False, 0x40, 1, False),  # beyond the limit
        (3, 3, True, 0x10, 1, False),  # in virtual-8086 mode IOPL does not count
        (3, 0, True, 0x11, 1, True),
    ],
)
def test_permission(cpl: int, iopl: int, vm86: bool, port: int, size: int, allowed: bool) -> None:
    chip = with_bitmap(cpl, iopl, vm86=vm86)
    chip.regs[RDX] = port
    wide, word = ("66ef", "ef") if vm86 else ("ef", "66ef")
    code = {1: "ee", 2: word, 4: wide}[size]
    assert chip.do(code) == (None if allowed else "#GP(0x0)")
    assert len(chip.exits) == (1 if allowed else 0)


@pytest.mark.parametrize(("limit", "type"), [(0x66, 0xB), (0x67, 0xB), (0x200, 0x3)])
def test_no_bitmap(limit: int, type: int) -> None:
    """A TSS that is too short, or a 16-bit one, allows nothing (SDM vol. 3, 7.2.1)."""
    chip = with_bitmap(3, 0)
    chip.tr = replace(chip.tr, limit=limit, type=type)
    assert chip.do("e400") == "#GP(0x0)"
