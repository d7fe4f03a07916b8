"""Differences that are understood: what the SDM leaves open, and where a KVM is wrong.

Each has its evidence; docs/kvm-findings.md tells more about those of KVM.  A rule is as narrow as what was
seen: whatever no rule matches is reported.
"""

from __future__ import annotations

from typing import Final

from pykvm.crosscheck.instructions import known_kvm, known_open
from pykvm.crosscheck.instructions.case import InstructionCase, Outcome
from pykvm.crosscheck.instructions.rule import TABLE, Known, opcode_of

__all__ = ["TABLE", "explanation"]

_MODULES: Final = (known_open, known_kvm)  # their import has filled the table


def explanation(who: str, case: InstructionCase, model: Outcome, other: Outcome) -> Known | None:
    """The first rule that explains why ``other``, which is ``who``'s, differs from the model's outcome."""
    opcode = opcode_of(case)
    for each in TABLE:
        if each.who in {who, "any"} and each.applies(case, opcode, model, other):
            return each
    return None
