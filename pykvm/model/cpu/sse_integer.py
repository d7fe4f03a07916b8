"""MMX and SSE integer arithmetic, comparison and logic: one row per instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pykvm.model.cpu.vector import (
    Combine,
    join,
    lanes,
    packed,
    saturate,
    saturate_unsigned,
    signed_lanes,
)

UNSIGNED: Final = False
SIGNED: Final = True
_ONES: Final = -1


def _each(width: int, is_signed: bool, function: Callable[[int, int], int]) -> Combine:
    """The function on each pair of lanes; its result is cut to the lane."""
    split = signed_lanes if is_signed else lanes

    def combine(a: int, b: int, bits: int) -> int:
        return join(map(function, split(a, width, bits), split(b, width, bits)), width)

    return combine


def _saturating(width: int, is_signed: bool, function: Callable[[int, int], int]) -> Combine:
    limit = saturate if is_signed else saturate_unsigned
    return _each(width, is_signed, lambda a, b: limit(function(a, b), width))


def _add(a: int, b: int) -> int:
    return a + b


def _subtract(a: int, b: int) -> int:
    return a - b


def _equal(a: int, b: int) -> int:
    return _ONES if a == b else 0


def _greater(a: int, b: int) -> int:
    return _ONES if a > b else 0


def _average(a: int, b: int) -> int:
    return a + b + 1 >> 1


def _sign(a: int, b: int) -> int:
    return -a if b < 0 else a if b else 0


for _name, _mmx, _xmm, _function in (
    ("paddb", "mmx", "sse2", _each(8, UNSIGNED, _add)),
    ("paddw", "mmx", "sse2", _each(16, UNSIGNED, _add)),
    ("paddd", "mmx", "sse2", _each(32, UNSIGNED, _add)),
    ("paddq", "sse2", "sse2", _each(64, UNSIGNED, _add)),
    ("psubb", "mmx", "sse2", _each(8, UNSIGNED, _subtract)),
    ("psubw", "mmx", "sse2", _each(16, UNSIGNED, _subtract)),
    ("psubd", "mmx", "sse2", _each(32, UNSIGNED, _subtract)),
    ("psubq", "sse2", "sse2", _each(64, UNSIGNED, _subtract)),
    ("paddsb", "mmx", "sse2", _saturating(8, SIGNED, _add)),
    ("paddsw", "mmx", "sse2", _saturating(16, SIGNED, _add)),
    ("paddusb", "mmx", "sse2", _saturating(8, UNSIGNED, _add)),
    ("paddusw", "mmx", "sse2", _saturating(16, UNSIGNED, _add)),
    ("psubsb", "mmx", "sse2", _saturating(8, SIGNED, _subtract)),
    ("psubsw", "mmx", "sse2", _saturating(16, SIGNED, _subtract)),
    ("psubusb", "mmx", "sse2", _saturating(8, UNSIGNED, _subtract)),
    ("psubusw", "mmx", "sse2", _saturating(16, UNSIGNED, _subtract)),
    ("pmullw", "mmx", "sse2", _each(16, SIGNED, lambda a, b: a * b)),
    ("pmulld", "", "sse41", _each(32, SIGNED, lambda a, b: a * b)),
    ("pmulhw", "mmx", "sse2", _each(16, SIGNED, lambda a, b: a * b >> 16)),
    ("pmulhuw", "sse", "sse2", _each(16, UNSIGNED, lambda a, b: a * b >> 16)),
    ("pmulhrsw", "ssse3", "ssse3", _each(16, SIGNED, lambda a, b: (a * b >> 14) + 1 >> 1)),
    ("pmuludq", "sse2", "sse2", _each(64, UNSIGNED, lambda a, b: (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF))),
    ("pmuldq", "", "sse41", lambda a, b, bits: join(
        (x * y for x, y in zip(signed_lanes(a, 32, bits)[::2], signed_lanes(b, 32, bits)[::2], strict=True)),
        64)),
    ("pcmpeqb", "mmx", "sse2", _each(8, UNSIGNED, _equal)),
    ("pcmpeqw", "mmx", "sse2", _each(16, UNSIGNED, _equal)),
    ("pcmpeqd", "mmx", "sse2", _each(32, UNSIGNED, _equal)),
    ("pcmpeqq", "", "sse41", _each(64, UNSIGNED, _equal)),
    ("pcmpgtb", "mmx", "sse2", _each(8, SIGNED, _greater)),
    ("pcmpgtw", "mmx", "sse2", _each(16, SIGNED, _greater)),
    ("pcmpgtd", "mmx", "sse2", _each(32, SIGNED, _greater)),
    ("pcmpgtq", "", "sse42", _each(64, SIGNED, _greater)),
    ("pavgb", "sse", "sse2", _each(8, UNSIGNED, _average)),
    ("pavgw", "sse", "sse2", _each(16, UNSIGNED, _average)),
    ("pminub", "sse", "sse2", _each(8, UNSIGNED, min)),
    ("pminsb", "", "sse41", _each(8, SIGNED, min)),
    ("pminuw", "", "sse41", _each(16, UNSIGNED, min)),
    ("pminsw", "sse", "sse2", _each(16, SIGNED, min)),
    ("pminud", "", "sse41", _each(32, UNSIGNED, min)),
    ("pminsd", "", "sse41", _each(32, SIGNED, min)),
    ("pmaxub", "sse", "sse2", _each(8, UNSIGNED, max)),
    ("pmaxsb", "", "sse41", _each(8, SIGNED, max)),
    ("pmaxuw", "", "sse41", _each(16, UNSIGNED, max)),
    ("pmaxsw", "sse", "sse2", _each(16, SIGNED, max)),
    ("pmaxud", "", "sse41", _each(32, UNSIGNED, max)),
    ("pmaxsd", "", "sse41", _each(32, SIGNED, max)),
    ("psignb", "ssse3", "ssse3", _each(8, SIGNED, _sign)),
    ("psignw", "ssse3", "ssse3", _each(16, SIGNED, _sign)),
    ("psignd", "ssse3", "ssse3", _each(32, SIGNED, _sign)),
    ("pabsb", "ssse3", "ssse3", _each(8, SIGNED, lambda a, b: abs(b))),
    ("pabsw", "ssse3", "ssse3", _each(16, SIGNED, lambda a, b: abs(b))),
    ("pabsd", "ssse3", "ssse3", _each(32, SIGNED, lambda a, b: abs(b))),
):  # fmt: skip
    packed(_name, _mmx, _xmm, _function)


# --- logic ------------------------------------------------------------------------------------------------


def _and(a: int, b: int, bits: int) -> int:
    return a & b


def _and_not(a: int, b: int, bits: int) -> int:
    return ~a & b


def _or(a: int, b: int, bits: int) -> int:
    return a | b


def _xor(a: int, b: int, bits: int) -> int:
    return a ^ b


def _of_low_half(function: Combine) -> Combine:
    """MMX registers read as 64 bits, so that the complement stays within them."""
    return lambda a, b, bits: function(a, b, bits) & (1 << bits) - 1


for _stem, _function in (("and", _and), ("andn", _of_low_half(_and_not)), ("or", _or), ("xor", _xor)):
    packed(f"p{_stem}", "mmx", "sse2", _function)
    packed(f"{_stem}ps", "", "sse", _function)
    packed(f"{_stem}pd", "", "sse2", _function)


# --- across lanes -----------------------------------------------------------------------------------------


def _neighbours(values: list[int]) -> list[tuple[int, int]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _pmaddwd(a: int, b: int, bits: int) -> int:
    """Sums of two neighbouring products of signed words."""
    products = [x * y for x, y in zip(signed_lanes(a, 16, bits), signed_lanes(b, 16, bits), strict=True)]
    return join((x + y for x, y in _neighbours(products)), 32)


def _pmaddubsw(a: int, b: int, bits: int) -> int:
    """The same of unsigned bytes and signed bytes, saturated."""
    products = [x * y for x, y in zip(lanes(a, 8, bits), signed_lanes(b, 8, bits), strict=True)]
    return join((saturate(x + y, 16) for x, y in _neighbours(products)), 16)


def _psadbw(a: int, b: int, bits: int) -> int:
    """For each 8 bytes the sum of absolute differences."""
    differences = [abs(x - y) for x, y in zip(lanes(a, 8, bits), lanes(b, 8, bits), strict=True)]
    return join((sum(differences[at : at + 8]) for at in range(0, len(differences), 8)), 64)


def _horizontal(width: int, function: Callable[[int, int], int], saturating: bool = False) -> Combine:
    """The function on neighbouring lanes, of the destination first."""

    def combine(a: int, b: int, bits: int) -> int:
        pairs = _neighbours(signed_lanes(a, width, bits) + signed_lanes(b, width, bits))
        results = (function(x, y) for x, y in pairs)
        return join((saturate(each, width) if saturating else each for each in results), width)

    return combine


def _phminposuw(a: int, b: int, bits: int) -> int:
    """The least word and its position."""
    words = lanes(b, 16, bits)
    least = min(words)
    return words.index(least) << 16 | least


for _name, _mmx, _xmm, _function in (
    ("pmaddwd", "mmx", "sse2", _pmaddwd),
    ("pmaddubsw", "ssse3", "ssse3", _pmaddubsw),
    ("psadbw", "sse", "sse2", _psadbw),
    ("phaddw", "ssse3", "ssse3", _horizontal(16, _add)),
    ("phaddd", "ssse3", "ssse3", _horizontal(32, _add)),
    ("phaddsw", "ssse3", "ssse3", _horizontal(16, _add, True)),
    ("phsubw", "ssse3", "ssse3", _horizontal(16, _subtract)),
    ("phsubd", "ssse3", "ssse3", _horizontal(32, _subtract)),
    ("phsubsw", "ssse3", "ssse3", _horizontal(16, _subtract, True)),
    ("phminposuw", "", "sse41", _phminposuw),
):
    packed(_name, _mmx, _xmm, _function)
