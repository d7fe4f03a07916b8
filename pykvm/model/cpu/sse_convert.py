"""SSE conversions between integers and floating point, and rounding to integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.flags import signed as signed_bytes
from pykvm.model.cpu.instruction import Immediate, Mmx, Register
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.softfloat import (
    DOUBLE,
    SINGLE,
    Environment,
    Flag,
    Format,
    Kind,
    Result,
    Rounding,
    decode,
    encode,
    from_integer,
    infinity,
    shift_rounding,
    to_integer,
    zero,
)
from pykvm.model.cpu.sse_float import FORMS, environment, nan_result, signal
from pykvm.model.cpu.vector import (
    join,
    lanes,
    read,
    require_mmx,
    require_sse,
    signed_lanes,
    touch_mmx,
)

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

Convert = Callable[[int, Environment], Result]


def _integer(form: Format, bits: int, truncate: bool) -> Convert:
    """Floating point to a signed integer."""

    def convert(x: int, env: Environment) -> Result:
        mode = Rounding.ZERO if truncate else env.rounding
        return to_integer(decode(x, form, daz=env.daz), bits, mode)

    return convert


def resize(x: int, source: Format, target: Format, env: Environment) -> Result:
    """Floating point of another format; of a NaN the upper part stays."""
    a = decode(x, source, daz=env.daz)
    if a.is_nan:
        shift = target.precision - source.precision
        fraction = a.bits & source.quiet * 2 - 1 | source.quiet
        moved = fraction << shift if shift >= 0 else fraction >> -shift
        return Result(infinity(target, a.negative) | moved, Flag.INVALID if a.kind == Kind.SIGNALING else 0)
    if a.kind == Kind.ZERO:
        return Result(zero(target, a.negative))
    if a.kind == Kind.INFINITE:
        return Result(infinity(target, a.negative))
    found = encode(a.negative, a.significand, a.exponent, target, env)
    return Result(found.bits, found.flags | (Flag.DENORMAL if a.denormal else 0), found.up)


# --- between vector registers -----------------------------------------------------------------------------


def _packed(name: str, feature: str, source: int, target: int, count: int, convert: Convert) -> None:
    """``count`` lanes from ``source`` to ``target`` bits each; the rest of the register becomes zero."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        register, operand = insn.operands
        require_sse(cpu, feature)
        env = environment(cpu)
        value = read(cpu, operand, count * source // 8)
        results = [convert(lane, env) for lane in lanes(value, source, count * source)]
        signal(cpu, results)
        register.write(cpu, join((each.bits for each in results), target))

    semantics(name)(execute)


def _from_int32(form: Format) -> Convert:
    return lambda x, env: from_integer(signed_lanes(x, 32, 32)[0], form, env)


for _name, _feature, _source, _target, _count, _convert in (
    ("cvtdq2ps", "sse2", 32, 32, 4, _from_int32(SINGLE)),
    ("cvtdq2pd", "sse2", 32, 64, 2, _from_int32(DOUBLE)),
    ("cvtps2dq", "sse2", 32, 32, 4, _integer(SINGLE, 32, False)),
    ("cvttps2dq", "sse2", 32, 32, 4, _integer(SINGLE, 32, True)),
    ("cvtpd2dq", "sse2", 64, 32, 2, _integer(DOUBLE, 32, False)),
    ("cvttpd2dq", "sse2", 64, 32, 2, _integer(DOUBLE, 32, True)),
    ("cvtps2pd", "sse2", 32, 64, 2, lambda x, env: resize(x, SINGLE, DOUBLE, env)),
    ("cvtpd2ps", "sse2", 64, 32, 2, lambda x, env: resize(x, DOUBLE, SINGLE, env)),
):
    _packed(_name, _feature, _source, _target, _count, _convert)


def _scalar(name: str, source: Format, target: Format) -> None:
    """The low lane in the other format; the lanes above stay."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        register, operand = insn.operands
        require_sse(cpu, "sse2")
        value = read(cpu, operand, source.size) & (1 << 8 * source.size) - 1
        result = resize(value, source, target, environment(cpu))
        signal(cpu, (result,))
        width = 8 * target.size
        register.write(cpu, register.read(cpu) >> width << width | result.bits)

    semantics(name)(execute)


_scalar("cvtss2sd", SINGLE, DOUBLE)
_scalar("cvtsd2ss", DOUBLE, SINGLE)


# --- between general and vector registers -----------------------------------------------------------------


def _from_general(name: str, feature: str, form: Format) -> None:
    def execute(cpu: Processor, insn: Instruction) -> None:
        register, operand = insn.operands
        require_sse(cpu, feature)
        size = 8 if insn.rex & 8 else 4
        value = signed_bytes(read(cpu, operand, size) & (1 << 8 * size) - 1, size)
        result = from_integer(value, form, environment(cpu))
        signal(cpu, (result,))
        width = 8 * form.size
        register.write(cpu, register.read(cpu) >> width << width | result.bits)

    semantics(name)(execute)


def _to_general(name: str, feature: str, form: Format, truncate: bool) -> None:
    def execute(cpu: Processor, insn: Instruction) -> None:
        register, operand = insn.operands
        assert isinstance(register, Register)
        require_sse(cpu, feature)
        value = read(cpu, operand, form.size) & (1 << 8 * form.size) - 1
        result = _integer(form, 8 * register.size, truncate)(value, environment(cpu))
        signal(cpu, (result,))
        register.write(cpu, result.bits)

    semantics(name)(execute)


for _end, _feature in (("ss", "sse"), ("sd", "sse2")):
    _from_general(f"cvtsi2{_end}", _feature, FORMS[_end][0])
    _to_general(f"cvt{_end}2si", _feature, FORMS[_end][0], False)
    _to_general(f"cvtt{_end}2si", _feature, FORMS[_end][0], True)


# --- between MMX and XMM registers ------------------------------------------------------------------------
# The x87 state becomes that of MMX before #XM is raised (host).


@semantics("cvtpi2ps")
def cvtpi2ps(cpu: Processor, insn: Instruction) -> None:
    """The upper half of the register stays.  From memory AMD's processors leave the x87 state alone."""
    _from_mmx(cpu, insn, "sse", SINGLE)


@semantics("cvtpi2pd")
def cvtpi2pd(cpu: Processor, insn: Instruction) -> None:
    """From memory it leaves the x87 state alone."""
    _from_mmx(cpu, insn, "sse2", DOUBLE)


def _from_mmx(cpu: Processor, insn: Instruction, feature: str, form: Format) -> None:
    register, operand = insn.operands
    require_sse(cpu, feature)
    uses_mmx = isinstance(operand, Mmx) or (form == SINGLE and not cpu.features.amd)
    if uses_mmx:
        require_mmx(cpu, feature)
    env = environment(cpu)
    values = signed_lanes(read(cpu, operand, 8), 32, 64)
    results = [from_integer(value, form, env) for value in values]
    if uses_mmx:
        touch_mmx(cpu)
    signal(cpu, results)
    width = 8 * form.size
    low = join((each.bits for each in results), width)
    register.write(cpu, register.read(cpu) >> 2 * width << 2 * width | low)


def _to_mmx(name: str, feature: str, form: Format, truncate: bool) -> None:
    def execute(cpu: Processor, insn: Instruction) -> None:
        register, operand = insn.operands
        require_sse(cpu, feature)
        require_mmx(cpu, feature)
        env = environment(cpu)
        width = 8 * form.size
        values = lanes(read(cpu, operand, 2 * form.size), width, 2 * width)
        results = [_integer(form, 32, truncate)(value, env) for value in values]
        touch_mmx(cpu)
        signal(cpu, results)
        register.write(cpu, join((each.bits for each in results), 32))

    semantics(name)(execute)


_to_mmx("cvtps2pi", "sse", SINGLE, False)
_to_mmx("cvttps2pi", "sse", SINGLE, True)
_to_mmx("cvtpd2pi", "sse2", DOUBLE, False)
_to_mmx("cvttpd2pi", "sse2", DOUBLE, True)


# --- rounding to integers ---------------------------------------------------------------------------------

_FROM_MXCSR: Final = 4
_QUIET: Final = 8


def _round(x: int, form: Format, control: int, env: Environment) -> Result:
    """To an integer of the same format: rounding by bits 1:0, or as MXCSR says with bit 2; bit 3 hides PE."""
    mode = env.rounding if control & _FROM_MXCSR else Rounding(control & 3)
    a = decode(x, form, daz=env.daz)
    if a.is_nan:
        found = nan_result(form, a)
        assert found is not None
        return found
    if a.kind != Kind.FINITE or a.exponent >= 0:
        return Result(a.bits)
    magnitude, inexact, _ = shift_rounding(a.significand, -a.exponent, mode, a.negative)
    bits = encode(a.negative, magnitude, 0, form, env).bits if magnitude else zero(form, a.negative)
    return Result(bits, Flag.PRECISION if inexact and not control & _QUIET else 0)


def _rounding(end: str) -> None:
    form, count = FORMS[end]
    width = 8 * form.size

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand, immediate = insn.operands
        assert isinstance(immediate, Immediate)
        require_sse(cpu, "sse41")
        env = environment(cpu)
        values = lanes(read(cpu, operand, count * form.size), width, count * width)
        results = [_round(value, form, immediate.value, env) for value in values]
        signal(cpu, results)
        computed = count * width
        kept = target.read(cpu) >> computed << computed
        target.write(cpu, kept | join((each.bits for each in results), width))

    semantics(f"round{end}")(execute)


for _end in FORMS:
    _rounding(_end)
