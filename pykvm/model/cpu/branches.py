"""Near transfers of control (SDM vol. 1, 7.3.8).  Far ones are in transfers.py, Jcc in conditions.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import ZF
from pykvm.model.cpu.implicit import get, put
from pykvm.model.cpu.instruction import CS, RCX, RSP, Immediate
from pykvm.model.cpu.semantics import semantics

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor


def jump(cpu: Processor, target: int, operand_size: int) -> None:
    """Go on at ``target`` in the same code segment, cut to the operand size.

    #GP(0) outside the segment's limit, or where the address is not canonical (SDM vol. 2, JMP).
    """
    target &= 0xFFFF if operand_size == 2 else cpu.ip_mask
    if cpu.bits64:
        top = target >> cpu.canonical_shift
        if top and top != 0xFFFFFFFFFFFFFFFF >> cpu.canonical_shift:
            raise Fault.gp()
    elif target > cpu.windows[CS].last:
        raise Fault.gp()
    cpu.next_rip = target


def _target(cpu: Processor, insn: Instruction) -> int:
    """Where JMP or CALL goes: relative to the next instruction, or what the operand holds."""
    (operand,) = insn.operands
    value = operand.read(cpu)
    return cpu.next_rip + value if isinstance(operand, Immediate) else value


@semantics("jmp")
def jmp(cpu: Processor, insn: Instruction) -> None:
    jump(cpu, _target(cpu, insn), insn.operand_size)


@semantics("call")
def call(cpu: Processor, insn: Instruction) -> None:
    back = cpu.next_rip
    jump(cpu, _target(cpu, insn), insn.operand_size)
    cpu.push(back & (0xFFFF if insn.operand_size == 2 else cpu.ip_mask), insn.operand_size)


@semantics("ret")
def ret(cpu: Processor, insn: Instruction) -> None:
    jump(cpu, cpu.pop(insn.operand_size), insn.operand_size)
    if insn.operands:
        stack = get(cpu, RSP, cpu.stack_size) + insn.operands[0].read(cpu)
        put(cpu, RSP, cpu.stack_size, stack & cpu.stack_mask)


def _count_down(cpu: Processor, insn: Instruction) -> int:
    """The count register (rCX of the address size) less one."""
    count = get(cpu, RCX, insn.address_size) - 1 & insn.address_mask
    put(cpu, RCX, insn.address_size, count)
    return count


def _jump_short(cpu: Processor, insn: Instruction) -> None:
    jump(cpu, cpu.next_rip + insn.operands[0].read(cpu), insn.operand_size)


@semantics("loop")
def loop(cpu: Processor, insn: Instruction) -> None:
    if _count_down(cpu, insn):
        _jump_short(cpu, insn)


@semantics("loope")
def loope(cpu: Processor, insn: Instruction) -> None:
    if _count_down(cpu, insn) and cpu.rflags & ZF:
        _jump_short(cpu, insn)


@semantics("loopne")
def loopne(cpu: Processor, insn: Instruction) -> None:
    if _count_down(cpu, insn) and not cpu.rflags & ZF:
        _jump_short(cpu, insn)


@semantics("jrcxz")
def jrcxz(cpu: Processor, insn: Instruction) -> None:
    """JCXZ, JECXZ, JRCXZ: by the address size."""
    if not get(cpu, RCX, insn.address_size):
        _jump_short(cpu, insn)
