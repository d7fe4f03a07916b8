"""Moves, exchanges, conditional moves, LEA, CMPXCHG (SDM vol. 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pykvm.model.cpu.flags import CF, OF, PF, SF, STATUS, ZF
from tests.model.chip import CODE, DATA, Chip

RAX, RCX, RDX, RBX, RSI, RDI = 0, 1, 2, 3, 6, 7
ALL = 2**64 - 1

CONDITIONS: dict[int, Callable[[bool, bool, bool, bool, bool], bool]] = {
    # SDM vol. 1, appendix B: condition by encoding
    0x0: lambda c, z, s, o, p: o, 0x1: lambda c, z, s, o, p: not o,
    0x2: lambda c, z, s, o, p: c, 0x3: lambda c, z, s, o, p: not c,
    0x4: lambda c, z, s, o, p: z, 0x5: lambda c, z, s, o, p: not z,
    0x6: lambda c, z, s, o, p: c or z, 0x7: lambda c, z, s, o, p: not (c or z),
    0x8: lambda c, z, s, o, p: s, 0x9: lambda c, z, s, o, p: not s,
    0xA: lambda c, z, s, o, p: p, 0xB: lambda c, z, s, o, p: not p,
    0xC: lambda c, z, s, o, p: s != o, 0xD: lambda c, z, s, o, p: s == o,
    0xE: lambda c, z, s, o, p: z or s != o, 0xF: lambda c, z, s, o, p: not z and s == o,
}  # fmt: skip


@pytest.mark.parametrize("number", CONDITIONS)
def test_conditions(number: int) -> None:
    """Jcc, SETcc and CMOVcc with every combination of the flags they look at."""
    chip = Chip()
    chip.regs[RBX] = 0x1234_5678_9ABC_DEF0
    for pattern in range(32):
        c, z, s, o, p = (bool(pattern >> bit & 1) for bit in range(5))
        chip.rflags = 2 | CF * c | ZF * z | SF * s | OF * o | PF * p
        wanted = CONDITIONS[number](c, z, s, o, p)
        assert chip.do(f"{0x70 + number:02x}10") is None
        assert chip.next_rip == CODE + 2 + (0x10 if wanted else 0)
        assert chip.do(f"0f{0x80 + number:02x}f0ffffff") is None
        assert chip.next_rip == CODE + 6 - (0x10 if wanted else 0)
        chip.regs[RAX] = ALL
        assert chip.do(f"0f{0x90 + number:02x}c0") is None
        assert chip.regs[RAX] == ALL - 0xFF + wanted
        chip.regs[RAX] = ALL
        assert chip.do(f"0f{0x40 + number:02x}c3") is None  # a 32-bit target always loses its upper half
        assert chip.regs[RAX] == (0x9ABCDEF0 if wanted else 0xFFFFFFFF)
        chip.regs[RAX] = ALL
        assert chip.do(f"660f{0x40 + number:02x}c3") is None
        assert chip.regs[RAX] == (ALL - 0xFFFF + 0xDEF0 if wanted else ALL)


def test_a_conditional_move_loads_in_any_case() -> None:
    chip = Chip()
    chip.regs[RBX] = 1 << 63 >> 1  # not canonical
    chip.rflags = 2
    assert chip.do("0f4403") == "#GP(0x0)"


@pytest.mark.parametrize(
    ("code", "source", "expected"),
    [
        ("0fb6c3", 0x80, 0x80),
        ("0fb7c3", 0x18000, 0x8000),
        ("0fbec3", 0x80, 0xFFFFFF80),
        ("480fbec3", 0x80, ALL - 0x7F),
        ("660fbec3", 0x80, 0xFFFFFFFFFFFFFF80),  # the upper 48 bits stay: they were ones
        ("480fbfc3", 0x8000, ALL - 0x7FFF),
        ("4863c3", 0x80000000, ALL - 0x7FFFFFFF),
        ("63c3", 0xF_80000000, 0x80000000),
        ("0fb6c7", 0x1200, 0x12),
    ],
)
def test_extension(code: str, source: int, expected: int) -> None:
    chip = Chip()
    chip.regs[RAX], chip.regs[RBX] = ALL, source
    assert chip.do(code) is None
    assert chip.regs[RAX] == expected


@pytest.mark.parametrize(
    ("bits", "code", "expected"),
    [
        (64, "488d441b05", 0x2_4691_3579),
        (64, "8d441b05", 0x4691_3579),
        (64, "668d441b05", 0x3579),
        (64, "67488d441b05", 0x4691_3579),
        (64, "488d0510000000", CODE + 7 + 0x10),
        (16, "8d4701", 0x9ABC - 0x10000 + 0x10001),
        (16, "668d4701", 0x9ABD),
    ],
)
def test_lea(bits: int, code: str, expected: int) -> None:
    chip = Chip(bits)
    chip.regs[RBX] = 0x1_2348_9ABA if bits == 64 else 0x12349ABC
    assert chip.do(code) is None
    assert chip.regs[RAX] == expected


def test_absolute_moves_use_the_segment_and_the_address_size() -> None:
    chip = Chip()
    chip.set_segment(4, replace(chip.segments[4], base=0x100))  # FS
    chip.put(DATA + 0x100, b"\x55")
    assert chip.do("64a0" + DATA.to_bytes(8, "little").hex()) is None
    assert chip.regs[RAX] == 0x55
    assert chip.do("67a2" + DATA.to_bytes(4, "little").hex()) is None
    assert chip.at(DATA, 1) == 0x55


def test_exchange() -> None:
    chip = Chip()
    chip.regs[RAX], chip.regs[RBX] = 1, DATA
    chip.put(DATA, (0x1122334455667788).to_bytes(8, "little"))
    assert chip.do("48871b") is None  # xchg [rbx], rbx: the old address
    assert (chip.regs[RBX], chip.at(DATA, 8)) == (0x1122334455667788, DATA)
    assert chip.do("93") is None  # xchg ebx, eax
    assert (chip.regs[RAX], chip.regs[RBX]) == (0x55667788, 1)
    chip.regs[RAX] = ALL
    assert chip.do("90") is None  # NOP leaves the upper half
    assert chip.regs[RAX] == ALL
    assert chip.do("87c0") is None  # XCHG EAX, EAX does not
    assert chip.regs[RAX] == 0xFFFFFFFF


def test_byte_order() -> None:
    chip = Chip()
    chip.regs[RAX] = 0x0123456789ABCDEF
    assert chip.do("480fc8") is None
    assert chip.regs[RAX] == 0xEFCDAB8967452301
    assert chip.do("0fc8") is None
    assert chip.regs[RAX] == 0x01234567
    chip.regs[RBX] = DATA
    assert chip.do("660f38f103") is None  # movbe [rbx], ax
    assert bytes(chip.bus.bytes[DATA : DATA + 2]) == b"\x45\x67"
    assert chip.do("480f38f003") is None
    assert chip.regs[RAX] == 0x4567 << 48


def test_translation_table() -> None:
    chip = Chip(32)
    chip.put(DATA, bytes(range(255, -1, -1)))
    chip.regs[RAX], chip.regs[RBX] = 0xAABBCC10, DATA
    assert chip.do("d7") is None
    assert chip.regs[RAX] == 0xAABBCCEF


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_compare_and_exchange(size: int) -> None:
    code = {1: "0fb0", 2: "660fb1", 4: "0fb1", 8: "480fb1"}[size]
    new, old = 0x5A5A5A5A5A5A5A5A % (1 << 8 * size), 0x7766554433221100 % (1 << 8 * size)
    for equal in (True, False):
        chip = Chip()
        chip.put(DATA, old.to_bytes(8, "little"))
        chip.regs[RCX], chip.regs[RBX] = new, DATA
        chip.regs[RAX] = old if equal else old + 1
        assert chip.do(f"f0{code}0b") is None
        assert chip.at(DATA, size) == (new if equal else old)
        assert chip.regs[RAX] % (1 << 8 * size) == old
        assert chip.rflags & STATUS == (ZF | PF if equal else 0)
        # the write-back of a failed comparison is a write, too: hosts.md, E
        assert DATA >> 12 in chip.bus.dirty


def test_a_failed_comparison_leaves_a_register() -> None:
    """The upper half of the destination as well (host: Zen 4)."""
    chip = Chip()
    chip.regs[RBX], chip.regs[RAX] = ALL, 5
    assert chip.do("0fb1cb") is None  # cmpxchg ebx, ecx
    assert (chip.regs[RBX], chip.regs[RAX]) == (ALL, 0xFFFFFFFF)


@pytest.mark.parametrize(("code", "half"), [("0fc70e", 4), ("480fc70e", 8)])
def test_compare_and_exchange_of_pairs(code: str, half: int) -> None:
    old, new = 0x11223344_55667788 << 8 * half, 0x01020304_05060708 << 8 * half
    old, new = old % (1 << 16 * half) | 9, new % (1 << 16 * half) | 7
    for equal in (True, False):
        chip = Chip()
        chip.put(DATA, old.to_bytes(16, "little"))
        chip.regs[RSI], chip.rflags = DATA, 2 | STATUS & ~ZF
        chip.regs[RDX], chip.regs[RAX] = divmod(old if equal else old ^ 1, 1 << 8 * half)
        chip.regs[RCX], chip.regs[RBX] = divmod(new, 1 << 8 * half)
        assert chip.do(code) is None
        assert chip.at(DATA, 2 * half) == (new if equal else old)
        assert chip.regs[RDX] << 8 * half | chip.regs[RAX] == old
        assert chip.rflags == 2 | STATUS & ~ZF | ZF * equal
        assert DATA >> 12 in chip.bus.dirty


def test_sixteen_bytes_are_aligned() -> None:
    chip = Chip()
    chip.regs[RSI] = DATA + 8
    assert chip.do("480fc70e") == "#GP(0x0)"


def test_hints_access_nothing() -> None:
    chip = Chip()
    chip.regs[RAX] = 1 << 62  # not canonical
    for code in ("0f1800", "0f0d08", "0f1f00", "f30f1efa", "f390", "0faee8", "0faef0", "0faef8"):
        assert chip.do(code) is None
    assert chip.do("0fae38") == "#GP(0x0)"  # CLFLUSH is a load
    for code in ("0f0b", "0fb9c0", "0fffc0"):
        assert chip.do(code) == "#UD"
