"""Status flags of arithmetic and logic (SDM vol. 1, 3.4.3.1), for operands of 1, 2, 4 or 8 bytes.

Each function returns the result and the six status flags as RFLAGS bits.
"""

from __future__ import annotations

from typing import Final

CF: Final = 1 << 0
PF: Final = 1 << 2
AF: Final = 1 << 4
ZF: Final = 1 << 6
SF: Final = 1 << 7
TF: Final = 1 << 8
IF: Final = 1 << 9
DF: Final = 1 << 10
OF: Final = 1 << 11
RF: Final = 1 << 16
STATUS: Final = CF | PF | AF | ZF | SF | OF

MASK: Final = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8, 16)}
SIGN: Final = {size: 1 << 8 * size - 1 for size in (1, 2, 4, 8, 16)}

PARITY: Final = tuple(PF if value.bit_count() % 2 == 0 else 0 for value in range(256))
"""PF of a result by its lowest byte: set for an even number of ones."""


def of_result(result: int, size: int) -> int:
    """SF, ZF and PF of a result that fits ``size`` bytes."""
    flags = PARITY[result & 0xFF]
    if not result:
        flags |= ZF
    elif result & SIGN[size]:
        flags |= SF
    return flags


def add(a: int, b: int, carry: int, size: int) -> tuple[int, int]:
    """a + b + carry."""
    total = a + b + carry
    result = total & MASK[size]
    flags = of_result(result, size) | (a ^ b ^ result) & AF
    if total != result:
        flags |= CF
    if (a ^ result) & (b ^ result) & SIGN[size]:
        flags |= OF
    return result, flags


def subtract(a: int, b: int, borrow: int, size: int) -> tuple[int, int]:
    """a - b - borrow."""
    total = a - b - borrow
    result = total & MASK[size]
    flags = of_result(result, size) | (a ^ b ^ result) & AF
    if total < 0:
        flags |= CF
    if (a ^ b) & (a ^ result) & SIGN[size]:
        flags |= OF
    return result, flags


def logic(result: int, size: int) -> int:
    """The flags of AND, OR, XOR and TEST: CF and OF clear (AF is undefined: clear, as processors do)."""
    return of_result(result, size)


def signed(value: int, size: int) -> int:
    """``value`` of ``size`` bytes as a signed integer."""
    return value - (1 << 8 * size) if value & SIGN[size] else value
