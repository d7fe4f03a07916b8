"""IRET (SDM vol. 2, IRET/IRETD/IRETQ), one function for each section of its pseudo-code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import tasks
from pykvm.model.cpu.descriptors import (
    error_code,
    is_code,
    is_conforming,
    is_null,
    is_writable_data,
    mark_accessed,
    null_segment,
    read_segment,
    real_segment,
)
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import MASK
from pykvm.model.cpu.instruction import CS, DS, ES, FS, GS, RSP, SS
from pykvm.model.cpu.semantics import semantics
from pykvm.x86.bits import Cr4, Rflags
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_TF, _IF, _NT, _RF, _VM, _AC, _VIF, _VIP, _ID = (
    int(bit)
    for bit in (
        Rflags.TF, Rflags.IF, Rflags.NT, Rflags.RF, Rflags.VM, Rflags.AC, Rflags.VIF, Rflags.VIP, Rflags.ID,
    )
)  # fmt: skip
_IOPL: Final = int(Rflags.IOPL3)
_USUAL: Final = 0xDD5 | _NT
"""CF, PF, AF, ZF, SF, TF, DF, OF and NT: every IRET loads them."""


@semantics("iret")
def iret(cpu: Processor, insn: Instruction) -> None:
    size = insn.operand_size
    if not cpu.protected_mode:
        _return_real(cpu, size)
    elif cpu.vm86:
        _return_in_vm86(cpu, size)
    elif cpu.rflags & _NT:
        if cpu.long_mode:
            raise Fault.gp()
        tasks.return_from_task(cpu)
    else:
        _return_protected(cpu, size)
    cpu.nmi_masked = False


def _load_flags(cpu: Processor, image: int, writable: int, size: int) -> None:
    """RFLAGS from the stack, as far as ``writable`` and the operand size go."""
    writable &= MASK[size]
    cpu.set_rflags(cpu.rflags & ~writable | image & writable)


def _return_real(cpu: Processor, size: int) -> None:
    """REAL-ADDRESS-MODE."""
    rip, selector, image = cpu.pop(size), cpu.pop(size) & 0xFFFF, cpu.pop(size)
    if rip > cpu.segments[CS].limit:
        raise Fault.gp()
    cpu.set_segment(CS, real_segment(cpu, CS, selector))
    _load_flags(cpu, image, _USUAL | _IF | _IOPL | _RF | _AC | _ID, size)
    cpu.next_rip = rip


def _return_in_vm86(cpu: Processor, size: int) -> None:
    """RETURN-FROM-VIRTUAL-8086-MODE, with the extensions of CR4.VME (SDM vol. 3, 21.3 and table 21-2)."""
    if cpu.iopl < 3 and not (cpu.cr4 & Cr4.VME and size == 2):
        raise Fault.gp()
    rip, selector, image = cpu.pop(size), cpu.pop(size) & 0xFFFF, cpu.pop(size)
    if rip > 0xFFFF:
        raise Fault.gp()
    if cpu.iopl == 3:
        _load_flags(cpu, image, _USUAL | _IF | _RF | _AC | _ID, size)
    else:
        if image & _TF or (image & _IF and cpu.rflags & _VIP):
            raise Fault.gp()
        _load_flags(cpu, image, _USUAL, 2)
        cpu.rflags = cpu.rflags & ~_VIF | (_VIF if image & _IF else 0)
    cpu.set_segment(CS, real_segment(cpu, CS, selector))
    cpu.next_rip = rip


def _return_protected(cpu: Processor, size: int) -> None:
    """PROTECTED-MODE-RETURN and IA-32e-MODE-RETURN."""
    rip, selector, image = cpu.pop(size), cpu.pop(size) & 0xFFFF, cpu.pop(size)
    if size == 4 and image & _VM and cpu.cpl == 0 and not cpu.long_mode:
        _return_to_vm86(cpu, rip, selector, image)
        return
    code = return_code(cpu, selector)
    cpl = cpu.cpl
    if selector & 3 > cpl or cpu.bits64:
        _return_with_stack(cpu, code, rip, size)
    else:
        check_target(cpu, code, rip)
        cpu.set_segment(CS, code)
    writable = _USUAL | _RF | _AC | _ID
    if cpl <= cpu.iopl:
        writable |= _IF
    if cpl == 0:
        writable |= _IOPL | _VIF | _VIP
    _load_flags(cpu, image, writable, size)
    cpu.next_rip = rip


def return_code(cpu: Processor, selector: int) -> Segment:
    """CS from the stack of IRET or a far RET, checked."""
    if is_null(selector):
        raise Fault.gp()
    error = error_code(selector)
    code = read_segment(cpu, selector)
    rpl = selector & 3
    privileged = code.dpl > rpl if is_conforming(code) else code.dpl != rpl
    if not is_code(code) or rpl < cpu.cpl or privileged or (cpu.long_mode and code.l and code.db):
        raise Fault.gp(error)
    if not code.present:
        raise Fault.np(error)
    return mark_accessed(cpu, code)


def check_target(cpu: Processor, code: Segment, rip: int) -> None:
    """#GP(0) for a target outside its code segment, or not canonical in 64-bit code."""
    inside = cpu.is_canonical(rip) if cpu.long_mode and code.l else rip <= code.limit
    if not inside:
        raise Fault.gp()


def return_stack(cpu: Processor, selector: int, code: Segment) -> Segment:
    """SS from the stack for the privilege level of ``code``'s selector, checked."""
    cpl = code.selector & 3
    if is_null(selector):
        if not (cpu.long_mode and code.l and cpl != 3):
            raise Fault.gp()
        return null_segment(selector, cpl)
    error = error_code(selector)
    stack = read_segment(cpu, selector)
    if selector & 3 != cpl or stack.dpl != cpl or not is_writable_data(stack):
        raise Fault.gp(error)
    if not stack.present:
        raise Fault.ss(error)
    return mark_accessed(cpu, stack)


def _return_with_stack(cpu: Processor, code: Segment, rip: int, size: int) -> None:
    """SS:RSP come from the stack, too: RETURN-TO-OUTER-PRIVILEGE-LEVEL, and always in 64-bit mode."""
    rsp, selector = cpu.pop(size), cpu.pop(size) & 0xFFFF
    stack = return_stack(cpu, selector, code)
    check_target(cpu, code, rip)
    outer = code.selector & 3 > cpu.cpl
    load_stack(cpu, code, stack, rsp)
    if outer:
        release_data_segments(cpu)


def load_stack(cpu: Processor, code: Segment, stack: Segment, rsp: int) -> None:
    """CS and SS at once, then as much of RSP as the new stack uses."""
    cpu.segments[CS] = code
    cpu.set_segment(SS, stack)
    if cpu.stack_size == 2:
        rsp = cpu.regs[RSP] & ~0xFFFF | rsp & 0xFFFF
    cpu.regs[RSP] = rsp


def release_data_segments(cpu: Processor) -> None:
    """Null what the outer level may not use (SDM vol. 3, 5.8.6)."""
    for number in (ES, DS, FS, GS):
        segment = cpu.segments[number]
        if not segment.unusable and segment.dpl < cpu.cpl and not is_conforming(segment):
            cpu.set_segment(number, null_segment(0))


def _return_to_vm86(cpu: Processor, rip: int, selector: int, image: int) -> None:
    """RETURN-TO-VIRTUAL-8086-MODE: the whole EFLAGS image counts."""
    rsp = cpu.pop(4)
    selectors = {number: cpu.pop(4) & 0xFFFF for number in (SS, ES, DS, FS, GS)}
    if rip > 0xFFFF:
        raise Fault.gp()
    _load_flags(cpu, image, _USUAL | _IF | _IOPL | _RF | _VM | _AC | _VIF | _VIP | _ID, 4)
    for number, value in {CS: selector, **selectors}.items():
        cpu.segments[number] = real_segment(cpu, number, value)
    cpu.update_mode()
    cpu.regs[RSP] = rsp
    cpu.next_rip = rip
