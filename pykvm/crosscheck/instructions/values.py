"""Where bugs live: values at the edges of their ranges, addresses at the edges of pages."""

from __future__ import annotations

import struct
from random import Random
from typing import Final

from pykvm.crosscheck.instructions.case import FLAT
from pykvm.x86.bits import Rflags
from pykvm.x86.fpu import FloatingPoint

PAGE: Final = 4096
EDGES: Final = tuple(
    (value + step) % 2**64
    for bits in (0, 3, 4, 7, 8, 15, 16, 31, 32, 47, 63, 64)
    for value in (1 << bits, -(1 << bits))
    for step in (-1, 0, 1)
)
_SETTABLE: Final = tuple(
    int(flag) for flag in (Rflags.CF, Rflags.PF, Rflags.AF, Rflags.ZF, Rflags.SF, Rflags.OF)
)
SELECTORS: Final = (0, 1, 3, 0x08, 0x10, 0x18, 0x23, 0x2B, 0x33, 0x30, 0x28, 0x20, 0x0B, 0x8003, 0xFFF0)
"""Null ones, those of the guest (which are Linux's) with several RPLs, and ones beyond the table."""


def number(random: Random) -> int:
    """A 64-bit value: an edge, a small or sparse one, BCD, or anything."""
    kind = random.random()
    if kind < 0.35:
        return random.choice(EDGES)
    if kind < 0.5:
        return random.getrandbits(random.choice((3, 6, 8, 12)))
    if kind < 0.6:
        return random.getrandbits(64) & random.getrandbits(64) & random.getrandbits(64)
    if kind < 0.65:
        return int("".join(random.choice("0123456789") for _ in range(16)), 16)
    return random.getrandbits(64)


def octets(random: Random, length: int) -> bytes:
    """Bytes made of such values."""
    return b"".join(number(random).to_bytes(8, "little") for _ in range(-(-length // 8)))[:length]


def address(random: Random, mode: int) -> int:
    """A linear address (an offset in real mode), mostly inside the case's memory and often at an edge."""
    kind = random.random()
    if mode == 16:
        if kind < 0.15:
            return (random.randrange(-16, 17)) & 0xFFFF
        return random.randrange(0x10000) & (-16 if kind < 0.3 else -1)
    if kind < 0.25:
        return random.randrange(FLAT.data, FLAT.end, 16)
    if kind < 0.55:
        return random.randrange(FLAT.data, FLAT.end)
    if kind < 0.93:
        edge = random.choice((*range(FLAT.data, FLAT.end, PAGE), FLAT.end))
        return int(edge) + random.randrange(-18, 18)
    return number(random) if kind > 0.97 else random.getrandbits(32)


def stack(random: Random, mode: int) -> int:
    """A stack pointer, mostly aligned and well inside."""
    kind = random.random()
    if kind < 0.12:
        return address(random, mode)
    if mode == 16:
        return random.getrandbits(16) & -2
    return random.randrange(FLAT.data + 0x200, FLAT.read_only - 0x200, 8) + (kind < 0.17)


def code_address(random: Random, mode: int) -> int:
    """A branch target, mostly within the code page (an offset in real mode)."""
    kind = random.random()
    if kind < 0.1:
        return number(random)
    if mode == 16:
        return random.getrandbits(16)
    return FLAT.code + random.randrange(PAGE)


def flags(random: Random) -> int:
    """RFLAGS with any status flags, sometimes DF, sometimes AC; IF set, as on the host."""
    value = int(Rflags.FIXED | Rflags.IF)
    for flag in _SETTABLE:
        value |= flag * random.getrandbits(1)
    if random.random() < 0.3:
        value |= int(Rflags.DF)
    if random.random() < 0.05:
        value |= int(Rflags.AC)
    return value


_FLOATS: Final = (
    [struct.pack("<f", value) for value in (0.0, -0.0, 1.0, -1.0, 1.5, 0.1, 3e38, 1e-38, 2**31, 2**63, 0.5)]
    + [number.to_bytes(4, "little") for number in (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001)]
    + [number.to_bytes(4, "little") for number in (0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF)]
)
_DOUBLES: Final = (
    [struct.pack("<d", value) for value in (0.0, -0.0, 1.0, -1.0, 1.5, 0.1, 1e308, 1e-308, 2**31, 2**63, 2.5)]
    + [number.to_bytes(8, "little") for number in (0x7FF << 52, 0xFFF << 52, 0x7FF8 << 48, (0x7FF << 52) + 1)]
    + [number.to_bytes(8, "little") for number in (1, 1 << 63 | 1, 1 << 52, 0x7FEFFFFFFFFFFFFF)]
)
"""Zeros, ones, limits, infinities, quiet and signalling NaNs, denormals, by the sizes that SSE has."""
_EXTENDED_EXPONENTS: Final = (
    0,
    1,
    0x3FFE,
    0x3FFF,
    0x4000,
    0x401E,
    0x403E,
    0x7FFE,
    0x7FFF,
    0x8000,
    0xBFFF,
    0xFFFF,
)
_SIGNIFICANDS: Final = (0, 1, 1 << 63, 3 << 62, (1 << 64) - 1, (1 << 63) + 1, 1 << 62, (1 << 63) - 1)


def floating(random: Random, mode: int, *, x87: bool) -> FloatingPoint:
    """Registers with such values, any rounding, seldom an unmasked exception; nothing is pending.

    Without ``x87`` the stack holds what MMX leaves there.
    """
    count = 16 if mode == 64 else 8
    xmm = tuple(_vector(random) for _ in range(count)) + (bytes(16),) * (16 - count)
    unmasked = random.random() < 0.04
    return FloatingPoint(
        fpr=tuple(_extended(random) if x87 else _mmx(random) for _ in range(8)),
        fcw=_control_word(random, unmasked=unmasked) if x87 else 0x37F,
        fsw=random.randrange(8) << 11 | (random.getrandbits(4) << 8 & 0x4700 if x87 else 0),
        ftwx=random.choice((0, 0xFF, 0xFF, random.getrandbits(8))),
        xmm=xmm,
        mxcsr=_mxcsr(random, unmasked=unmasked),
    )


def _mxcsr(random: Random, *, unmasked: bool) -> int:
    """MXCSR (SDM vol. 1, 10.2.3)."""
    if random.random() < 0.3:
        return 0x1F80
    value = random.getrandbits(16) & 0xE040 | 0x1F80
    if unmasked:
        return value & ~(random.getrandbits(6) << 7)
    return value | random.choice((0, random.getrandbits(6)))


def _control_word(random: Random, *, unmasked: bool) -> int:
    """The x87 control word with any rounding and a precision that exists (SDM vol. 1, 8.1.5)."""
    masks = random.getrandbits(6) if unmasked else 0x3F
    return 0x40 | masks | random.choice((0, 2, 3, 3, 3)) << 8 | random.randrange(4) << 10


def _mmx(random: Random) -> bytes:
    return octets(random, 8) + random.choice((b"\xff\xff", b"\0\0", b"\xff\x3f")) + bytes(6)


def _extended(random: Random) -> bytes:
    """An 80-bit number in 16 bytes: often an edge, sometimes an encoding that is no number."""
    kind = random.random()
    significand = random.choice(_SIGNIFICANDS) if kind < 0.5 else random.getrandbits(64) | 1 << 63
    exponent = random.choice(_EXTENDED_EXPONENTS) if kind < 0.7 else random.randrange(0x3FC0, 0x4040)
    if random.random() < 0.5:
        exponent ^= 0x8000
    return significand.to_bytes(8, "little") + exponent.to_bytes(2, "little") + bytes(6)


def float_octets(random: Random, length: int) -> bytes:
    """Memory that holds floating-point numbers of any size."""
    kind = random.random()
    if kind < 0.3:
        return b"".join(random.choice(_FLOATS) for _ in range(-(-length // 4)))[:length]
    if kind < 0.6:
        return b"".join(random.choice(_DOUBLES) for _ in range(-(-length // 8)))[:length]
    if kind < 0.8:
        return b"".join(_extended(random)[:10] for _ in range(-(-length // 10)))[:length]
    return octets(random, length)


def _vector(random: Random) -> bytes:
    kind = random.random()
    if kind < 0.15:
        return bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF))]) * 16
    if kind < 0.3:
        return bytes(random.choice((0, 1, 0x7F, 0x80, 0x81, 0xFE, 0xFF, 0x0F, 0x41, 0x5A)) for _ in range(16))
    if kind < 0.5:
        return b"".join(random.choice(_FLOATS) for _ in range(4))
    if kind < 0.7:
        return random.choice(_DOUBLES) + random.choice(_DOUBLES)
    return octets(random, 16)
