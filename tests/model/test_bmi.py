"""BMI1 and BMI2 by their definitions (SDM vol. 2), on digits instead of masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pykvm.model.cpu.flags import CF, OF, SF, STATUS, ZF
from tests.model.chip import Chip

RAX, RCX, RDX, RBX = 0, 1, 2, 3
VALUES = (0, 1, 0x10, 0x80000000, 0xA5A5_0000, 0xFFFFFFFF, 1 << 63, 0x0123_4567_89AB_CDEF, 2**64 - 1)


def vex(wide: bool, opcode: int, pp: int, modrm: int, vvvv: int = 0, table: int = 2, tail: str = "") -> str:
    return f"c4e{table:x}{(128 if wide else 0) | (15 - vvvv) << 3 | pp:02x}{opcode:02x}{modrm:02x}{tail}"


def lowest(value: int, width: int) -> int:
    """The place of the lowest one, or the width."""
    return (f"{value:0{width}b}"[::-1] + "1").index("1")


def deposit(value: int, mask: int, width: int) -> int:
    source = iter(f"{value:064b}"[::-1])
    return int("".join(next(source) if place == "1" else "0" for place in f"{mask:0{width}b}"[::-1])[::-1], 2)


def extract(value: int, mask: int, width: int) -> int:
    pairs = zip(f"{value:0{width}b}", f"{mask:0{width}b}", strict=True)
    return int("0" + "".join(bit for bit, place in pairs if place == "1"), 2)


def rotated(value: int, count: int, width: int) -> int:
    digits = f"{value:0{width}b}"
    return int((digits * 2)[width - count % width : 2 * width - count % width], 2)


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize(
    ("opcode", "pp", "table", "tail", "expected"),
    [
        # EAX = op(first source EBX, second source ECX), whichever of them VEX.vvvv names
        (0xF5, 3, 2, "", lambda a, b, w: deposit(a, b, w)),  # pdep eax, ebx, ecx
        (0xF5, 2, 2, "", lambda a, b, w: extract(a, b, w)),  # pext eax, ebx, ecx
    ],
    ids=["pdep", "pext"],
)
def test_deposit_and_extract(
    width: int, opcode: int, pp: int, table: int, tail: str, expected: Callable[[int, int, int], int]
) -> None:
    chip = Chip()
    for a in VALUES:
        for b in VALUES:
            a, b = a % (1 << width), b % (1 << width)
            chip.regs[RBX], chip.regs[RCX], chip.rflags = a, b, 2 | STATUS
            assert chip.do(vex(width == 64, opcode, pp, 0xC1, RBX, table, tail)) is None
            assert chip.regs[RAX] == expected(a, b, width)
            assert chip.rflags & STATUS == STATUS


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("name", ["andn", "blsr", "blsmsk", "blsi"])
def test_lowest_bits(name: str, width: int) -> None:
    chip, wide = Chip(), width == 64
    for value in VALUES:
        value %= 1 << width
        place = lowest(value, width)
        chip.regs[RBX], chip.regs[RCX], chip.rflags = 0xF0, value, 2 | STATUS
        one = 1 << place if place < width else 0
        code, result, carry = {
            "andn": (vex(wide, 0xF2, 0, 0xC1, RBX), value - (value & 0xF0), False),
            "blsr": (vex(wide, 0xF3, 0, 0xC9, RAX), value - one, value == 0),
            "blsmsk": (vex(wide, 0xF3, 0, 0xD1, RAX), 2 ** min(place + 1, width) - 1, value == 0),
            "blsi": (vex(wide, 0xF3, 0, 0xD9, RAX), one, value != 0),
        }[name]
        assert chip.do(code) is None
        assert chip.regs[RAX] == result
        flags = (CF if carry else 0) | (0 if result else ZF) | (SF if result >> width - 1 else 0)
        assert chip.rflags & (CF | ZF | SF | OF) == flags


@pytest.mark.parametrize("width", [32, 64])
def test_fields(width: int) -> None:
    """BEXTR takes start and length, BZHI an index, from the low bytes of the control."""
    chip, wide = Chip(), width == 64
    for value in VALUES:
        value %= 1 << width
        digits = f"{value:0{width}b}"[::-1]
        for start, length in ((0, 0), (0, 8), (4, 12), (31, 1), (31, 40), (width, 4), (255, 255), (0, width)):
            chip.regs[RBX], chip.regs[RCX] = value, 0x770000 | length << 8 | start
            assert chip.do(vex(wide, 0xF7, 0, 0xC3, RCX)) is None  # bextr eax, ebx, ecx
            field = digits[start : start + length]
            assert chip.regs[RAX] == int("0" + field[::-1], 2)
            assert bool(chip.rflags & ZF) == ("1" not in field)
            assert chip.rflags & (CF | OF) == 0
            chip.regs[RCX] = 0x7700 | start
            assert chip.do(vex(wide, 0xF5, 0, 0xC3, RCX)) is None  # bzhi eax, ebx, ecx
            assert chip.regs[RAX] == int("0" + digits[:start][::-1], 2)
            assert bool(chip.rflags & CF) == (start > width - 1)


@pytest.mark.parametrize("width", [32, 64])
def test_shifts_without_flags(width: int) -> None:
    chip, wide = Chip(), width == 64
    for value in VALUES:
        value %= 1 << width
        digits = f"{value:0{width}b}"
        for count in (0, 1, 5, 31, 32, 63, 64, 255):
            places = count % width
            chip.regs[RBX], chip.regs[RCX], chip.rflags = value, count, 2 | STATUS
            for pp, result in (
                (1, (digits + "0" * places)[places:]),
                (3, ("0" * places + digits)[:width]),
                (2, (digits[0] * places + digits)[:width]),
            ):
                assert chip.do(vex(wide, 0xF7, pp, 0xC3, RCX)) is None  # shlx, shrx, sarx
                assert chip.regs[RAX] == int(result, 2)
            assert chip.do(vex(wide, 0xF0, 3, 0xC3, 0, 3, f"{count:02x}")) is None  # rorx
            assert chip.regs[RAX] == rotated(value, count, width)
            assert chip.rflags & STATUS == STATUS


def test_mulx() -> None:
    chip = Chip()
    chip.regs[RDX], chip.regs[RCX] = 2**64 - 1, 2**63 + 1
    assert chip.do(vex(True, 0xF6, 3, 0xC1, RBX)) is None  # mulx rax, rbx, rcx
    assert chip.regs[RAX] << 64 | chip.regs[RBX] == (2**64 - 1) * (2**63 + 1)
    assert chip.do(vex(True, 0xF6, 3, 0xC1, RAX)) is None  # of one register twice the upper half stays
    assert chip.regs[RAX] == (2**64 - 1) * (2**63 + 1) >> 64


@pytest.mark.parametrize("bits", [16, 32])
def test_modes(bits: int) -> None:
    """VEX is undefined in real mode, as in virtual-8086 mode (SDM vol. 2, 2.3.1)."""
    assert Chip(bits).do(vex(False, 0xF2, 0, 0xC1, RBX)) == ("#UD" if bits == 16 else None)
