"""x87 loads and stores with their conversions, constants, exchange (SDM vol. 1, 8.3.3 and 8.3.4)."""

from __future__ import annotations

from decimal import Context, Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import x87_registers as stack
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import signed
from pykvm.model.cpu.instruction import Memory, StackRegister
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.softfloat import (
    DOUBLE,
    EXTENDED,
    SINGLE,
    Environment,
    Flag,
    Kind,
    Result,
    Rounding,
    decode,
    encode,
    from_integer,
    infinity,
    to_integer,
    zero,
)
from pykvm.model.cpu.x87 import begin, done, pop, signal

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_FORMATS: Final = {4: SINGLE, 8: DOUBLE}
_UNDERFLOW: Final = stack.INVALID | stack.STACK_FAULT
_OVERFLOW: Final = _UNDERFLOW | stack.C1
_PREVENTS_STORE: Final = stack.INVALID | stack.OVERFLOW | stack.UNDERFLOW


def environment(cpu: Processor) -> Environment:
    """The control word's rounding and masks."""
    control = cpu.x87.control
    return Environment(Rounding(control >> 10 & 3), control & 0x3F)


# --- loads ------------------------------------------------------------------------------------------------


def push(cpu: Processor, value: int, flags: int = 0) -> None:
    """Push 80 bits; a stack overflow pushes the indefinite instead.  An unmasked invalid operation pushes
    nothing, an unmasked denormal operand does.

    A source that was empty counts before the overflow (host).
    """
    x87 = cpu.x87
    x87.status &= ~stack.C1
    if not stack.is_empty(x87, 7) and flags != _UNDERFLOW:
        value, flags = stack.INDEFINITE, _OVERFLOW
    if signal(cpu, flags) and flags & stack.INVALID & ~x87.control:
        return
    stack.set_top(x87, stack.top(x87) - 1)
    stack.put(x87, 0, value)


def widen(bits: int, size: int) -> tuple[int, int]:
    """A single or double as 80 bits, exactly, and the exceptions of loading it."""
    form = _FORMATS[size]
    a = decode(bits, form)
    if a.kind == Kind.ZERO:
        return zero(EXTENDED, a.negative), 0
    if a.kind == Kind.INFINITE:
        return infinity(EXTENDED, a.negative), 0
    if a.is_nan:
        fraction = (bits & form.quiet * 2 - 1) << EXTENDED.precision - form.precision
        flags = Flag.INVALID if a.kind == Kind.SIGNALING else 0
        return infinity(EXTENDED, a.negative) | fraction | EXTENDED.quiet, flags
    found = encode(a.negative, a.significand, a.exponent, EXTENDED, Environment())
    return found.bits, Flag.DENORMAL if a.denormal else 0


@semantics("fld")
def fld(cpu: Processor, insn: Instruction) -> None:
    """ST(i) and 80-bit memory are copied as they are."""
    begin(cpu, insn)
    (source,) = insn.operands
    if isinstance(source, StackRegister):
        if stack.is_empty(cpu.x87, source.index):
            push(cpu, stack.INDEFINITE, _UNDERFLOW)
        else:
            push(cpu, stack.get(cpu.x87, source.index))
    elif source.size == 10:
        push(cpu, source.read(cpu))
    else:
        push(cpu, *widen(source.read(cpu), source.size))
    done(cpu, insn)


@semantics("fild")
def fild(cpu: Processor, insn: Instruction) -> None:
    """A signed integer of 2, 4 or 8 bytes, exactly."""
    begin(cpu, insn)
    (source,) = insn.operands
    value = signed(source.read(cpu), source.size)
    push(cpu, from_integer(value, EXTENDED, Environment()).bits)
    done(cpu, insn)


@semantics("fbld")
def fbld(cpu: Processor, insn: Instruction) -> None:
    """18 decimal digits and a sign."""
    begin(cpu, insn)
    value = insn.operands[0].read(cpu)
    digits = sum((value >> 4 * n & 0xF) * 10**n for n in range(18))
    negative = bool(value >> 79)
    bits = from_integer(digits, EXTENDED, Environment()).bits | zero(EXTENDED, negative)
    push(cpu, bits)
    done(cpu, insn)


_PI: Final = Decimal("3.14159265358979323846264338327950288419716939937510582097")
_DIGITS: Final = Context(prec=60)
_LN2: Final = Decimal(2).ln(_DIGITS)
_CONSTANTS: Final = {
    "fld1": Decimal(1),
    "fldl2t": _DIGITS.divide(Decimal(10).ln(_DIGITS), _LN2),
    "fldl2e": _DIGITS.divide(Decimal(1), _LN2),
    "fldpi": _PI,
    "fldlg2": Decimal(2).log10(_DIGITS),
    "fldln2": _LN2,
}
_PLACES: Final = 160


def _constant(value: Decimal, rounding: Rounding) -> int:
    scaled = int(Fraction(value) * (1 << _PLACES))
    return encode(False, scaled, -_PLACES, EXTENDED, Environment(rounding)).bits


_ENCODED: Final = {
    name: [_constant(value, rounding) for rounding in Rounding] for name, value in _CONSTANTS.items()
} | {"fldz": [0] * len(Rounding)}


@semantics(*_ENCODED)
def fld_constant(cpu: Processor, insn: Instruction) -> None:
    """Rounded as RC says; inexactness is not signaled (SDM vol. 2, FLD1)."""
    begin(cpu, insn)
    push(cpu, _ENCODED[insn.name][environment(cpu).rounding])
    done(cpu, insn)


# --- stores -----------------------------------------------------------------------------------------------


def _narrow(bits: int, size: int, env: Environment) -> Result:
    """80 bits as a single or double."""
    form = _FORMATS[size]
    a = decode(bits, EXTENDED)
    if a.kind == Kind.UNSUPPORTED:
        return Result(form.indefinite, Flag.INVALID)
    if a.is_nan:
        fraction = bits >> EXTENDED.precision - form.precision & form.quiet * 2 - 1 | form.quiet
        flags = Flag.INVALID if a.kind == Kind.SIGNALING else 0
        return Result(infinity(form, a.negative) | fraction, flags)
    if a.kind == Kind.ZERO:
        return Result(zero(form, a.negative))
    if a.kind == Kind.INFINITE:
        return Result(infinity(form, a.negative))
    return encode(a.negative, a.significand, a.exponent, form, env)


def _store(cpu: Processor, target: Memory, result: Result, empty_value: int, popping: bool) -> None:
    """Write a converted ST(0); nothing is written or popped where an unmasked exception prevents it."""
    x87 = cpu.x87
    if stack.is_empty(x87, 0):
        result = Result(empty_value, _UNDERFLOW)
    prevented = result.flags & _PREVENTS_STORE & ~x87.control
    if prevented:
        # The result was not rounded to the memory format.
        result = Result(0, result.flags & ~stack.PRECISION)
        cpu.require_writable(target.segment, target.offset(cpu), target.size)
    else:
        target.write(cpu, result.bits)
    x87.status &= ~stack.C1
    signal(cpu, result.flags | (stack.C1 if result.up else 0))
    if popping and not prevented:
        pop(cpu)


@semantics("fst", "fstp")
def fst(cpu: Processor, insn: Instruction) -> None:
    """ST(0) to memory or another register; FSTP pops it."""
    begin(cpu, insn)
    target = insn.operands[0]
    popping = insn.name != "fst"
    if isinstance(target, StackRegister):
        _store_register(cpu, target.index, popping)
    else:
        assert isinstance(target, Memory)
        value = stack.get(cpu.x87, 0)
        if target.size == 10:
            _store(cpu, target, Result(value), stack.INDEFINITE, popping)
        else:
            indefinite = _FORMATS[target.size].indefinite
            _store(cpu, target, _narrow(value, target.size, environment(cpu)), indefinite, popping)
    done(cpu, insn)


def _store_register(cpu: Processor, index: int, popping: bool) -> None:
    x87 = cpu.x87
    x87.status &= ~stack.C1
    value = stack.get(x87, 0)
    if stack.is_empty(x87, 0):
        if signal(cpu, _UNDERFLOW):
            return
        value = stack.INDEFINITE
    stack.put(x87, index, value)
    if popping:
        pop(cpu)


@semantics("fstpnce")
def fstpnce(cpu: Processor, insn: Instruction) -> None:
    """FSTP ST(i) that takes an empty ST(0) without an exception: then it only pops (D9 D8; host)."""
    begin(cpu, insn)
    if stack.is_empty(cpu.x87, 0):
        cpu.x87.status &= ~stack.C1
        pop(cpu)
    else:
        operand = insn.operands[0]
        assert isinstance(operand, StackRegister)
        _store_register(cpu, operand.index, True)
    done(cpu, insn)


@semantics("fist", "fistp", "fisttp")
def fist(cpu: Processor, insn: Instruction) -> None:
    """As a signed integer of 2, 4 or 8 bytes; FISTTP truncates (SSE3)."""
    truncates = insn.name == "fisttp"
    if truncates and not cpu.features.sse3:
        raise Fault.ud()
    begin(cpu, insn)
    (target,) = insn.operands
    assert isinstance(target, Memory)
    bits = 8 * target.size
    rounding = Rounding.ZERO if truncates else environment(cpu).rounding
    result = to_integer(decode(stack.get(cpu.x87, 0), EXTENDED), bits, rounding)
    _store(cpu, target, result, 1 << bits - 1, insn.name != "fist")
    done(cpu, insn)


_BCD_INDEFINITE: Final = 0xFFFFC000 << 48
_BCD_LIMIT: Final = 10**18


@semantics("fbstp")
def fbstp(cpu: Processor, insn: Instruction) -> None:
    """18 decimal digits and a sign; the packed BCD indefinite for what does not fit."""
    begin(cpu, insn)
    target = insn.operands[0]
    assert isinstance(target, Memory)
    a = decode(stack.get(cpu.x87, 0), EXTENDED)
    result = to_integer(a, 64, environment(cpu).rounding)
    magnitude = abs(signed(result.bits, 8))
    if result.flags & Flag.INVALID or magnitude >= _BCD_LIMIT:
        result = Result(_BCD_INDEFINITE, Flag.INVALID)
    else:
        digits = sum(magnitude // 10**n % 10 << 4 * n for n in range(18))
        result = result._replace(bits=digits | zero(EXTENDED, a.negative))
    _store(cpu, target, result, _BCD_INDEFINITE, True)
    done(cpu, insn)


# --- exchange ---------------------------------------------------------------------------------------------


@semantics("fxch")
def fxch(cpu: Processor, insn: Instruction) -> None:
    """ST(0) and ST(i); empty ones count as the indefinite."""
    begin(cpu, insn)
    x87 = cpu.x87
    operand = insn.operands[-1]
    assert isinstance(operand, StackRegister)
    x87.status &= ~stack.C1
    first, second = (
        stack.INDEFINITE if stack.is_empty(x87, index) else stack.get(x87, index)
        for index in (0, operand.index)
    )
    empty = stack.is_empty(x87, 0) or stack.is_empty(x87, operand.index)
    if not (empty and signal(cpu, _UNDERFLOW)):
        stack.put(x87, 0, second)
        stack.put(x87, operand.index, first)
    done(cpu, insn)
