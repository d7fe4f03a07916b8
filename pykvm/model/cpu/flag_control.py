"""Instructions on single flags, and LAHF and SAHF (SDM vol. 1, 7.3.14; CLI and STI: vol. 3, 6.8.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import AF, CF, DF, IF, PF, SF, ZF
from pykvm.model.cpu.implicit import require
from pykvm.model.cpu.instruction import RAX
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.state import SHADOW_STI
from pykvm.x86.bits import Cr4, Rflags

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_IN_AH: Final = SF | ZF | AF | PF | CF
_VIF: Final = int(Rflags.VIF)
_VIP: Final = int(Rflags.VIP)


@semantics("clc")
def clc(cpu: Processor, insn: Instruction) -> None:
    cpu.rflags &= ~CF


@semantics("stc")
def stc(cpu: Processor, insn: Instruction) -> None:
    cpu.rflags |= CF


@semantics("cmc")
def cmc(cpu: Processor, insn: Instruction) -> None:
    cpu.rflags ^= CF


@semantics("cld")
def cld(cpu: Processor, insn: Instruction) -> None:
    cpu.rflags &= ~DF


@semantics("std")
def std(cpu: Processor, insn: Instruction) -> None:
    cpu.rflags |= DF


@semantics("lahf")
def lahf(cpu: Processor, insn: Instruction) -> None:
    require(not cpu.bits64 or cpu.features.lahf_lm)
    cpu.regs[RAX] = cpu.regs[RAX] & ~0xFF00 | (cpu.rflags & _IN_AH | 2) << 8


@semantics("sahf")
def sahf(cpu: Processor, insn: Instruction) -> None:
    require(not cpu.bits64 or cpu.features.lahf_lm)
    cpu.rflags = cpu.rflags & ~_IN_AH | cpu.regs[RAX] >> 8 & _IN_AH


def _interrupt_flag(cpu: Processor) -> int:
    """Which flag CLI and STI change: IF, or with virtual interrupts VIF; #GP(0) where neither is allowed."""
    if not cpu.protected_mode or cpu.iopl >= cpu.cpl:
        return IF
    if cpu.cr4 & Cr4.VME if cpu.vm86 else cpu.cpl == 3 and cpu.cr4 & Cr4.PVI:
        return _VIF
    raise Fault.gp()


@semantics("cli")
def cli(cpu: Processor, insn: Instruction) -> None:
    cpu.rflags &= ~_interrupt_flag(cpu)


@semantics("sti")
def sti(cpu: Processor, insn: Instruction) -> None:
    """Interrupts are taken after the next instruction only, if they were disabled before."""
    flag = _interrupt_flag(cpu)
    if flag == _VIF and cpu.rflags & _VIP:
        raise Fault.gp()
    if flag == IF and not cpu.rflags & IF:
        cpu.next_shadow = SHADOW_STI
    cpu.rflags |= flag
