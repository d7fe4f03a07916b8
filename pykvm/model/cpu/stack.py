"""PUSH, POP and their relatives (SDM vol. 1, 6.2 and 6.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import DF, IF, MASK, STATUS, TF
from pykvm.model.cpu.implicit import get, put
from pykvm.model.cpu.instruction import RBP, RSP, SS
from pykvm.model.cpu.semantics import semantics
from pykvm.x86.bits import Cr4, Rflags

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_VM_AND_RF: Final = int(Rflags.VM | Rflags.RF)
_VIF: Final = int(Rflags.VIF)
_VIP: Final = int(Rflags.VIP)
_IOPL: Final = int(Rflags.IOPL3)
_POPPED: Final = STATUS | TF | DF | int(Rflags.NT | Rflags.AC | Rflags.ID)
"""The flags that POPF changes at any privilege; IF and IOPL depend on it."""


@semantics("push")
def push(cpu: Processor, insn: Instruction) -> None:
    """The operand is read first: PUSH rSP pushes the old value."""
    (source,) = insn.operands
    cpu.push(source.read(cpu), insn.operand_size)


@semantics("pop")
def pop(cpu: Processor, insn: Instruction) -> None:
    """An address that uses rSP is computed with its new value (SDM vol. 2, POP)."""
    (target,) = insn.operands
    target.write(cpu, cpu.pop(insn.operand_size))


@semantics("pusha")
def pusha(cpu: Processor, insn: Instruction) -> None:
    """PUSHA, PUSHAD: the eight registers in their order, with the old rSP."""
    for value in tuple(cpu.regs[:8]):
        cpu.push(value & MASK[insn.operand_size], insn.operand_size)


@semantics("popa")
def popa(cpu: Processor, insn: Instruction) -> None:
    """POPA, POPAD: the same backwards; the slot of rSP is skipped, not read."""
    size = insn.operand_size
    for register in range(7, -1, -1):
        if register == RSP:
            put(cpu, RSP, cpu.stack_size, cpu.regs[RSP] + size & cpu.stack_mask)
        else:
            put(cpu, register, size, cpu.pop(size))


@semantics("pushf")
def pushf(cpu: Processor, insn: Instruction) -> None:
    """PUSHF, PUSHFD, PUSHFQ; VM and RF are pushed as zeros (SDM vol. 2, PUSHF)."""
    image = cpu.rflags & ~_VM_AND_RF
    if cpu.vm86 and cpu.iopl < 3:
        if insn.operand_size != 2 or not cpu.cr4 & Cr4.VME:
            raise Fault.gp()
        # With virtual-mode extensions the program sees VIF as its IF, and IOPL as 3.
        image = image & ~IF | _IOPL | (IF if cpu.rflags & _VIF else 0)
    cpu.push(image & MASK[insn.operand_size], insn.operand_size)


@semantics("popf")
def popf(cpu: Processor, insn: Instruction) -> None:
    """POPF, POPFD, POPFQ (SDM vol. 2, POPF, table "Effect of POPF")."""
    if cpu.vm86 and cpu.iopl < 3:
        _popf_with_vme(cpu, insn)
        return
    value = cpu.pop(insn.operand_size)
    changeable = _POPPED
    if cpu.cpl <= cpu.iopl:
        changeable |= IF
    if cpu.cpl == 0 and not cpu.vm86:
        changeable |= _IOPL
    changeable &= MASK[insn.operand_size]
    rest = cpu.rflags & ~changeable & ~int(Rflags.RF)
    cpu.set_rflags(rest | value & changeable)


def _popf_with_vme(cpu: Processor, insn: Instruction) -> None:
    """POPF in virtual-8086 mode with IOPL below 3: IF goes to VIF."""
    if insn.operand_size != 2 or not cpu.cr4 & Cr4.VME:
        raise Fault.gp()
    value = cpu.pop(2)
    if value & TF or (value & IF and cpu.rflags & _VIP):
        raise Fault.gp()
    changeable = (_POPPED & 0xFFFF) | _VIF
    value = value & ~_VIF | (_VIF if value & IF else 0)
    cpu.set_rflags(cpu.rflags & ~changeable | value & changeable)


@semantics("enter")
def enter(cpu: Processor, insn: Instruction) -> None:
    """ENTER: a stack frame with a display of up to 31 outer frames (SDM vol. 2, ENTER)."""
    size, stack = insn.operand_size, cpu.stack_size
    area, level = (operand.read(cpu) for operand in insn.operands)
    cpu.push(get(cpu, RBP, size), size)
    frame = get(cpu, RSP, stack)
    outer = get(cpu, RBP, stack)
    level %= 32
    for _ in range(1, level):
        outer = outer - size & cpu.stack_mask
        cpu.push(cpu.load(SS, outer, size), size)
    if level:
        cpu.push(frame & MASK[size], size)
    put(cpu, RBP, size, frame & MASK[size])
    put(cpu, RSP, stack, get(cpu, RSP, stack) - area & cpu.stack_mask)
    # The new top must be writable although nothing is stored there (SDM vol. 2, ENTER, exceptions).
    cpu.require_writable(SS, get(cpu, RSP, stack), size)


@semantics("leave")
def leave(cpu: Processor, insn: Instruction) -> None:
    put(cpu, RSP, cpu.stack_size, get(cpu, RBP, cpu.stack_size))
    put(cpu, RBP, insn.operand_size, cpu.pop(insn.operand_size))
