"""The sixteen conditions of Jcc, SETcc and CMOVcc (SDM vol. 1, appendix B), and those instructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.branches import jump
from pykvm.model.cpu.flags import CF, OF, PF, SF, ZF
from pykvm.model.cpu.semantics import Execute, semantics

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor


def _less(rflags: int) -> bool:
    """SF differs from OF."""
    return bool(rflags & SF) != bool(rflags & OF)


CONDITIONS: Final[dict[str, Callable[[int], int | bool]]] = {
    "o": lambda rflags: rflags & OF,
    "no": lambda rflags: not rflags & OF,
    "b": lambda rflags: rflags & CF,
    "ae": lambda rflags: not rflags & CF,
    "e": lambda rflags: rflags & ZF,
    "ne": lambda rflags: not rflags & ZF,
    "be": lambda rflags: rflags & (CF | ZF),
    "a": lambda rflags: not rflags & (CF | ZF),
    "s": lambda rflags: rflags & SF,
    "ns": lambda rflags: not rflags & SF,
    "p": lambda rflags: rflags & PF,
    "np": lambda rflags: not rflags & PF,
    "l": _less,
    "ge": lambda rflags: not _less(rflags),
    "le": lambda rflags: rflags & ZF or _less(rflags),
    "g": lambda rflags: not (rflags & ZF or _less(rflags)),
}
"""Whether a condition is met, by RFLAGS; in the order of their encoding (tttn)."""


def _jcc(condition: Callable[[int], int | bool]) -> Execute:
    def execute(cpu: Processor, insn: Instruction) -> None:
        if condition(cpu.rflags):
            jump(cpu, cpu.next_rip + insn.operands[0].read(cpu), insn.operand_size)

    return execute


def _setcc(condition: Callable[[int], int | bool]) -> Execute:
    def execute(cpu: Processor, insn: Instruction) -> None:
        insn.operands[0].write(cpu, 1 if condition(cpu.rflags) else 0)

    return execute


def _cmovcc(condition: Callable[[int], int | bool]) -> Execute:
    def execute(cpu: Processor, insn: Instruction) -> None:
        target, source = insn.operands
        value = source.read(cpu)  # also where it is not wanted: the load may fault
        # A 32-bit target loses its upper half in any case (SDM vol. 2, CMOVcc).
        target.write(cpu, value if condition(cpu.rflags) else target.read(cpu))

    return execute


for _name, _condition in CONDITIONS.items():
    semantics(f"j{_name}")(_jcc(_condition))
    semantics(f"set{_name}")(_setcc(_condition))
    semantics(f"cmov{_name}")(_cmovcc(_condition))
