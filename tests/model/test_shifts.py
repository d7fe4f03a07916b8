"""Shifts and rotates against the SDM's operation sections, one bit at a time."""

from __future__ import annotations

import pytest

from pykvm.model.cpu.flags import AF, CF, OF, PF, SF, STATUS, ZF
from tests.model.chip import DATA, Chip

RAX, RCX, RBX = 0, 1, 3
PREFIX = {1: "", 2: "66", 4: "", 8: "48"}
EXTENSION = {"rol": 0, "ror": 1, "rcl": 2, "rcr": 3, "shl": 4, "shr": 5, "sar": 7}
VALUES = (0, 1, 0x80, 0xA5, 0x8001, 0x7FFF, 0x80000001, 0xDEADBEEF, 1 << 63, 0x8123456789ABCDEF)
COUNTS = (*range(35), 63, 64, 65, 0x9F, 0xFF)


def step(name: str, value: int, carry: int, bits: int) -> tuple[int, int]:
    """One step by one bit: the value and CF (SDM vol. 2, "Operation")."""
    top, low = value >> bits - 1, value & 1
    mask = (1 << bits) - 1
    match name:
        case "shl":
            return value << 1 & mask, top
        case "shr":
            return value >> 1, low
        case "sar":
            return value >> 1 | top << bits - 1, low
        case "rol":
            return value << 1 & mask | top, top
        case "ror":
            return value >> 1 | low << bits - 1, low
        case "rcl":
            return value << 1 & mask | carry, top
    return value >> 1 | carry << bits - 1, low


def of_result(value: int, bits: int) -> int:
    parity = PF if f"{value & 0xFF:b}".count("1") % 2 == 0 else 0
    return parity | (0 if value else ZF) | (SF if value >> bits - 1 else 0)


def overflow_of_one(name: str, before: int, after: int, carry: int, bits: int) -> int:
    """OF of a shift by one, by the table of each instruction's page."""
    if name in {"shl", "rol", "rcl"}:
        return after >> bits - 1 ^ carry
    if name == "sar":
        return 0
    return before >> bits - 1 if name == "shr" else after >> bits - 1 ^ after >> bits - 2 & 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", EXTENSION)
def test_shifts_by_cl(name: str, size: int) -> None:
    chip, bits = Chip(), 8 * size
    code = f"{PREFIX[size]}{0xD2 + (size > 1):02x}{0xC0 | EXTENSION[name] << 3:02x}"
    rotates = name[0] == "r"
    for start in VALUES:
        for count in COUNTS:
            for flags in (0, STATUS):
                value = start % (1 << bits)
                chip.regs[RAX], chip.regs[RCX], chip.rflags = value, count, 2 | flags
                chip.put(0x8000, bytes.fromhex(code))
                insn = chip.fetch()
                undefined = insn.semantics.undefined_flags(chip, insn)
                assert chip.do(code) is None
                steps = count % (64 if size == 8 else 32)
                before, carry = value, flags & CF
                for _ in range(steps):
                    before, (value, carry) = value, step(name, value, carry, bits)
                assert chip.regs[RAX] == value
                if not steps:
                    assert (chip.rflags & STATUS, undefined) == (flags, 0)
                    continue
                expected = carry | (flags & ~(CF | OF) if rotates else of_result(value, bits))
                if steps == 1:
                    expected |= OF if overflow_of_one(name, before, value, carry, bits) else 0
                assert (chip.rflags ^ expected) & STATUS & ~undefined == 0
                beyond = CF if name in {"shl", "shr"} and steps >= bits else 0
                assert undefined == (0 if steps == 1 else OF) | (0 if rotates else AF) | beyond


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", ["shld", "shrd"])
def test_double_shifts(name: str, size: int) -> None:
    chip, bits = Chip(), 8 * size
    code = f"{PREFIX[size]}0f{0xA5 if name == 'shld' else 0xAD:02x}d8"  # op rax, rbx, cl
    fill = 0xC3A5966912345678F0F0F0F00FF0A55A >> 64 & (1 << bits) - 1
    for start in VALUES:
        for count in COUNTS:
            value = start % (1 << bits)
            steps = count % (64 if size == 8 else 32)
            chip.regs[RAX], chip.regs[RBX], chip.regs[RCX], chip.rflags = value, fill, count, 2
            assert chip.do(code) is None
            if not steps:
                assert (chip.regs[RAX], chip.rflags) == (value, 2)
            if not steps or steps > bits:
                continue
            first, last = f"{value:0{bits}b}", f"{fill:0{bits}b}"
            if name == "shld":
                result, carry = (first + last)[steps : steps + bits], first[steps - 1]
            else:
                result, carry = (last + first)[bits - steps : 2 * bits - steps], first[-steps]
            assert chip.regs[RAX] == int(result, 2)
            expected = of_result(int(result, 2), bits) | int(carry)
            if steps == 1:
                expected |= OF if result[0] != first[0] else 0
            assert (chip.rflags ^ expected) & (STATUS & ~AF & ~(0 if steps == 1 else OF)) == 0


def test_a_count_of_zero_writes_memory_and_clears_the_upper_half() -> None:
    """docs/reference/hosts.md, E: SHL with CL = 0 dirties its page."""
    chip = Chip()
    chip.regs[RBX], chip.regs[RCX], chip.regs[RAX] = DATA, 0, 2**64 - 1
    assert chip.do("d323") is None
    assert DATA >> 12 in chip.bus.dirty
    assert chip.do("d3e0") is None
    assert chip.regs[RAX] == 0xFFFFFFFF
