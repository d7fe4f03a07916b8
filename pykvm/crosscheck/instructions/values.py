"""Where bugs live: values at the edges of their ranges, addresses at the edges of pages."""

from __future__ import annotations

from random import Random
from typing import Final

from pykvm.crosscheck.instructions.case import FLAT, REAL
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


def floating(random: Random, mode: int) -> FloatingPoint:
    """XMM and MMX registers with such values; nothing unmasked and nothing pending."""
    count = 16 if mode == 64 else 8
    xmm = tuple(_vector(random) for _ in range(count)) + (bytes(16),) * (16 - count)
    return FloatingPoint(
        fpr=tuple(
            octets(random, 8) + random.choice((b"\xff\xff", b"\0\0", b"\xff\x3f")) + bytes(6)
            for _ in range(8)
        ),
        fsw=random.randrange(8) << 11,
        ftwx=random.choice((0, 0xFF, random.getrandbits(8))),
        xmm=xmm,
        mxcsr=0x1F80 | random.choice((0, 0, random.getrandbits(6))),
    )


def _vector(random: Random) -> bytes:
    kind = random.random()
    if kind < 0.25:
        return bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF))]) * 16
    if kind < 0.6:
        return bytes(random.choice((0, 1, 0x7F, 0x80, 0x81, 0xFE, 0xFF, 0x0F, 0x41, 0x5A)) for _ in range(16))
    return octets(random, 16)


STACK_BASE: Final = REAL.stack
