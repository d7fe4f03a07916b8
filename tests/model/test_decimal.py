"""Decimal adjustments: what they are for, on every pair of operands, and the SDM's operation sections."""

from __future__ import annotations

import pytest

from pykvm.model.cpu.flags import AF, CF, STATUS, ZF
from tests.model.chip import Chip

RAX, RBX = 0, 3


def packed(value: int) -> int:
    """Two decimal digits."""
    return int(str(value), 16)


@pytest.mark.parametrize("carry", [0, 1])
def test_packed_addition_and_subtraction(carry: int) -> None:
    chip = Chip(32)
    for a in range(100):
        for b in range(0, 100, 3):
            for code, adjust, exact in (("10d8", "27", a + b + carry), ("18d8", "2f", a - b - carry)):
                chip.regs[RAX], chip.regs[RBX], chip.rflags = packed(a), packed(b), 2 | carry
                assert chip.do(code) is None
                assert chip.do(adjust) is None
                assert chip.regs[RAX] & 0xFF == packed(exact % 100)
                assert bool(chip.rflags & CF) == (not 0 <= exact < 100)
                assert bool(chip.rflags & ZF) == (exact % 100 == 0)


@pytest.mark.parametrize(
    ("code", "al", "flags", "result", "after"),
    [
        # SDM vol. 2, DAA and DAS, "Operation"; the last ones are the borrow of DAS (host: Zen 4)
        ("27", 0x9A, 0, 0x00, AF | CF),
        ("27", 0xFA, 0, 0x60, AF | CF),
        ("27", 0x00, AF, 0x06, AF),
        ("27", 0x00, CF, 0x60, CF),
        ("27", 0x35, 0, 0x35, 0),
        ("2f", 0x00, AF, 0xFA, AF | CF),
        ("2f", 0x00, CF, 0xA0, CF),
        ("2f", 0x9A, 0, 0x34, AF | CF),
        ("2f", 0x05, AF | CF, 0x9F, AF | CF),
    ],
)
def test_packed_adjustment_of_other_values(code: str, al: int, flags: int, result: int, after: int) -> None:
    chip = Chip(32)
    chip.regs[RAX], chip.rflags = 0x5500 | al, 2 | flags
    assert chip.do(code) is None
    assert chip.regs[RAX] == 0x5500 | result
    assert chip.rflags & (AF | CF) == after


def test_unpacked_addition_and_subtraction() -> None:
    chip = Chip(32)
    for a in range(10):
        for b in range(10):
            for code, adjust, exact, step in (("00d8", "37", a + b, 1), ("28d8", "3f", a - b, -1)):
                chip.regs[RAX], chip.regs[RBX] = 0x500 | a, b
                assert chip.do(code) is None
                assert chip.do(adjust) is None
                over = not 0 <= exact < 10
                assert chip.regs[RAX] == (5 + step * over) << 8 | exact % 10
                assert chip.rflags & (AF | CF) == (AF | CF if over else 0)


def test_aam_and_aad_undo_each_other() -> None:
    chip = Chip(32)
    for base in (2, 10, 16, 99):
        for value in range(256):
            chip.regs[RAX] = 0x7700 | value
            assert chip.do(f"d4{base:02x}") is None
            assert (chip.regs[RAX] >> 8, chip.regs[RAX] & 0xFF) == divmod(value, base)
            assert bool(chip.rflags & ZF) == (value % base == 0)
            assert chip.do(f"d5{base:02x}") is None
            assert chip.regs[RAX] == value
    assert chip.do("d400") == "#DE"


def test_salc() -> None:
    chip = Chip(32)
    for carry in (0, 1):
        chip.regs[RAX], chip.rflags = 0x1234, 2 | carry * STATUS
        assert chip.do("d6") is None
        assert chip.regs[RAX] == (0x12FF if carry else 0x1200)
