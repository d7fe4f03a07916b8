"""String instructions and REP (SDM vol. 1, 7.3.9; vol. 2, REP)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.machine.exits import MmioWrite
from pykvm.model.cpu.flags import CF, DF, TF, ZF
from pykvm.model.cpu.instruction import DS, ES
from tests.model.chip import CODE, DATA, SIZE, Chip

RAX, RCX, RSI, RDI = 0, 1, 6, 7
SOURCE, TARGET = DATA, DATA + 0x1000


def chip_with_strings(bits: int = 64, *, down: bool = False) -> Chip:
    chip = Chip(bits)
    chip.put(SOURCE, bytes(range(64)))
    chip.regs[RSI], chip.regs[RDI] = SOURCE, TARGET
    chip.rflags = 2 | DF * down
    return chip


@pytest.mark.parametrize(("code", "size"), [("a4", 1), ("66a5", 2), ("a5", 4), ("48a5", 8)])
@pytest.mark.parametrize("down", [False, True])
def test_movs(code: str, size: int, down: bool) -> None:
    chip = chip_with_strings(down=down)
    start = 32 if down else 0
    chip.regs[RSI], chip.regs[RDI], chip.regs[RCX] = SOURCE + start, TARGET + start, 3
    assert chip.do("f3" + code) is None
    moved = 3 * size * (-1 if down else 1)
    assert (chip.regs[RSI], chip.regs[RDI], chip.regs[RCX]) == (
        SOURCE + start + moved, TARGET + start + moved, 0,
    )  # fmt: skip
    first = start - 2 * size if down else 0
    assert chip.bus.bytes[TARGET + first : TARGET + first + 3 * size] == bytes(range(first, first + 3 * size))
    assert chip.next_rip == CODE + len(bytes.fromhex(code)) + 1


def test_overlapping_copy_goes_byte_by_byte() -> None:
    chip = chip_with_strings()
    chip.regs[RDI], chip.regs[RCX] = SOURCE + 1, 16
    assert chip.do("f3a4") is None
    assert chip.bus.bytes[SOURCE : SOURCE + 18] == bytes(17) + b"\x11"


@pytest.mark.parametrize(("code", "size"), [("aa", 1), ("66ab", 2), ("ab", 4), ("48ab", 8)])
def test_stos_and_lods(code: str, size: int) -> None:
    chip = chip_with_strings()
    chip.regs[RAX], chip.regs[RCX] = 0x8877665544332211, 2
    assert chip.do("f3" + code) is None
    assert (
        chip.bus.bytes[TARGET : TARGET + 2 * size + 1] == bytes.fromhex("1122334455667788")[:size] * 2 + b"\0"
    )
    assert chip.regs[RDI] == TARGET + 2 * size
    load = {"aa": "ac", "66ab": "66ad", "ab": "ad", "48ab": "48ad"}[code]
    chip.regs[RAX], chip.regs[RCX] = 2**64 - 1, 2
    assert chip.do("f3" + load) is None
    last = int.from_bytes(bytes(range(size, 2 * size)), "little")
    assert chip.regs[RAX] == (last if size >= 4 else 2**64 - (1 << 8 * size) + last)


def test_a_count_of_zero_does_nothing() -> None:
    chip = chip_with_strings()
    chip.regs[RSI] = chip.regs[RDI] = 1 << 62  # not canonical, never used
    chip.rflags = 2 | ZF
    for code in ("f3a4", "f3aa", "f2ae", "f3a6"):
        assert chip.do(code) is None
    assert (chip.rflags, chip.regs[RCX]) == (2 | ZF, 0)


@pytest.mark.parametrize(
    ("code", "rcx", "left", "zero"),
    [
        ("f3ae", 5, 1, False),  # REPE SCASB stops at the first difference …
        ("f3ae", 3, 0, True),  # … or when the count is used up
        ("f2ae", 5, 4, True),  # REPNE SCASB stops at the first match
        ("f2a6", 5, 4, True),
        ("f3a6", 5, 1, False),
        ("ae", 5, 5, True),
    ],
)
def test_comparisons(code: str, rcx: int, left: int, zero: bool) -> None:
    """Target: three times 7, then 1; source: 7 7 7 9."""
    chip = chip_with_strings()
    chip.put(TARGET, bytes([7, 7, 7, 1, 0]))
    chip.put(SOURCE, bytes([7, 7, 7, 9, 0]))
    chip.regs[RAX], chip.regs[RCX] = 7, rcx
    assert chip.do(code) is None
    assert (chip.regs[RCX], bool(chip.rflags & ZF)) == (left, zero)
    done = rcx - left if len(code) == 4 else 1
    assert chip.regs[RDI] == TARGET + done
    assert chip.regs[RSI] == SOURCE + (done if code.endswith("a6") else 0)


def test_the_direction_of_the_subtraction() -> None:
    """CMPS: source less destination; SCAS: accumulator less destination (SDM vol. 2)."""
    chip = chip_with_strings()
    chip.put(SOURCE, b"\x05")
    chip.put(TARGET, b"\x06\x04")
    assert chip.do("a6") is None
    assert chip.rflags & CF
    chip.regs[RAX] = 5
    assert chip.do("ae") is None
    assert not chip.rflags & CF


def test_segments() -> None:
    """An override moves the source alone; the destination is always ES (SDM vol. 2, MOVS)."""
    chip = chip_with_strings(32)
    for number, base in ((DS, 0x100), (ES, 0x200), (4, 0x300)):
        chip.set_segment(number, replace(chip.segments[number], base=base))
    chip.put(SOURCE + 0x100, b"d")
    chip.put(SOURCE + 0x300, b"f")
    for code, expected in (("a4", b"d"), ("64a4", b"f")):
        chip.regs[RSI], chip.regs[RDI] = SOURCE, TARGET
        assert chip.do(code) is None
        assert chip.bus.bytes[TARGET + 0x200 : TARGET + 0x201] == expected


@pytest.mark.parametrize(
    ("bits", "code", "rsi", "rcx"),
    [
        (64, "67f3a4", (1 << 32) + SOURCE, (1 << 32) + 2),
        (32, "67f3a4", (1 << 16) + SOURCE, (1 << 16) + 2),
        (16, "f3a4", (1 << 16) + SOURCE, (1 << 16) + 2),
    ],
)
def test_address_size(bits: int, code: str, rsi: int, rcx: int) -> None:
    """Registers are cut to the address size; 32 bits clear the upper half, 16 leave it."""
    chip = chip_with_strings(bits)
    chip.regs[RSI], chip.regs[RCX] = rsi, rcx
    assert chip.do(code) is None
    assert chip.bus.bytes[TARGET : TARGET + 3] == bytes([0, 1, 0])
    kept = 0 if bits == 64 else 1 << 16
    assert (chip.regs[RSI], chip.regs[RCX]) == (kept + SOURCE + 2, kept)


def test_a_fault_keeps_the_progress() -> None:
    """SDM vol. 2, REP: registers tell where to go on."""
    chip = chip_with_strings(32)
    chip.set_segment(ES, replace(chip.segments[ES], limit=TARGET + 9))
    chip.regs[RCX] = 5
    assert chip.do("f3a5") == "#GP(0x0)"
    assert (chip.regs[RCX], chip.regs[RSI], chip.regs[RDI]) == (3, SOURCE + 8, TARGET + 8)
    assert chip.bus.bytes[TARGET : TARGET + 10] == bytes(range(8)) + bytes(2)
    assert chip.rip == CODE


def test_a_long_one_pauses() -> None:
    """After 1024 iterations events get their turn; the instruction starts again where it was."""
    chip = chip_with_strings()
    chip.regs[RCX] = 1500
    assert chip.do("f3aa") is None
    assert (chip.regs[RCX], chip.next_rip) == (476, CODE)
    assert chip.do("f3aa") is None
    assert (chip.regs[RCX], chip.next_rip) == (0, CODE + 2)


def test_single_step_stops_after_each_iteration() -> None:
    """SDM vol. 3, 18.3.1.4; host."""
    chip = chip_with_strings()
    chip.regs[RCX] = 3
    for left in (2, 1, 0):
        chip.rflags |= TF
        assert chip.do("f3a4") is None
        assert (chip.regs[RCX], chip.next_rip) == (left, CODE + (2 if left == 0 else 0))


def test_each_exit_ends_the_step() -> None:
    chip = Chip(32)
    chip.regs[RDI], chip.regs[RCX], chip.regs[RAX] = SIZE, 3, 0x55
    for left in (2, 1, 0):
        assert chip.do("f3aa") is None
        assert chip.exits == [MmioWrite(SIZE + 2 - left, b"\x55")]
        assert (chip.regs[RCX], chip.next_rip) == (left, CODE + (2 if left == 0 else 0))
        chip.exits.clear()
