"""SSE floating point: arithmetic, minimum and maximum, comparisons (SDM vol. 1, 10.2.3, 11.5; vol. 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import softfloat
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import CF, PF, STATUS, ZF
from pykvm.model.cpu.instruction import Immediate
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.softfloat import (
    DOUBLE,
    SINGLE,
    Environment,
    Flag,
    Format,
    Kind,
    Number,
    Result,
    Rounding,
    decode,
)
from pykvm.model.cpu.vector import join, lanes, read, require_sse
from pykvm.x86.bits import Cr4
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_BEFORE: Final = Flag.INVALID | Flag.DENORMAL | Flag.DIVIDE
"""Exceptions found before computing: unmasked ones hide the others (SDM vol. 1, 11.5.2)."""

FORMS: Final = {"ps": (SINGLE, 4), "pd": (DOUBLE, 2), "ss": (SINGLE, 1), "sd": (DOUBLE, 1)}
"""By the end of the name: the format, and how many lanes are computed."""

Lane = Callable[[int, int, Format, Environment], Result]


def environment(cpu: Processor) -> Environment:
    """MXCSR's rounding, masks, DAZ and FZ (SDM vol. 1, 10.2.3)."""
    mxcsr = cpu.mxcsr
    return Environment(Rounding(mxcsr >> 13 & 3), mxcsr >> 7 & 0x3F, bool(mxcsr & 0x40), bool(mxcsr & 0x8000))


def signal(cpu: Processor, results: Iterable[Result]) -> None:
    """Set the exceptions' flags; #XM, or without CR4.OSXMMEXCPT #UD, for an unmasked one.

    The flags stay set where the instruction faults.
    """
    flags = 0
    for result in results:
        flags |= result.flags
    unmasked = ~(cpu.mxcsr >> 7)
    if flags & _BEFORE & unmasked:
        flags &= _BEFORE
    cpu.mxcsr |= flags
    if flags & unmasked:
        raise Fault(Vector.XM) if cpu.cr4 & Cr4.OSXMMEXCPT else Fault.ud()


def _enter(stem: str, ends: str, features: dict[str, str], lane: Lane) -> None:
    """destination = lane(destination, source) in the lanes of each form; scalars keep the others."""
    for end in ends.split():
        form, count = FORMS[end]
        semantics(stem + end)(_lanewise(form, count, features[end], lane))


def _lanewise(form: Format, count: int, feature: str, lane: Lane) -> Callable[[Processor, Instruction], None]:
    width = 8 * form.size

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand = insn.operands[:2]
        require_sse(cpu, feature)
        env = environment(cpu)
        a, b = target.read(cpu), read(cpu, operand, count * form.size)
        pairs = zip(lanes(a, width, count * width), lanes(b, width, count * width), strict=True)
        results = [lane(x, y, form, env) for x, y in pairs]
        signal(cpu, results)
        computed = count * width
        target.write(cpu, a >> computed << computed | join((each.bits for each in results), width))

    return execute


_SSE: Final = {"ps": "sse", "ss": "sse", "pd": "sse2", "sd": "sse2"}
_ALL: Final = "ps pd ss sd"


# --- arithmetic -------------------------------------------------------------------------------------------


def nan_result(form: Format, *operands: Number) -> Result | None:
    """The first NaN, made quiet; invalid if any is signaling (SDM vol. 1, table 4-7).  None without a NaN."""
    first = next((each for each in operands if each.is_nan), None)
    if first is None:
        return None
    signaling = any(each.kind == Kind.SIGNALING for each in operands)
    return Result(first.bits | form.quiet, Flag.INVALID if signaling else 0)


Operation = Callable[[Number, Number, Format, Environment], Result]


def on_encodings(operation: Operation) -> Lane:
    """An operation on numbers as one on encodings, with the rules for NaNs."""

    def lane(x: int, y: int, form: Format, env: Environment) -> Result:
        a, b = decode(x, form, daz=env.daz), decode(y, form, daz=env.daz)
        return nan_result(form, a, b) or operation(a, b, form, env)

    return lane


add: Final = on_encodings(softfloat.add)
subtract: Final = on_encodings(softfloat.subtract)
multiply: Final = on_encodings(softfloat.multiply)


def _square_root(x: int, y: int, form: Format, env: Environment) -> Result:
    b = decode(y, form, daz=env.daz)
    return nan_result(form, b) or softfloat.square_root(b, form, env)


def _extreme(want_less: bool) -> Lane:
    """MIN and MAX: the source where one is a NaN (invalid) or both are zero."""

    def lane(x: int, y: int, form: Format, env: Environment) -> Result:
        a, b = decode(x, form, daz=env.daz), decode(y, form, daz=env.daz)
        if a.is_nan or b.is_nan:
            return Result(b.bits, Flag.INVALID)
        first = softfloat.is_less(a, b) if want_less else softfloat.is_less(b, a)
        return Result((a if first else b).bits, _denormal(a, b))

    return lane


def _denormal(a: Number, b: Number) -> int:
    return Flag.DENORMAL if a.denormal or b.denormal else 0


_enter("add", _ALL, _SSE, add)
_enter("sub", _ALL, _SSE, subtract)
_enter("mul", _ALL, _SSE, multiply)
_enter("div", _ALL, _SSE, on_encodings(softfloat.divide))
_enter("sqrt", _ALL, _SSE, _square_root)
_enter("min", _ALL, _SSE, _extreme(True))
_enter("max", _ALL, _SSE, _extreme(False))


def _across(name: str, form: Format, pair_up: Callable[[list[int], list[int]], list[Operands]]) -> None:
    """SSE3's instructions that add some lanes and subtract others."""
    width = 8 * form.size

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand = insn.operands
        require_sse(cpu, "sse3")
        env = environment(cpu)
        a, b = lanes(target.read(cpu), width, 128), lanes(read(cpu, operand, 16), width, 128)
        results = [lane(x, y, form, env) for lane, x, y in pair_up(a, b)]
        signal(cpu, results)
        target.write(cpu, join((each.bits for each in results), width))

    semantics(name)(execute)


Operands = tuple[Lane, int, int]


def _alternating(a: list[int], b: list[int]) -> list[Operands]:
    return [
        (add if n % 2 else subtract, x, y) for n, (x, y) in enumerate(zip(a, b, strict=True))
    ]  # fmt: skip


def _neighbours(lane: Lane) -> Callable[[list[int], list[int]], list[Operands]]:
    def pair_up(a: list[int], b: list[int]) -> list[Operands]:
        values = a + b
        return [(lane, x, y) for x, y in zip(values[::2], values[1::2], strict=True)]

    return pair_up


for _end, _form in (("ps", SINGLE), ("pd", DOUBLE)):
    _across(f"addsub{_end}", _form, _alternating)
    _across(f"hadd{_end}", _form, _neighbours(add))
    _across(f"hsub{_end}", _form, _neighbours(subtract))


# --- comparisons ------------------------------------------------------------------------------------------

_LESS, _EQUAL, _GREATER, _UNORDERED = 1, 2, 4, 8
_PREDICATES: Final = (_EQUAL, _LESS, _LESS | _EQUAL, _UNORDERED)
"""The relations that make predicates 0 to 3 true; 4 to 7 are their opposites (SDM vol. 2, CMPPD)."""
_SIGNALING_PREDICATES: Final = frozenset({1, 2, 5, 6})


def relate(a: Number, b: Number, signaling: bool) -> tuple[int, int]:
    """The relation and the exceptions; with ``signaling`` quiet NaNs are invalid, too."""
    if a.is_nan or b.is_nan:
        invalid = signaling or Kind.SIGNALING in {a.kind, b.kind}
        return _UNORDERED, Flag.INVALID if invalid else 0
    flags = _denormal(a, b)
    if softfloat.is_equal(a, b):
        return _EQUAL, flags
    return _LESS if softfloat.is_less(a, b) else _GREATER, flags


def _comparison(predicate: int) -> Lane:
    def lane(x: int, y: int, form: Format, env: Environment) -> Result:
        a, b = decode(x, form, daz=env.daz), decode(y, form, daz=env.daz)
        relation, flags = relate(a, b, predicate in _SIGNALING_PREDICATES)
        true = bool(relation & _PREDICATES[predicate & 3]) != bool(predicate & 4)
        return Result((1 << 8 * form.size) - 1 if true else 0, flags)

    return lane


_COMPARISONS: Final = {
    end: [_lanewise(form, count, _SSE[end], _comparison(predicate)) for predicate in range(8)]
    for end, (form, count) in FORMS.items()
}


@semantics("cmpps", "cmppd", "cmpss", "cmpsd")
def cmp(cpu: Processor, insn: Instruction) -> None:
    """All ones where the predicate, three bits of the immediate, holds."""
    _COMPARISONS[insn.name[3:]][insn.encoding[-1] & 7](cpu, insn)


def _compare_to_flags(name: str, end: str, signaling: bool) -> None:
    """ZF, PF and CF as after an unsigned comparison; all three for unordered."""
    form = FORMS[end][0]

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand = insn.operands
        require_sse(cpu, _SSE[end])
        env = environment(cpu)
        mask = (1 << 8 * form.size) - 1
        a = decode(target.read(cpu) & mask, form, daz=env.daz)
        b = decode(read(cpu, operand, form.size) & mask, form, daz=env.daz)
        relation, flags = relate(a, b, signaling)
        signal(cpu, (Result(0, flags),))
        cpu.rflags = cpu.rflags & ~STATUS | FLAGS_OF[relation]

    semantics(name + end)(execute)


FLAGS_OF: Final = {_LESS: CF, _EQUAL: ZF, _GREATER: 0, _UNORDERED: ZF | PF | CF}

for _end in ("ss", "sd"):
    _compare_to_flags("ucomi", _end, False)
    _compare_to_flags("comi", _end, True)


# --- dot products -----------------------------------------------------------------------------------------


def _dot_product(name: str, form: Format, count: int) -> None:
    """Products of the lanes that the upper half of the immediate chooses, added in pairs, to the lanes that
    its lower half chooses."""
    width = 8 * form.size

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand, immediate = insn.operands
        assert isinstance(immediate, Immediate)
        require_sse(cpu, "sse41")
        env = environment(cpu)
        a, b = lanes(target.read(cpu), width, 128), lanes(read(cpu, operand, 16), width, 128)
        products = [
            multiply(a[n], b[n], form, env) if immediate.value >> 4 + n & 1 else Result(0)
            for n in range(count)
        ]
        signal(cpu, products)
        while len(products) > 1:
            products = [
                add(x.bits, y.bits, form, env) for x, y in zip(products[::2], products[1::2], strict=True)
            ]
            signal(cpu, products)
        chosen = (products[0].bits if immediate.value >> n & 1 else 0 for n in range(count))
        target.write(cpu, join(chosen, width))

    semantics(name)(execute)


_dot_product("dpps", SINGLE, 4)
_dot_product("dppd", DOUBLE, 2)
