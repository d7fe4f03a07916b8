"""x87 basic arithmetic, comparisons, signs and conditional moves (SDM vol. 1, 8.3.5 to 8.3.7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import softfloat
from pykvm.model.cpu import x87_registers as stack
from pykvm.model.cpu.flags import CF, PF, STATUS, ZF, signed
from pykvm.model.cpu.instruction import Memory, StackRegister
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.softfloat import EXTENDED, Environment, Flag, Format, Kind, Number, Result, decode
from pykvm.model.cpu.x87 import begin, done, pop, signal
from pykvm.model.cpu.x87_moves import environment, widen

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_STACK_UNDERFLOW: Final = stack.INVALID | stack.STACK_FAULT
_PREVENTS: Final = stack.INVALID | stack.DENORMAL | stack.DIVIDE
_PRECISIONS: Final = (24, 64, 53, 64)
"""By the PC field of the control word (SDM vol. 1, table 8-2)."""
_SIGN: Final = EXTENDED.sign
_SIGNIFICAND: Final = (1 << 64) - 1

Operation = Callable[[Number, Number, Format, Environment], Result]
_OPERATIONS: Final[dict[int, Operation]] = {
    0: softfloat.add,
    1: softfloat.multiply,
    4: softfloat.subtract,
    5: lambda a, b, form, env: softfloat.subtract(b, a, form, env),
    6: softfloat.divide,
    7: lambda a, b, form, env: softfloat.divide(b, a, form, env),
}
"""By the reg field of ModR/M: of ST(0) and the other operand."""


def _environment(cpu: Processor) -> Environment:
    return environment(cpu)._replace(precision=_PRECISIONS[cpu.x87.control >> 8 & 3])


def _nan(a: Number, b: Number) -> Result:
    """The answer to operands of which one is a NaN or unsupported (SDM vol. 1, table 4-7)."""
    if Kind.UNSUPPORTED in {a.kind, b.kind}:
        return Result(stack.INDEFINITE, Flag.INVALID)
    kinds = {a.kind, b.kind}
    flags = Flag.INVALID if Kind.SIGNALING in kinds else 0
    nans = [each for each in (a, b) if each.is_nan]
    if kinds == {Kind.SIGNALING, Kind.QUIET}:
        nans = [each for each in nans if each.kind == Kind.QUIET]
    # The larger significand; of equal ones the positive (host).
    chosen = max(nans, key=lambda each: (each.bits & _SIGNIFICAND, not each.negative))
    return Result(chosen.bits | EXTENDED.quiet, flags)


def _other(cpu: Processor, insn: Instruction) -> tuple[int | None, int, int]:
    """The operand beside ST(0): its stack index or None, its 80 bits, and the exceptions of loading it."""
    assert insn.modrm is not None
    if insn.modrm >= 0xC0:
        index = insn.modrm & 7
        return index, stack.get(cpu.x87, index), 0
    operand = insn.operands[-1]
    assert isinstance(operand, Memory)
    value = operand.read(cpu)
    if insn.opcode[0] in {0xDA, 0xDE}:
        integer = signed(value, operand.size)
        return None, softfloat.from_integer(integer, EXTENDED, Environment()).bits, 0
    return None, *widen(value, operand.size)


@semantics(
    "fadd", "faddp", "fiadd", "fmul", "fmulp", "fimul", "fsub", "fsubp", "fisub", "fsubr", "fsubrp", "fisubr",
    "fdiv", "fdivp", "fidiv", "fdivr", "fdivrp", "fidivr",
)  # fmt: skip
def arithmetic(cpu: Processor, insn: Instruction) -> None:
    """ST(0) and memory or ST(i); DC and DE put the result of registers into ST(i), DE pops."""
    begin(cpu, insn)
    assert insn.modrm is not None
    x87 = cpu.x87
    index, bits, loading = _other(cpu, insn)
    to_other = index is not None and insn.opcode[0] in {0xDC, 0xDE}
    x87.status &= ~stack.C1
    if stack.is_empty(x87, 0) or (index is not None and stack.is_empty(x87, index)):
        result = Result(stack.INDEFINITE, _STACK_UNDERFLOW)
    else:
        a, b = decode(stack.get(x87, 0), EXTENDED), decode(bits, EXTENDED)
        if a.is_nan or b.is_nan:
            result = _nan(a, b)
            result = result._replace(flags=result.flags | loading & Flag.INVALID)
        else:
            result = _OPERATIONS[insn.modrm >> 3 & 7](a, b, EXTENDED, _environment(cpu))
            if not result.flags & (Flag.INVALID | Flag.DIVIDE):
                result = result._replace(flags=result.flags | loading)
    delivered = _deliver(cpu, index if to_other and index is not None else 0, result)
    if delivered and index is not None and insn.opcode[0] == 0xDE:
        pop(cpu)
    done(cpu, insn)


def _deliver(cpu: Processor, index: int, result: Result) -> bool:
    """Set flags and fill ST(index); whether no unmasked exception prevents that."""
    x87 = cpu.x87
    prevented = result.flags & _PREVENTS & ~x87.control
    if prevented:
        result = Result(0, result.flags & (_PREVENTS | stack.STACK_FAULT))
    signal(cpu, result.flags | (stack.C1 if result.up else 0))
    if not prevented:
        stack.put(x87, index, result.bits)
    return not prevented


# --- comparisons ------------------------------------------------------------------------------------------

_LESS, _EQUAL, _GREATER, _UNORDERED = stack.C0, stack.C3, 0, stack.C0 | stack.C2 | stack.C3
_CONDITIONS: Final = stack.C0 | stack.C2 | stack.C3


def _relate(a: Number, b: Number, quiet: bool, loading: int) -> tuple[int, int]:
    """The condition code and the exceptions; ``quiet`` comparisons (FUCOM) take quiet NaNs."""
    if a.is_nan or b.is_nan:
        invalid = not quiet or {a.kind, b.kind} & {Kind.SIGNALING, Kind.UNSUPPORTED}
        return _UNORDERED, (Flag.INVALID if invalid else 0) | loading & Flag.INVALID
    flags = loading | (Flag.DENORMAL if a.denormal or b.denormal else 0)
    if softfloat.is_equal(a, b):
        return _EQUAL, flags
    return _LESS if softfloat.is_less(a, b) else _GREATER, flags


def _compare(cpu: Processor, insn: Instruction, quiet: bool) -> tuple[int, bool]:
    """The condition code of ST(0) and the other operand; whether an unmasked exception prevents pops."""
    x87 = cpu.x87
    index, bits, loading = _other(cpu, insn)
    if stack.is_empty(x87, 0) or (index is not None and stack.is_empty(x87, index)):
        found, flags = _UNORDERED, _STACK_UNDERFLOW
    else:
        found, flags = _relate(decode(stack.get(x87, 0), EXTENDED), decode(bits, EXTENDED), quiet, loading)
    if flags & stack.STACK_FAULT:
        x87.status &= ~stack.C1
    signal(cpu, flags)
    return found, bool(flags & _PREVENTS & ~x87.control)


def _comparison(name: str, quiet: bool, pops: int) -> None:
    """To C3, C2 and C0."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        begin(cpu, insn)
        found, prevented = _compare(cpu, insn, quiet)
        cpu.x87.status = cpu.x87.status & ~(_CONDITIONS | stack.C1) | found
        for _ in range(0 if prevented else pops):
            pop(cpu)
        done(cpu, insn)

    semantics(name)(execute)


def _comparison_to_flags(name: str, quiet: bool, pops: int) -> None:
    """To ZF, PF and CF; C1 stays but for a stack fault (SDM vol. 2, FCOMI; host)."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        begin(cpu, insn)
        found, prevented = _compare(cpu, insn, quiet)
        flags = {_LESS: CF, _EQUAL: ZF, _GREATER: 0, _UNORDERED: ZF | PF | CF}[found]
        cpu.rflags = cpu.rflags & ~STATUS | flags
        for _ in range(0 if prevented else pops):
            pop(cpu)
        done(cpu, insn)

    semantics(name)(execute)


for _stem, _quiet in (("com", False), ("ucom", True)):
    for _end, _pops in (("", 0), ("p", 1), ("pp", 2)):
        _comparison(f"f{_stem}{_end}", _quiet, _pops)
    _comparison_to_flags(f"f{_stem}i", _quiet, 0)
    _comparison_to_flags(f"f{_stem}pi", _quiet, 1)
_comparison("ficom", False, 0)
_comparison("ficomp", False, 1)


@semantics("ftst")
def ftst(cpu: Processor, insn: Instruction) -> None:
    """ST(0) against +0.0."""
    begin(cpu, insn)
    x87 = cpu.x87
    found, flags = _UNORDERED, _STACK_UNDERFLOW
    if not stack.is_empty(x87, 0):
        found, flags = _relate(decode(stack.get(x87, 0), EXTENDED), decode(0, EXTENDED), False, 0)
    x87.status = x87.status & ~(_CONDITIONS | stack.C1) | found
    signal(cpu, flags)
    done(cpu, insn)


# --- of one operand ---------------------------------------------------------------------------------------


def _round(a: Number, env: Environment) -> Result:
    """To an integer as RC says; already one where the exponent is large."""
    if a.kind != Kind.FINITE or a.exponent >= 0:
        return Result(a.bits)
    value, inexact, up = softfloat.shift_rounding(a.significand, -a.exponent, env.rounding, a.negative)
    bits = softfloat.from_integer(value, EXTENDED, Environment()).bits | softfloat.zero(EXTENDED, a.negative)
    flags = (Flag.PRECISION if inexact else 0) | (Flag.DENORMAL if a.denormal else 0)
    return Result(bits, flags, up)


_UNARY: Final[dict[str, Callable[[Number, Environment], Result]]] = {
    "fsqrt": lambda a, env: softfloat.square_root(a, EXTENDED, env),
    "frndint": _round,
}


@semantics(*_UNARY)
def unary(cpu: Processor, insn: Instruction) -> None:
    begin(cpu, insn)
    x87 = cpu.x87
    x87.status &= ~stack.C1
    a = decode(stack.get(x87, 0), EXTENDED)
    if stack.is_empty(x87, 0):
        result = Result(stack.INDEFINITE, _STACK_UNDERFLOW)
    elif a.is_nan:
        result = _nan(a, a)
    else:
        result = _UNARY[insn.name](a, _environment(cpu))
    _deliver(cpu, 0, result)
    done(cpu, insn)


# --- signs and classes ------------------------------------------------------------------------------------


@semantics("fchs", "fabs")
def change_sign(cpu: Processor, insn: Instruction) -> None:
    begin(cpu, insn)
    x87 = cpu.x87
    x87.status &= ~stack.C1
    value = stack.get(x87, 0)
    if not stack.is_empty(x87, 0):
        stack.put(x87, 0, value ^ _SIGN if insn.name == "fchs" else value & ~_SIGN)
    elif not signal(cpu, _STACK_UNDERFLOW):
        stack.put(x87, 0, stack.INDEFINITE)
    done(cpu, insn)


_CLASSES: Final = {
    Kind.UNSUPPORTED: 0,
    Kind.SIGNALING: stack.C0,
    Kind.QUIET: stack.C0,
    Kind.FINITE: stack.C2,
    Kind.INFINITE: stack.C2 | stack.C0,
    Kind.ZERO: stack.C3,
}


@semantics("fxam")
def fxam(cpu: Processor, insn: Instruction) -> None:
    """The class of ST(0) to C3, C2 and C0 (SDM vol. 1, table 8-6), its sign to C1."""
    begin(cpu, insn)
    x87 = cpu.x87
    a = decode(stack.get(x87, 0), EXTENDED)
    found = stack.C3 | stack.C2 if a.denormal else _CLASSES[a.kind]
    if stack.is_empty(x87, 0):
        found = stack.C3 | stack.C0
    x87.status = x87.status & ~(_CONDITIONS | stack.C1) | found | (stack.C1 if a.negative else 0)
    done(cpu, insn)


_MOVES: Final = {
    "fcmovb": lambda flags: flags & CF,
    "fcmove": lambda flags: flags & ZF,
    "fcmovbe": lambda flags: flags & (CF | ZF),
    "fcmovu": lambda flags: flags & PF,
}


@semantics(*_MOVES, *(f"fcmovn{name[5:]}" for name in _MOVES))
def fcmov(cpu: Processor, insn: Instruction) -> None:
    """ST(i) to ST(0) where the condition holds; an empty one of them is a stack underflow in any case."""
    begin(cpu, insn)
    x87 = cpu.x87
    operand = insn.operands[-1]
    assert isinstance(operand, StackRegister)
    opposite = insn.name.startswith("fcmovn")
    holds = bool(_MOVES[insn.name.replace("cmovn", "cmov")](cpu.rflags)) != opposite
    if stack.is_empty(x87, 0) or stack.is_empty(x87, operand.index):
        x87.status &= ~stack.C1
        if not signal(cpu, _STACK_UNDERFLOW):
            stack.put(x87, 0, stack.INDEFINITE)
    elif holds:
        stack.put(x87, 0, stack.get(x87, operand.index))
    done(cpu, insn)
