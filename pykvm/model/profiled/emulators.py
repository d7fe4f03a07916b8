"""Where emulators that carry a host deviate from its processor (pykvm.profiles.Execution, labs.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.instruction import ControlRegister
from pykvm.profiles import Execution, Paging, Profile
from pykvm.x86.bits import Cr0

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.profiled.processor import HostProcessor

_FLUSHES: Final = frozenset({"clflush", "clflushopt", "clwb"})
_SELECTIVE: Final = ~int(Cr0.TS | Cr0.MP)
"""SVM's intercept of selective writes to CR0 leaves these two bits to the guest."""


def reads_first(profile: Profile) -> bool:
    """Whether an instruction that reads and writes an operand faults as a read first."""
    return profile.execution is Execution.TCG


def skips(profile: Profile, insn: Instruction) -> bool:
    """Whether an instruction is a NOP that accesses nothing."""
    return profile.execution is Execution.TCG and insn.name in _FLUSHES


def skip(cpu: HostProcessor, insn: Instruction) -> None:
    """Go on to the next instruction."""
    cpu.rip = cpu.rip + insn.length & cpu.ip_mask
    cpu.instructions += 1


def lacks_assist(cpu: HostProcessor, profile: Profile, insn: Instruction) -> bool:
    """Whether an intercepted MOV of a control register is KVM's emulator's: SVM without DecodeAssists.

    With nested paging CR3 is the guest's own, and CR0 is as long as nothing but TS and MP changes.
    """
    if profile.execution is not Execution.TCG or insn.name != "mov_cr" or cpu.cpl:
        return False
    target, source = insn.operands
    register = target if isinstance(target, ControlRegister) else source
    assert isinstance(register, ControlRegister)
    writes = register is target
    if register.index == 4 or profile.paging is not Paging.NPT:
        return register.index in (0, 3, 4)
    return register.index == 0 and writes and bool((source.read(cpu) ^ cpu.cr0) & _SELECTIVE)
