"""Templates: how an instruction is written in Python.  Each mirrors the semantic function of its name.

Everything that can leave (loads, and the page of a store) comes before anything changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pykvm.model.cpu.flags import MASK, SIGN
from pykvm.model.cpu.instruction import RAX, RBP, RDX, RSP, Immediate, Instruction, Memory, Operand, Register
from pykvm.model.cpu.translator import lazyflags
from pykvm.model.cpu.translator.emitter import Emitter
from pykvm.model.cpu.translator.lazyflags import READS

Template = Callable[[Emitter, Instruction], "int | None"]
"""Emits the lines of an instruction: where the trace goes on, or None where it ends."""

TEMPLATES: Final[dict[str, Template]] = {}


def template(*names: str) -> Callable[[Callable[[Emitter, Instruction], None]], None]:
    """Enter the function as the template of instructions that go on with the next one."""

    def enter(function: Callable[[Emitter, Instruction], None]) -> None:
        def straight(e: Emitter, insn: Instruction) -> int:
            function(e, insn)
            return e.next_rip

        for name in names:
            TEMPLATES[name] = straight

    return enter


def _same_register(one: Operand, other: Operand) -> bool:
    return isinstance(one, Register) and one is other


def _signed(text: str, size: int) -> str:
    """A value of ``size`` bytes as a signed integer."""
    return f"(({text} ^ {SIGN[size]}) - {SIGN[size]})"


def _extended(text: str, size: int, to: int) -> str:
    """Sign-extended from ``size`` bytes to ``to``."""
    return f"(({text} ^ {SIGN[size]}) - {SIGN[size]}) & {MASK[to]}"


# --- moves -----------------------------------------------------------------------------------------------


@template("mov", "movzx", "movnti")
def mov(e: Emitter, insn: Instruction) -> None:
    target, source = insn.operands
    e.write(target, e.read(source))


@template("movsx", "movsxd")
def movsx(e: Emitter, insn: Instruction) -> None:
    target, source = insn.operands
    if target.size == source.size:
        e.write(target, e.read(source))
    else:
        e.write(target, _extended(e.read(source), source.size, target.size))


@template("lea")
def lea(e: Emitter, insn: Instruction) -> None:
    target, source = insn.operands
    assert isinstance(source, Memory)
    text = e.offset(source)
    if source.mask > MASK[target.size]:
        text = f"({text}) & {MASK[target.size]}"
    e.write(target, text)


@template("xchg")
def xchg(e: Emitter, insn: Instruction) -> None:
    first, second = insn.operands
    if isinstance(second, Memory):
        first, second = second, first
    one, put = e.update(first)
    one = e.value(one) if isinstance(first, Memory) else _copy(e, "x", one)
    other = _copy(e, "y", e.read(second))
    put(other)
    e.write(second, one)


def _copy(e: Emitter, letter: str, text: str) -> str:
    """A variable that keeps the value when its register changes."""
    e.emit(f"{letter}{e.index} = {text}")
    return f"{letter}{e.index}"


@template("bswap")
def bswap(e: Emitter, insn: Instruction) -> None:
    (target,) = insn.operands
    if target.size == 2:
        e.refuse()
    e.write(target, f'int.from_bytes({e.read(target)}.to_bytes({target.size}, "little"), "big")')


@template("cbw", "cwde", "cdqe")
def extend_accumulator(e: Emitter, insn: Instruction) -> None:
    half = insn.operand_size // 2
    e.set_register(RAX, insn.operand_size, _extended(e.register(RAX, half), half, insn.operand_size))


@template("cwd", "cdq", "cqo")
def extend_into_rdx(e: Emitter, insn: Instruction) -> None:
    size = insn.operand_size
    e.set_register(RDX, size, f"{MASK[size]} if {e.register(RAX, size)} & {SIGN[size]} else 0")


@template("nop", "pause", "endbr64", "endbr32")
def nop(e: Emitter, insn: Instruction) -> None:
    if insn.rep and insn.name == "nop":
        e.refuse()


# --- arithmetic and logic ---------------------------------------------------------------------------------


@template("add")
def add(e: Emitter, insn: Instruction) -> None:
    target, source = insn.operands
    (old, put), other = e.update(target), e.read(source)
    a, b = e.record("a", old), e.record("b", other)
    result = put(f"{old} + {other} & {MASK[target.size]}")
    e.set_flags(lazyflags.after_add(a, b, e.record("r", result), target.size))


@template("adc")
def adc(e: Emitter, insn: Instruction) -> None:
    target, source = insn.operands
    (old, put), other = e.update(target), e.read(source)
    c = e.carry()
    a, b = e.record("a", old), e.record("b", other)
    put(f"{old} + {other} + c{e.index} & {MASK[target.size]}")
    e.set_flags(lazyflags.after_add_with_carry(a, b, c, target.size))


@template("sub")
def sub(e: Emitter, insn: Instruction) -> None:
    target, source = insn.operands
    (old, put), other = e.update(target), e.read(source)
    a, b = e.record("a", old), e.record("b", other)
    put(f"{old} - {other} & {MASK[target.size]}")
    e.set_flags(lazyflags.after_subtract(a, b, target.size))


@template("sbb")
def sbb(e: Emitter, insn: Instruction) -> None:
    target, source = insn.operands
    (old, put), other = e.update(target), e.read(source)
    c = e.carry()
    a, b = e.record("a", old), e.record("b", other)
    put(f"{old} - {other} - c{e.index} & {MASK[target.size]}")
    e.set_flags(lazyflags.after_subtract_with_borrow(a, b, c, target.size))


@template("cmp")
def cmp(e: Emitter, insn: Instruction) -> None:
    target, source = insn.operands
    old, other = e.read(target), e.read(source)
    a, b = e.record("a", old), e.record("b", other)
    e.set_flags(lazyflags.after_subtract(a, b, target.size))


@template("neg")
def neg(e: Emitter, insn: Instruction) -> None:
    (target,) = insn.operands
    old, put = e.update(target)
    b = e.record("b", old)
    put(f"-{old} & {MASK[target.size]}")
    e.set_flags(lazyflags.after_subtract("0", b, target.size))


@template("not")
def not_(e: Emitter, insn: Instruction) -> None:
    (target,) = insn.operands
    old, put = e.update(target)
    put(f"{old} ^ {MASK[target.size]}")


@template("inc")
def inc(e: Emitter, insn: Instruction) -> None:
    (target,) = insn.operands
    old, put = e.update(target)
    result = put(f"{old} + 1 & {MASK[target.size]}")
    e.set_flags(lazyflags.after_increment(e.record("r", result), target.size))


@template("dec")
def dec(e: Emitter, insn: Instruction) -> None:
    (target,) = insn.operands
    old, put = e.update(target)
    result = put(f"{old} - 1 & {MASK[target.size]}")
    e.set_flags(lazyflags.after_decrement(e.record("r", result), target.size))


def _logic(name: str, operator: str) -> None:
    @template(name)
    def logic(e: Emitter, insn: Instruction) -> None:
        target, source = insn.operands
        if operator == "^" and _same_register(target, source):
            result = e.write(target, "0")
        else:
            (old, put), other = e.update(target), e.read(source)
            result = put(f"{old} {operator} {other}")
        e.set_flags(lazyflags.after_logic(e.record("r", result), target.size))


_logic("and", "&")
_logic("or", "|")
_logic("xor", "^")


@template("test")
def test(e: Emitter, insn: Instruction) -> None:
    first, second = insn.operands
    one, other = e.read(first), e.read(second)
    text = one if _same_register(first, second) else f"{one} & {other}"
    e.set_flags(lazyflags.after_logic(e.record("r", text), first.size))


@template("imul")
def imul(e: Emitter, insn: Instruction) -> None:
    """Two or three operands."""
    if len(insn.operands) == 1:
        e.refuse()
    target = insn.operands[0]
    size = target.size
    factor, other = (_signed(e.read(operand), size) for operand in insn.operands[-2:])
    product = f"v{e.index}"
    e.emit(f"{product} = {factor} * {other}")
    r = e.record("r", product)
    e.write(target, f"{product} & {MASK[size]}")
    e.set_flags(lazyflags.after_multiply(f"not {-SIGN[size]} <= {r} < {SIGN[size]}"))


# --- shifts and rotates by a constant ------------------------------------------------------------------


def _count(e: Emitter, insn: Instruction) -> int:
    """The count as the processor uses it; counts that reach the width go to the interpreter."""
    size = insn.operands[0].size
    count = 1
    if len(insn.operands) > 1:
        operand = insn.operands[1]
        if not isinstance(operand, Immediate):
            e.refuse()
        count = operand.value & (63 if size == 8 else 31)
    if not 0 < count < 8 * size:
        e.refuse()
    return count


def _shift(name: str, text: Callable[[str, int, int], str]) -> None:
    @template(name)
    def shift(e: Emitter, insn: Instruction) -> None:
        target = insn.operands[0]
        count = _count(e, insn)
        old, put = e.update(target)
        a = e.record("a", old)
        result = put(text(old, count, target.size))
        r = e.record("r", result)
        e.set_flags(lazyflags.after_shift(name, a, count, r, target.size))


_shift("shl", lambda old, count, size: f"{old} << {count} & {MASK[size]}")
_shift("sal", lambda old, count, size: f"{old} << {count} & {MASK[size]}")
_shift("shr", lambda old, count, size: f"{old} >> {count}")
_shift("sar", lambda old, count, size: f"{_signed(old, size)} >> {count} & {MASK[size]}")


def _rotate(name: str, left: bool) -> None:
    @template(name)
    def rotate(e: Emitter, insn: Instruction) -> None:
        target = insn.operands[0]
        count, bits = _count(e, insn), 8 * target.size
        old, put = e.update(target)
        a = e.record("a", old)
        up = count if left else bits - count
        put(f"({old} << {up} | {old} >> {bits - up}) & {MASK[target.size]}")
        e.set_flags(lazyflags.after_rotate(name, a, count, target.size))


_rotate("rol", left=True)
_rotate("ror", left=False)


# --- conditions -------------------------------------------------------------------------------------------


def _conditional(name: str) -> None:
    @template(f"set{name}")
    def setcc(e: Emitter, insn: Instruction) -> None:
        e.write(insn.operands[0], f"1 if {e.condition(name)} else 0")

    @template(f"cmov{name}")
    def cmovcc(e: Emitter, insn: Instruction) -> None:
        target, source = insn.operands
        value = e.read(source)
        e.write(target, f"{value} if {e.condition(name)} else {e.read(target)}")


for _name in READS:
    _conditional(_name)


# --- stack ------------------------------------------------------------------------------------------------


@template("push")
def push(e: Emitter, insn: Instruction) -> None:
    (source,) = insn.operands
    if source.size != insn.operand_size:
        e.refuse()
    e.push(e.value(e.read(source)), source.size)


@template("pop")
def pop(e: Emitter, insn: Instruction) -> None:
    (target,) = insn.operands
    if not isinstance(target, Register) or target.size != insn.operand_size:
        e.refuse()
    value, pointer = e.pop(target.size)
    e.set_register(RSP, e.mode.stack_size, pointer)
    e.write(target, value)


@template("leave")
def leave(e: Emitter, insn: Instruction) -> None:
    stack, size = e.mode.stack_size, insn.operand_size
    if stack != size:
        e.refuse()
    frame = e.register(RBP, stack)
    value = e.load(2, frame, size)
    e.set_register(RSP, stack, f"{frame} + {size} & {MASK[stack]}")
    e.set_register(RBP, size, value)
