"""Single bits, scans, counts, BOUND and CRC32 (SDM vol. 2)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.model.cpu.flags import CF, OF, STATUS, ZF
from tests.model.chip import DATA, Chip

RAX, RBX = 0, 3
NAMES = {"bt": 0xA3, "bts": 0xAB, "btr": 0xB3, "btc": 0xBB}


def changed(name: str, old: int, mask: int) -> int:
    return {"bt": old, "bts": old | mask, "btr": old & ~mask, "btc": old ^ mask}[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [0, 1, 31, 32, 63, 64, 200])
def test_bits_of_registers(name: str, number: int) -> None:
    """The number is taken modulo the operand's width."""
    for code, width in (("66", 16), ("", 32), ("48", 64)):
        chip = Chip()
        value = 0x8000_8421_8000_8421 % (1 << width)
        chip.regs[RAX], chip.regs[RBX] = value, number
        assert chip.do(f"{code}0f{NAMES[name]:02x}d8") is None
        mask = 1 << number % width
        assert chip.regs[RAX] == changed(name, value, mask)
        assert bool(chip.rflags & CF) == bool(value & mask)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [0, 7, 31, 32, 1000, -1, -32, -33, -1000])
def test_bit_strings_in_memory(name: str, number: int) -> None:
    """A register reaches beyond the operand, in both directions: bit n is bit n mod 8 of byte n div 8."""
    chip = Chip()
    base = DATA + 0x800
    pattern = bytes(range(256)) * 16
    chip.put(DATA, pattern)
    chip.regs[RAX], chip.regs[RBX] = base, number % (1 << 32)
    assert chip.do(f"0f{NAMES[name]:02x}18") is None  # op [rax], ebx
    at = base + (number >> 3) - DATA
    old = pattern[at]
    expected = bytearray(pattern)
    expected[at] = changed(name, old, 1 << number % 8)
    assert chip.bus.bytes[DATA : DATA + 0x1000] == expected
    assert bool(chip.rflags & CF) == bool(old & 1 << number % 8)


def test_an_immediate_stays_within_the_operand() -> None:
    chip = Chip()
    chip.regs[RAX] = DATA
    assert chip.do("0fba28ff") is None  # bts dword [rax], 255
    assert chip.at(DATA, 8) == 1 << 31


@pytest.mark.parametrize(("prefix", "width"), [("66", 16), ("", 32), ("48", 64)])
def test_scans_and_counts(prefix: str, width: int) -> None:
    for value in (0, 1, 2, 0x80, 0x7FF0, 1 << width - 1, (1 << width) - 1, 0x5A << width - 8):
        digits = f"{value:0{width}b}"
        leading, trailing = width - len(digits.lstrip("0")), width - len(digits.rstrip("0"))
        for code, result in (
            (f"{prefix}0fbcc3", trailing),
            (f"{prefix}0fbdc3", width - 1 - leading),
            (f"f3{prefix}0fbcc3", trailing),
            (f"f3{prefix}0fbdc3", leading),
            (f"f3{prefix}0fb8c3", digits.count("1")),
        ):
            chip = Chip()
            chip.regs[RAX], chip.regs[RBX], chip.rflags = 0x1234, value, 2 | STATUS
            assert chip.do(code) is None
            scans = not code.startswith("f3")
            assert chip.regs[RAX] == (0x1234 if scans and not value else result)
            zero = value == 0 if scans or code.endswith("b8c3") else result == 0
            assert bool(chip.rflags & ZF) == zero
            if code.endswith("b8c3"):
                assert chip.rflags & STATUS & ~ZF == 0
            elif not scans:
                assert bool(chip.rflags & CF) == (value == 0)


def test_without_the_feature_counts_are_scans() -> None:
    """SDM vol. 2, TZCNT, LZCNT: the prefix is ignored on older processors."""
    chip = Chip()
    chip.features = replace(chip.features, bmi1=False, abm=False, popcnt=False)
    chip.regs[RBX] = 0x10
    for code in ("f30fbcc3", "f30fbdc3"):
        chip.regs[RAX] = 0
        assert chip.do(code) is None
        assert chip.regs[RAX] == 4
        chip.regs[RBX] = 0  # and leave the target then
        chip.regs[RAX] = 77
        assert chip.do(code) is None
        assert chip.regs[RAX] == 77
        chip.regs[RBX] = 0x10
    assert chip.do("f30fb8c3") == "#UD"


@pytest.mark.parametrize(("index", "fault"), [(-5, None), (7, None), (0, None), (-6, "#BR"), (8, "#BR")])
def test_bound(index: int, fault: str | None) -> None:
    chip = Chip(32)
    chip.put(DATA, (-5 % 2**32).to_bytes(4, "little") + (7).to_bytes(4, "little"))
    chip.regs[RAX], chip.regs[RBX] = index % 2**32, DATA
    assert chip.do("6203") == fault


def test_crc32() -> None:
    """The check value of CRC-32C is that of "123456789" (RFC 3720, B.4, gives the polynomial)."""
    chip = Chip()
    chip.regs[RAX] = 0xFFFFFFFF
    for byte in b"123456789":
        chip.regs[RBX] = byte
        assert chip.do("f20f38f0c3") is None
    assert chip.regs[RAX] ^ 0xFFFFFFFF == 0xE3069283
    chip.regs[RAX], chip.regs[RBX] = 0xFFFFFFFF, int.from_bytes(b"12345678", "little")
    assert chip.do("f2480f38f1c3") is None
    chip.regs[RBX] = ord("9")
    assert chip.do("f20f38f0c3") is None
    assert chip.regs[RAX] ^ 0xFFFFFFFF == 0xE3069283
    assert chip.rflags & OF == 0
