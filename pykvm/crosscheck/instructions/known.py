"""Differences that are understood: what the SDM leaves open, and where a KVM is wrong.

Each has its evidence; docs/kvm-findings.md tells more about those of KVM.  A rule is as narrow as what was
seen: whatever no rule matches is reported.
"""

from __future__ import annotations

from typing import Final

from pykvm.crosscheck.instructions import known_kvm, known_open, known_tcg
from pykvm.crosscheck.instructions.case import InstructionCase, Outcome
from pykvm.crosscheck.instructions.rule import TABLE, Known, opcode_of
from pykvm.machine.emulation import QEMU_TCG, emulator

__all__ = ["TABLE", "explanation"]

_MODULES: Final = (known_open, known_kvm, known_tcg)  # their import has filled the table


def explanation(who: str, case: InstructionCase, model: Outcome, other: Outcome) -> Known | None:
    """The first rule that explains why ``other``, which is ``who``'s, differs from the model's outcome.

    In a lab KVM runs all code on the processor, so that the rules of KVM's emulator explain nothing there but
    real mode on Intel's; where the processor is QEMU's TCG, its bugs are KVM's guests' and the host's.
    """
    processor = emulator()
    applying = {who, "any"}
    if processor == QEMU_TCG:
        applying.add("tcg")
    if processor and (processor == QEMU_TCG or case.mode != 16):
        applying.discard("kvm")
    opcode = opcode_of(case)
    for each in TABLE:
        if each.who in applying and each.applies(case, opcode, model, other):
            return each
    return None
