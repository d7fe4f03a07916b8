"""Multiplication and division (SDM vol. 2, MUL, IMUL, DIV, IDIV)."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import trunc

import pytest

from pykvm.model.cpu.flags import AF, CF, OF, PF, SF, STATUS, ZF
from tests.model.chip import Chip

RAX, RDX, RBX = 0, 2, 3
PREFIX = {1: "", 2: "66", 4: "", 8: "48"}
EDGES = (0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF)


def values(size: int) -> list[int]:
    top = 8 * (size - 1)
    return sorted({0, 1, 2, 3, 10, *(each << top for each in EDGES), (1 << 8 * size) - 1})


def to_signed(value: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(size, "little"), "little", signed=True)


def set_double(chip: Chip, value: int, size: int) -> None:
    """AX or rDX:rAX."""
    if size == 1:
        chip.regs[RAX] = value
    else:
        chip.regs[RDX], chip.regs[RAX] = divmod(value, 1 << 8 * size)


def get_double(chip: Chip, size: int) -> int:
    mask = (1 << 8 * size) - 1
    if size == 1:
        return chip.regs[RAX] & 0xFFFF
    return (chip.regs[RDX] & mask) << 8 * size | chip.regs[RAX] & mask


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_products(size: int, signed: bool) -> None:
    chip = Chip()
    code = f"{PREFIX[size]}{0xF6 + (size > 1):02x}{0xEB if signed else 0xE3:02x}"
    for a, b in product(values(size), values(size)):
        chip.regs[RAX], chip.regs[RDX], chip.regs[RBX], chip.rflags = a, 0, b, 2
        assert chip.do(code) is None
        exact = to_signed(a, size) * to_signed(b, size) if signed else a * b
        assert get_double(chip, size) == exact % (1 << 16 * size)
        low = exact % (1 << 8 * size)
        fits = exact == (to_signed(low, size) if signed else low)
        assert chip.rflags & (CF | OF) == (0 if fits else CF | OF)


@pytest.mark.parametrize(
    ("code", "size"), [("660fafc3", 2), ("0fafc3", 4), ("480fafc3", 8), ("6bc3f9", 4), ("4869c3f9ffffff", 8)]
)
def test_products_of_two_and_three_operands(code: str, size: int) -> None:
    chip = Chip()
    for a, b in product(values(size), values(size)):
        chip.regs[RAX], chip.regs[RBX], chip.rflags = a, b, 2
        assert chip.do(code) is None
        exact = to_signed(b, size) * (to_signed(a, size) if "0faf" in code else -7)
        assert chip.regs[RAX] == exact % (1 << 8 * size)
        overflow = exact != to_signed(exact % (1 << 8 * size), size)
        assert chip.rflags & (CF | OF) == (CF | OF if overflow else 0)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_quotients(size: int, signed: bool) -> None:
    """The quotient is cut towards zero; #DE where it does not fit, and the registers stay."""
    chip = Chip()
    code = f"{PREFIX[size]}{0xF6 + (size > 1):02x}{0xFB if signed else 0xF3:02x}"
    faults = 0
    for high, low, divisor in product(values(size), values(size), values(size)):
        dividend = high << 8 * size | low
        set_double(chip, dividend, size)
        chip.regs[RBX] = divisor
        result = chip.do(code)
        exact, by = (
            (to_signed(dividend, 2 * size), to_signed(divisor, size)) if signed else (dividend, divisor)
        )
        limits = (-(1 << 8 * size - 1), (1 << 8 * size - 1) - 1) if signed else (0, (1 << 8 * size) - 1)
        quotient = trunc(Fraction(exact, by)) if by else None
        if quotient is None or not limits[0] <= quotient <= limits[1]:
            faults += 1
            assert result == "#DE"
            assert get_double(chip, size) == dividend
        else:
            assert result is None
            remainder = exact - quotient * by
            assert get_double(chip, size) == (remainder % (1 << 8 * size)) << 8 * size | quotient % (
                1 << 8 * size
            )
    assert faults > 0


def test_undefined_flags() -> None:
    """SDM vol. 2: MUL and IMUL define CF and OF alone, DIV and IDIV none."""
    chip = Chip()
    for code, undefined in {
        "f7e3": SF | ZF | AF | PF, "0fafc3": SF | ZF | AF | PF, "f7f3": STATUS, "f7fb": STATUS,
    }.items():  # fmt: skip
        chip.put(chip.rip, bytes.fromhex(code))
        insn = chip.fetch()
        assert insn.semantics.undefined_flags(chip, insn) == undefined
