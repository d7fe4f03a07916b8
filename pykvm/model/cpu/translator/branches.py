"""Templates of near branches: traces follow them where they lead on within the page."""

from __future__ import annotations

from typing import Final

from pykvm.model.cpu.flags import MASK
from pykvm.model.cpu.instruction import RCX, RSP, Immediate, Instruction
from pykvm.model.cpu.translator.emitter import Emitter
from pykvm.model.cpu.translator.lazyflags import READS
from pykvm.model.cpu.translator.templates import Template

BRANCHES: Final[dict[str, Template]] = {}


def _target(e: Emitter, insn: Instruction) -> int:
    """The target of a relative branch; those that fault go to the interpreter."""
    operand = insn.operands[0]
    if not isinstance(operand, Immediate):
        e.refuse()
    target = e.next_rip + operand.value & (MASK[8] if e.mode.bits == 64 else MASK[4])
    if insn.operand_size == 2:
        target &= 0xFFFF
    if e.mode.bits == 64:
        top = target >> e.mode.canonical_shift
        if top and top != MASK[8] >> e.mode.canonical_shift:
            e.refuse()
    elif not e.mode.code_first <= target <= e.mode.code_last:
        e.refuse()
    return target


def _branch(e: Emitter, condition: str, target: int) -> int | None:
    """A conditional branch: to the start of the trace it closes the loop; else the other way is followed,
    which for a branch back is the less likely one and ends the trace."""
    if target == e.start:
        e.turn(condition)
        e.exit_to(str(e.next_rip))
        return None
    e.exit_to(str(target), condition)
    if target < e.next_rip:
        e.exit_to(str(e.next_rip))
        return None
    return e.next_rip


def _jcc(name: str) -> None:
    def jcc(e: Emitter, insn: Instruction) -> int | None:
        target = _target(e, insn)
        return _branch(e, e.condition(name), target)

    BRANCHES[f"j{name}"] = jcc


for _name in READS:
    _jcc(_name)


def jmp(e: Emitter, insn: Instruction) -> int | None:
    (operand,) = insn.operands
    if not isinstance(operand, Immediate):
        e.emit(f"j{e.index} = {e.read(operand)}")
        _indirect(e, f"j{e.index}", operand.size, insn)
        e.exit_to(f"j{e.index}")
        return None
    target = _target(e, insn)
    if target == e.start:
        e.turn()
        return None
    return target


def _indirect(e: Emitter, target: str, size: int, insn: Instruction) -> None:
    """Leave where an indirect target faults."""
    if size != insn.operand_size or (size == 2 and e.mode.bits == 64):
        e.refuse()
    if e.mode.bits == 64:
        half = 1 << e.mode.canonical_shift
        e.emit(f"if {half} <= {target} < {(1 << 64) - half}: leave()")
    else:
        e.emit(f"if {target} > {e.mode.code_last}: leave()")
    e.leaves()


def call(e: Emitter, insn: Instruction) -> int | None:
    (operand,) = insn.operands
    size = insn.operand_size
    if size == 2 and e.mode.bits != 16:
        e.refuse()
    back = str(e.next_rip & MASK[size])
    if isinstance(operand, Immediate):
        target = _target(e, insn)
        e.push(back, size)
        e.returns.append(back)
        if target == e.start:
            e.exit_to(str(target))
            return None
        return target
    e.emit(f"j{e.index} = {e.read(operand)}")
    _indirect(e, f"j{e.index}", operand.size, insn)
    e.push(back, size)
    e.exit_to(f"j{e.index}")
    return None


def ret(e: Emitter, insn: Instruction) -> int | None:
    """To where the trace's own call came from it goes on; else it ends."""
    size = insn.operand_size
    if size == 2 and e.mode.bits != 16:
        e.refuse()
    value, pointer = e.pop(size)
    _indirect(e, value, size, insn)
    if insn.operands:
        extra = insn.operands[0]
        if not isinstance(extra, Immediate):
            e.refuse()
        pointer = f"({pointer}) + {extra.value} & {MASK[e.mode.stack_size]}"
    e.set_register(RSP, e.mode.stack_size, pointer)
    if e.returns:
        back = e.returns.pop()
        e.exit_to(value, f"{value} != {back}")
        return int(back)
    e.exit_to(value)
    return None


def _loop(name: str, also: str | None) -> None:
    def loop(e: Emitter, insn: Instruction) -> int | None:
        target = _target(e, insn)
        size = insn.address_size
        count = e.set_register(RCX, size, f"{e.register(RCX, size)} - 1 & {MASK[size]}")
        condition = count if also is None else f"{count} and ({e.condition(also)})"
        return _branch(e, condition, target)

    BRANCHES[name] = loop


_loop("loop", None)
_loop("loope", "e")
_loop("loopne", "ne")


def jrcxz(e: Emitter, insn: Instruction) -> int | None:
    return _branch(e, f"not {e.register(RCX, insn.address_size)}", _target(e, insn))


BRANCHES.update(jmp=jmp, call=call, ret=ret, jrcxz=jrcxz)
