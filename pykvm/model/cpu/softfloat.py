"""Binary floating point exactly, by integers (SDM vol. 1, 4.2 and 4.8; IEEE 754-2008).

A finite number is significand * 2**exponent; results are rounded once, with the flags that belong to it.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from math import isqrt
from typing import Final, NamedTuple


class Flag(IntFlag):
    """Exceptions, as bits of the x87 status word and of MXCSR."""

    INVALID = 1
    DENORMAL = 2
    DIVIDE = 4
    OVERFLOW = 8
    UNDERFLOW = 16
    PRECISION = 32


class Rounding(IntEnum):
    """The RC field of the x87 control word and of MXCSR."""

    NEAREST = 0
    DOWN = 1
    UP = 2
    ZERO = 3


class Format(NamedTuple):
    """``precision`` counts the integer bit, which only the 80-bit format stores."""

    exponent_bits: int
    precision: int
    stores_integer: bool = False

    @property
    def bias(self) -> int:
        return (1 << self.exponent_bits - 1) - 1

    @property
    def fraction_bits(self) -> int:
        """Stored bits of the significand."""
        return self.precision if self.stores_integer else self.precision - 1

    @property
    def size(self) -> int:
        """In bytes."""
        return (1 + self.exponent_bits + self.fraction_bits) // 8

    @property
    def infinity(self) -> int:
        integer = 1 << self.precision - 1 if self.stores_integer else 0
        return (1 << self.exponent_bits) - 1 << self.fraction_bits | integer

    @property
    def quiet(self) -> int:
        """The bit that makes a NaN quiet."""
        return 1 << self.precision - 2

    @property
    def sign(self) -> int:
        return 1 << self.exponent_bits + self.fraction_bits

    @property
    def indefinite(self) -> int:
        """The NaN that answers an invalid operation."""
        return self.sign | self.infinity | self.quiet


SINGLE: Final = Format(8, 24)
DOUBLE: Final = Format(11, 53)
EXTENDED: Final = Format(15, 64, stores_integer=True)


class Kind(IntEnum):
    ZERO = 0
    FINITE = 1
    INFINITE = 2
    QUIET = 3
    SIGNALING = 4
    UNSUPPORTED = 5


class Number(NamedTuple):
    """An operand taken apart; ``bits`` is its encoding (after DAZ), ``denormal`` whether it is denormal."""

    kind: Kind
    negative: bool
    significand: int
    exponent: int
    bits: int
    denormal: bool = False

    @property
    def is_nan(self) -> bool:
        return self.kind >= Kind.QUIET


def decode(bits: int, form: Format, *, daz: bool = False) -> Number:
    """Take an encoding apart; ``daz`` makes zeros of denormals.

    UNSUPPORTED are the encodings of the 80-bit format without integer bit that processors since the 80387
    reject (SDM vol. 1, 8.2.2).
    """
    negative = bool(bits & form.sign)
    exponent = bits >> form.fraction_bits & (1 << form.exponent_bits) - 1
    field = bits & (1 << form.fraction_bits) - 1
    integer = 1 << form.precision - 1
    if exponent == 0:
        if field == 0 or daz:
            return Number(Kind.ZERO, negative, 0, 0, bits & form.sign)
        if form.stores_integer and field & integer:
            bits |= 1 << form.fraction_bits  # a pseudo-denormal is the normal number of exponent 1
        return Number(Kind.FINITE, negative, field, 2 - form.bias - form.precision, bits, denormal=True)
    if form.stores_integer and not field & integer:
        return Number(Kind.UNSUPPORTED, negative, 0, 0, bits)
    if exponent == (1 << form.exponent_bits) - 1:
        if not field & integer - 1:
            return Number(Kind.INFINITE, negative, 0, 0, bits)
        kind = Kind.QUIET if field & form.quiet else Kind.SIGNALING
        return Number(kind, negative, 0, 0, bits)
    return Number(Kind.FINITE, negative, field | integer, exponent - form.bias - form.precision + 1, bits)


def zero(form: Format, negative: bool) -> int:
    return form.sign if negative else 0


def infinity(form: Format, negative: bool) -> int:
    return form.infinity | zero(form, negative)


# --- rounding ---------------------------------------------------------------------------------------------


class Environment(NamedTuple):
    """How to round: ``masked`` exceptions get a default result; ``flush`` makes tiny results zero (FZ).

    ``precision`` is the number of significant bits where it is less than the format's (x87 PC).
    """

    rounding: Rounding = Rounding.NEAREST
    masked: int = 0x3F
    daz: bool = False
    flush: bool = False
    precision: int = 0


class Result(NamedTuple):
    """An encoding, the exceptions met, and whether rounding increased the magnitude (x87 C1)."""

    bits: int
    flags: int = 0
    up: bool = False


def shift_rounding(significand: int, shift: int, mode: Rounding, negative: bool) -> tuple[int, bool, bool]:
    """significand / 2**shift as an integer, whether that is inexact, and whether it was rounded up."""
    if shift <= 0:
        return significand << -shift, False, False
    quotient, rest = significand >> shift, significand & (1 << shift) - 1
    if not rest:
        return quotient, False, False
    half = 1 << shift - 1
    if mode == Rounding.NEAREST:
        up = rest > half or (rest == half and bool(quotient & 1))
    else:
        up = mode == (Rounding.DOWN if negative else Rounding.UP)
    return quotient + up, True, up


def encode(negative: bool, significand: int, exponent: int, form: Format, environment: Environment) -> Result:
    """Round a number that is not zero; tininess is judged after rounding (SDM vol. 1, 4.9.1.5)."""
    precision = environment.precision or form.precision
    leading = exponent + significand.bit_length() - 1
    least = 1 - form.bias
    mode = environment.rounding
    shift = leading - precision + 1 - exponent
    value, inexact, up = shift_rounding(significand, shift, mode, negative)
    at = leading + (value.bit_length() > precision)
    if at < least:
        if not environment.masked & Flag.UNDERFLOW:
            return _wrapped(negative, significand, exponent, form, environment, Flag.UNDERFLOW, _WRAP)
        return _encode_tiny(negative, significand, exponent, form, environment, precision)
    if at > form.bias:
        if not environment.masked & Flag.OVERFLOW:
            return _wrapped(negative, significand, exponent, form, environment, Flag.OVERFLOW, -_WRAP)
        return _overflow(negative, form, environment)
    if value.bit_length() > precision:
        value >>= 1
    value <<= form.precision - precision
    bits = (at + form.bias) << form.fraction_bits | value & (1 << form.fraction_bits) - 1
    return Result(bits | zero(form, negative), Flag.PRECISION if inexact else 0, up)


_WRAP: Final = 3 << 13
"""What the exponent of an x87 result is moved by for the handler of an unmasked overflow or underflow."""


def _wrapped(
    negative: bool,
    significand: int,
    exponent: int,
    form: Format,
    environment: Environment,
    flag: Flag,
    by: int,
) -> Result:
    """The handler gets the number rounded as if the exponent had no limit (SDM vol. 1, 4.9.1.4, 4.9.1.5)."""
    unlimited = environment._replace(precision=environment.precision or form.precision)
    found = encode(negative, significand, exponent + (by if form.stores_integer else 0), EXTENDED, unlimited)
    return Result(found.bits if form.stores_integer else 0, found.flags | flag, found.up)


def _encode_tiny(
    negative: bool, significand: int, exponent: int, form: Format, environment: Environment, precision: int
) -> Result:
    if environment.flush:
        return Result(zero(form, negative), Flag.UNDERFLOW | Flag.PRECISION)
    # The last place is that of the least normal number with the precision asked for.
    quantum = 2 - form.bias - precision
    value, inexact, up = shift_rounding(significand, quantum - exponent, environment.rounding, negative)
    value <<= form.precision - precision
    flags = Flag.PRECISION | Flag.UNDERFLOW if inexact else 0
    # Rounding may make the least normal number of it, whose exponent field is 1.
    if value >> form.precision - 1 and form.stores_integer:
        value |= 1 << form.fraction_bits
    return Result(value | zero(form, negative), flags, up)


def _overflow(negative: bool, form: Format, environment: Environment) -> Result:
    mode = environment.rounding
    away = mode == Rounding.NEAREST or mode == (Rounding.DOWN if negative else Rounding.UP)
    bits = infinity(form, negative)
    if not away:
        bits = infinity(form, negative) - 1
        if form.stores_integer:
            precision = environment.precision or form.precision
            largest = (1 << precision) - 1 << form.precision - precision
            bits = ((1 << form.exponent_bits) - 2 << form.fraction_bits) | largest
            bits |= zero(form, negative)
    return Result(bits, Flag.OVERFLOW | Flag.PRECISION, away)


# --- operations -------------------------------------------------------------------------------------------


def _invalid(form: Format) -> Result:
    return Result(form.indefinite, Flag.INVALID)


def _denormal(*operands: Number) -> int:
    return Flag.DENORMAL if any(each.denormal for each in operands) else 0


def _with(result: Result, flags: int) -> Result:
    return Result(result.bits, result.flags | flags, result.up)


def add(a: Number, b: Number, form: Format, environment: Environment) -> Result:
    """a + b of numbers that are no NaNs."""
    if a.kind == Kind.INFINITE or b.kind == Kind.INFINITE:
        if a.kind == b.kind and a.negative != b.negative:
            return _invalid(form)
        return Result(infinity(form, (a if a.kind == Kind.INFINITE else b).negative), _denormal(a, b))
    exponent = min(a.exponent, b.exponent)
    total = sum(
        (-each.significand if each.negative else each.significand) << each.exponent - exponent
        for each in (a, b)
    )
    if total == 0:
        same = a.negative == b.negative
        negative = a.negative if same else environment.rounding == Rounding.DOWN
        return Result(zero(form, negative), _denormal(a, b))
    return _with(encode(total < 0, abs(total), exponent, form, environment), _denormal(a, b))


def subtract(a: Number, b: Number, form: Format, environment: Environment) -> Result:
    """a - b."""
    return add(a, b._replace(negative=not b.negative), form, environment)


def multiply(a: Number, b: Number, form: Format, environment: Environment) -> Result:
    """a * b."""
    negative = a.negative != b.negative
    kinds = {a.kind, b.kind}
    if kinds == {Kind.ZERO, Kind.INFINITE}:
        return _invalid(form)
    if Kind.INFINITE in kinds:
        return Result(infinity(form, negative), _denormal(a, b))
    if Kind.ZERO in kinds:
        return Result(zero(form, negative), _denormal(a, b))
    product = a.significand * b.significand
    return _with(encode(negative, product, a.exponent + b.exponent, form, environment), _denormal(a, b))


def divide(a: Number, b: Number, form: Format, environment: Environment) -> Result:
    """a / b."""
    negative = a.negative != b.negative
    if a.kind == b.kind and a.kind != Kind.FINITE:
        return _invalid(form)
    if a.kind == Kind.INFINITE:
        return Result(infinity(form, negative), _denormal(b))
    if b.kind == Kind.ZERO:
        return Result(infinity(form, negative), Flag.DIVIDE)
    if a.kind == Kind.ZERO or b.kind == Kind.INFINITE:
        return Result(zero(form, negative), _denormal(a, b))
    # Two bits more than any precision, and one that stands for the rest.
    widening = max(0, form.precision + 3 + b.significand.bit_length() - a.significand.bit_length())
    quotient, rest = divmod(a.significand << widening, b.significand)
    exact = quotient << 1 | (rest != 0)
    found = encode(negative, exact, a.exponent - b.exponent - widening - 1, form, environment)
    return _with(found, _denormal(a, b))


def square_root(a: Number, form: Format, environment: Environment) -> Result:
    """The square root; that of -0 is -0."""
    if a.kind == Kind.ZERO:
        return Result(zero(form, a.negative))
    if a.negative:
        return _invalid(form)
    if a.kind == Kind.INFINITE:
        return Result(a.bits)
    widening = 2 * form.precision + 6
    widening += a.exponent - widening & 1
    widened = a.significand << widening
    root = isqrt(widened)
    exact = root << 1 | (root * root != widened)
    found = encode(False, exact, (a.exponent - widening) // 2 - 1, form, environment)
    return _with(found, _denormal(a))


def to_integer(a: Number, bits: int, rounding: Rounding) -> Result:
    """A signed integer of ``bits`` as two's complement; the integer indefinite for what does not fit."""
    indefinite = Result(1 << bits - 1, Flag.INVALID)
    if a.kind == Kind.ZERO:
        return Result(0)
    if a.kind != Kind.FINITE or a.exponent > bits:
        return indefinite
    magnitude, inexact, up = shift_rounding(a.significand, -a.exponent, rounding, a.negative)
    value = -magnitude if a.negative else magnitude
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        return indefinite
    return Result(value & (1 << bits) - 1, Flag.PRECISION if inexact else 0, up)


def from_integer(value: int, form: Format, environment: Environment) -> Result:
    """A signed integer as a number."""
    if value == 0:
        return Result(0)
    return encode(value < 0, abs(value), 0, form, environment)


def is_less(a: Number, b: Number) -> bool:
    """a < b of numbers that are no NaNs."""
    return _order(a) < _order(b)


def _order(a: Number) -> int:
    """An integer that grows with the number: encodings are ordered by magnitude."""
    if a.kind == Kind.ZERO:
        return 0
    return -a.bits if a.negative else a.bits


def is_equal(a: Number, b: Number) -> bool:
    """a == b of numbers that are no NaNs."""
    return _order(a) == _order(b)
