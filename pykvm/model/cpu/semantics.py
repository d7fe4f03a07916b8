"""The table from an instruction's name to what it does.

A semantic function gets the processor and the decoded instruction, reads its operands, and writes results.
It need not care about undoing: if anything in it raises a fault, general registers, flags and segment
registers are put back and its stores never happen.  Everything else (control registers, MSRs, XMM, x87) it
must change last, when nothing can fail any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

Execute = Callable[["Processor", "Instruction"], None]
Undefined = Callable[["Processor", "Instruction"], int]


@dataclass(frozen=True, slots=True)
class Semantics:
    """What an instruction does.

    ``undefined``: the RFLAGS bits that the SDM leaves undefined after it, or a function that tells them from
    the state before it (shifts depend on their count).  ``lockable``: LOCK is allowed with a memory
    destination (SDM vol. 2, LOCK); others raise #UD.
    """

    execute: Execute
    undefined: int | Undefined = 0
    lockable: bool = False

    def undefined_flags(self, cpu: Processor, insn: Instruction) -> int:
        """The undefined RFLAGS bits, asked before the execution."""
        return self.undefined if isinstance(self.undefined, int) else self.undefined(cpu, insn)


TABLE: Final[dict[str, Semantics]] = {}
"""By capstone's instruction name, after the corrections of decode.py."""


def semantics(
    *names: str, undefined: int | Undefined = 0, lockable: bool = False
) -> Callable[[Execute], Execute]:
    """Enter the function into the table under these names."""

    def enter(function: Execute) -> Execute:
        for name in names:
            assert name not in TABLE, f"{name} has semantics already"
            TABLE[name] = Semantics(function, undefined, lockable)
        return function

    return enter
