"""Status flags that are computed only where somebody looks.

An instruction that sets flags leaves a *source*: expressions over variables that recorded its operands and
result.  The *state* at a point of a trace says for each flag which source has it, or None for RFLAGS as they
were at the start of the trace (or of this turn of a loop), which the variable ``f`` holds.  The expressions
for all flags go through ``flags.py`` and the interpreter's shifts, so both sides agree by construction; the
short ones for single flags are what conditions need in a hurry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from pykvm.model.cpu.flags import AF, CF, MASK, OF, PF, SF, SIGN, STATUS, ZF

FLAGS: Final = (CF, PF, AF, ZF, SF, OF)


@dataclass(frozen=True, eq=False)
class Source:
    """Flags of one instruction: ``all`` is an expression for the bits ``defines`` (and maybe others),
    ``bits`` has shorter ones by flag, true where it is set; ``compare`` the operands of a comparison."""

    all: str
    defines: int
    bits: dict[int, str] = field(default_factory=dict)
    compare: tuple[str, str, int] | None = None


State = dict[int, Source | None]


def of_nothing() -> State:
    """All flags are those of RFLAGS."""
    return dict.fromkeys(FLAGS)


def _result_bits(r: str, size: int) -> dict[int, str]:
    return {
        ZF: f"not {r}",
        SF: f"{r} >= {SIGN[size]}",
        PF: f"not ({r} & 255).bit_count() & 1",
    }


def after_add(a: str, b: str, r: str, size: int) -> Source:
    """ADD and what is like it."""
    bits = _result_bits(r, size) | {CF: f"{r} < {a}", OF: f"({a} ^ {r}) & ({b} ^ {r}) & {SIGN[size]}"}
    return Source(f"add({a}, {b}, 0, {size})[1]", STATUS, bits)


def after_add_with_carry(a: str, b: str, c: str, size: int) -> Source:
    """ADC."""
    return Source(f"add({a}, {b}, {c}, {size})[1]", STATUS, {CF: f"{a} + {b} + {c} > {MASK[size]}"})


def after_subtract(a: str, b: str, size: int) -> Source:
    """SUB, CMP, NEG: the result is not needed."""
    r = f"{a} - {b} & {MASK[size]}"
    bits = {
        CF: f"{a} < {b}",
        ZF: f"{a} == {b}",
        SF: f"{a} - {b} & {SIGN[size]}",
        PF: f"not ({a} - {b} & 255).bit_count() & 1",
        OF: f"({a} ^ {b}) & ({a} ^ ({r})) & {SIGN[size]}",
    }
    return Source(f"subtract({a}, {b}, 0, {size})[1]", STATUS, bits, (a, b, size))


def after_subtract_with_borrow(a: str, b: str, c: str, size: int) -> Source:
    """SBB."""
    return Source(f"subtract({a}, {b}, {c}, {size})[1]", STATUS, {CF: f"{a} < {b} + {c}"})


def after_increment(r: str, size: int) -> Source:
    """INC: CF stays."""
    bits = _result_bits(r, size) | {OF: f"{r} == {SIGN[size]}"}
    return Source(f"add({r} - 1 & {MASK[size]}, 1, 0, {size})[1]", STATUS & ~CF, bits)


def after_decrement(r: str, size: int) -> Source:
    """DEC: CF stays."""
    bits = _result_bits(r, size) | {OF: f"{r} == {SIGN[size] - 1}"}
    return Source(f"subtract({r} + 1 & {MASK[size]}, 1, 0, {size})[1]", STATUS & ~CF, bits)


def after_logic(r: str, size: int) -> Source:
    """AND, OR, XOR, TEST."""
    return Source(f"logic({r}, {size})", STATUS, _result_bits(r, size) | {CF: "False", OF: "False"})


def after_shift(name: str, a: str, count: int, r: str, size: int) -> Source:
    """SHL, SHR, SAR by a constant that is not zero."""
    return Source(f"shifted({name!r}, {a}, {count}, {size})", STATUS, _result_bits(r, size))


def after_rotate(name: str, a: str, count: int, size: int) -> Source:
    """ROL, ROR by a constant that is not zero: CF and OF only."""
    return Source(f"shifted({name!r}, {a}, {count}, {size})", CF | OF)


def after_multiply(overflow: str) -> Source:
    """MUL, IMUL: CF and OF only."""
    return Source(f"({CF | OF} if {overflow} else 0)", CF | OF, {CF: overflow, OF: overflow})


def materialised(state: State, flags: Iterable[int] = FLAGS) -> tuple[int, str]:
    """The mask of those ``flags`` that have a source, and an expression for their bits."""
    masks: dict[Source, int] = {}
    for flag in flags:
        source = state[flag]
        if source is not None:
            masks[source] = masks.get(source, 0) | flag
    parts = [f"{source.all} & {mask}" for source, mask in masks.items()]
    return sum(masks.values()), " | ".join(parts)


def bit(state: State, flag: int) -> str:
    """An expression that is true where the flag is set."""
    source = state[flag]
    if source is None:
        return f"f & {flag}"
    return source.bits.get(flag) or f"{source.all} & {flag}"


def _either(state: State, first: int, second: int) -> str:
    return f"({bit(state, first)}) or ({bit(state, second)})"


def _less(state: State) -> str:
    if bit(state, OF) == "False":
        return bit(state, SF)
    return f"(not ({bit(state, SF)})) != (not ({bit(state, OF)}))"


def _not(text: str) -> str:
    return f"not ({text})"


_CONDITIONS: Final[dict[str, Callable[[State], str]]] = {
    "o": lambda state: bit(state, OF),
    "no": lambda state: _not(bit(state, OF)),
    "b": lambda state: bit(state, CF),
    "ae": lambda state: _not(bit(state, CF)),
    "e": lambda state: bit(state, ZF),
    "ne": lambda state: _not(bit(state, ZF)),
    "be": lambda state: _either(state, CF, ZF),
    "a": lambda state: _not(_either(state, CF, ZF)),
    "s": lambda state: bit(state, SF),
    "ns": lambda state: _not(bit(state, SF)),
    "p": lambda state: bit(state, PF),
    "np": lambda state: _not(bit(state, PF)),
    "l": _less,
    "ge": lambda state: _not(_less(state)),
    "le": lambda state: f"({bit(state, ZF)}) or ({_less(state)})",
    "g": lambda state: _not(f"({bit(state, ZF)}) or ({_less(state)})"),
}

_UNSIGNED: Final = {"b": "<", "ae": ">=", "e": "==", "ne": "!=", "be": "<=", "a": ">"}
_SIGNED: Final = {"l": "<", "ge": ">=", "le": "<=", "g": ">"}

READS: Final = {
    "o": OF, "no": OF, "b": CF, "ae": CF, "e": ZF, "ne": ZF, "be": CF | ZF, "a": CF | ZF, "s": SF, "ns": SF,
    "p": PF, "np": PF, "l": SF | OF, "ge": SF | OF, "le": SF | OF | ZF, "g": SF | OF | ZF,
}  # fmt: skip
"""The flags that a condition reads."""


def condition(state: State, name: str) -> str:
    """An expression that is true where the condition holds.  After a comparison it is one, too."""
    sources = {state[flag] for flag in FLAGS if READS[name] & flag}
    if len(sources) == 1:
        (source,) = sources
        if source is not None and source.compare is not None:
            a, b, size = source.compare
            if name in _UNSIGNED:
                return f"{a} {_UNSIGNED[name]} {b}"
            if name in _SIGNED:
                return f"({a} ^ {SIGN[size]}) {_SIGNED[name]} ({b} ^ {SIGN[size]})"
        if source is not None and name == "ne" and source.bits.get(ZF, "").startswith("not "):
            return source.bits[ZF].removeprefix("not ")
    return _CONDITIONS[name](state)
