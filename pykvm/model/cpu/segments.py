"""Loading segment registers: MOV, POP, LDS and its kin (SDM vol. 2, MOV; vol. 3, 3.4.2 and 5.4 to 5.7)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.descriptors import (
    CODE,
    READABLE,
    error_code,
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
from pykvm.model.cpu.instruction import CS, DS, ES, FS, GS, RSP, SS, Memory, SegmentRegister
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.state import SHADOW_SS
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor


def load_segment(cpu: Processor, number: int, selector: int) -> None:
    """Load ES, SS, DS, FS or GS with its descriptor, as the mode asks."""
    if cpu.real_or_vm86:
        segment = real_segment(cpu, number, selector)
    elif number == SS:
        segment = _stack(cpu, selector)
    else:
        segment = _data(cpu, number, selector)
    cpu.set_segment(number, segment)


def _stack(cpu: Processor, selector: int) -> Segment:
    """SDM vol. 2, MOV: IF SS is loaded.  Null is for 64-bit code below CPL 3."""
    if is_null(selector):
        if not cpu.bits64 or cpu.cpl == 3 or selector & 3 != cpu.cpl:
            raise Fault.gp()
        return null_segment(selector, cpu.cpl)
    error = error_code(selector)
    segment = read_segment(cpu, selector)
    if selector & 3 != cpu.cpl or segment.dpl != cpu.cpl or not is_writable_data(segment):
        raise Fault.gp(error)
    if not segment.present:
        raise Fault.ss(error)
    return mark_accessed(cpu, segment)


def _data(cpu: Processor, number: int, selector: int) -> Segment:
    """SDM vol. 2, MOV: IF DS, ES, FS or GS is loaded."""
    if is_null(selector):
        return _null_data(cpu, number, selector)
    error = error_code(selector)
    segment = read_segment(cpu, selector)
    unreadable = segment.type & CODE and not segment.type & READABLE
    privileged = not is_conforming(segment) and max(cpu.cpl, selector & 3) > segment.dpl
    if not segment.s or unreadable or privileged:
        raise Fault.gp(error)
    if not segment.present:
        raise Fault.np(error)
    return mark_accessed(cpu, segment)


def _null_data(cpu: Processor, number: int, selector: int) -> Segment:
    """AMD's processors keep the bases of FS and GS, which 64-bit code still uses (APM vol. 2, 4.5.3)."""
    segment = null_segment(selector)
    if cpu.features.amd and number in {FS, GS}:
        return replace(segment, base=cpu.segments[number].base)
    return segment


# --- instructions ----------------------------------------------------------------------------------------


def _segment_number(insn: Instruction, position: int) -> int:
    register = insn.operands[position]
    assert isinstance(register, SegmentRegister)
    return register.index


@semantics("mov_sreg")
def mov_sreg(cpu: Processor, insn: Instruction) -> None:
    """To memory 16 bits go, to a register the operand size, zero-extended.  MOV to CS is #UD."""
    target, source = insn.operands
    if isinstance(source, SegmentRegister):
        target.write(cpu, source.read(cpu))
        return
    number = _segment_number(insn, 0)
    if number == CS:
        raise Fault.ud()
    load_segment(cpu, number, source.read(cpu) & 0xFFFF)
    if number == SS:
        cpu.next_shadow = SHADOW_SS


@semantics("push_sreg")
def push_sreg(cpu: Processor, insn: Instruction) -> None:
    """A 32-bit push of Intel's processors writes 16 bits only and leaves the rest of its slot (SDM vol. 2,
    PUSH); AMD's zero-extend the selector (host), as all do in 64-bit mode."""
    selector = insn.operands[0].read(cpu)
    size = insn.operand_size
    if size != 4 or cpu.features.amd:
        cpu.push(selector, size)
        return
    rsp = cpu.regs[RSP]
    sp = rsp - 4 & cpu.stack_mask
    cpu.store(SS, sp, 2, selector)
    cpu.regs[RSP] = sp if cpu.stack_size > 2 else rsp & ~0xFFFF | sp


@semantics("pop_sreg")
def pop_sreg(cpu: Processor, insn: Instruction) -> None:
    """RSP changes after the load of SS, by the old stack's size."""
    number = _segment_number(insn, 0)
    load_segment(cpu, number, cpu.pop(insn.operand_size) & 0xFFFF)
    if number == SS:
        cpu.next_shadow = SHADOW_SS


_FAR_LOADS: Final = {"lds": DS, "les": ES, "lfs": FS, "lgs": GS, "lss": SS}


@semantics(*_FAR_LOADS)
def load_far_pointer(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    if not isinstance(source, Memory):
        raise Fault.ud()
    offset, selector = far_pointer(cpu, source, far_offset_size(cpu, insn))
    load_segment(cpu, _FAR_LOADS[insn.name], selector)
    target.write(cpu, offset)


def far_pointer(cpu: Processor, source: Memory, size: int) -> tuple[int, int]:
    """Offset of ``size`` bytes and selector behind it, from memory: one operand to the segment's limit."""
    at = source.offset(cpu)
    linear = cpu.linear(source.segment, at, size)  # RFLAGS.AC wants the offset aligned, not all of it (host)
    cpu.linear(source.segment, at + size, 2)
    pointer = int.from_bytes(cpu.load_linear(linear, size + 2), "little")
    return pointer & MASK[size], pointer >> 8 * size


def far_offset_size(cpu: Processor, insn: Instruction) -> int:
    """AMD's processors have no far pointers with 64-bit offsets (APM vol. 3, CALL (Far), LFS; host)."""
    return 4 if insn.operand_size == 8 and cpu.features.amd else insn.operand_size
