"""Far JMP, CALL and RET (SDM vol. 2, JMP, CALL, RET; vol. 3, 5.8)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import call_gates, tasks
from pykvm.model.cpu.descriptors import (
    System,
    error_code,
    gate_of,
    is_code,
    is_conforming,
    is_null,
    mark_accessed,
    read_descriptor,
    real_segment,
    segment_of,
)
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import MASK
from pykvm.model.cpu.implicit import get, put
from pykvm.model.cpu.instruction import CS, RSP, Memory
from pykvm.model.cpu.iret import check_target, load_stack, release_data_segments, return_code, return_stack
from pykvm.model.cpu.segments import far_offset_size, far_pointer
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.stacks import push_all
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_CALL_GATES: Final = frozenset({System.CALL16, System.CALL32})
_TSS: Final = frozenset({System.TSS16, System.TSS16_BUSY, System.TSS32, System.TSS32_BUSY})


def _destination(cpu: Processor, insn: Instruction, size: int) -> tuple[int, int]:
    """Selector and offset."""
    source = insn.operands[0]
    if isinstance(source, Memory):
        offset, selector = far_pointer(cpu, source, size)
        return selector, offset
    if len(insn.operands) != 2:
        raise Fault.ud()  # FF /3 and /5 have no register form
    return source.read(cpu), insn.operands[1].read(cpu) & MASK[size]


@semantics("ljmp")
def jmp_far(cpu: Processor, insn: Instruction) -> None:
    selector, offset = _destination(cpu, insn, far_offset_size(cpu, insn))
    if cpu.real_or_vm86:
        _load_real_code(cpu, selector, offset)
        return
    code = _far_target(cpu, selector, call=False)
    if code is not None:
        check_target(cpu, code, offset)
        cpu.set_segment(CS, code)
        cpu.next_rip = offset


@semantics("lcall")
def call_far(cpu: Processor, insn: Instruction) -> None:
    size = far_offset_size(cpu, insn)
    selector, offset = _destination(cpu, insn, size)
    frame = (cpu.segments[CS].selector, cpu.next_rip)
    if cpu.real_or_vm86:
        push_all(cpu, frame, size)
        _load_real_code(cpu, selector, offset)
        return
    code = _far_target(cpu, selector, call=True)
    if code is not None:
        push_all(cpu, frame, size)
        check_target(cpu, code, offset)
        cpu.set_segment(CS, code)
        cpu.next_rip = offset


def _load_real_code(cpu: Processor, selector: int, offset: int) -> None:
    if offset > cpu.segments[CS].limit:
        raise Fault.gp()
    cpu.set_segment(CS, real_segment(cpu, CS, selector))
    cpu.next_rip = offset


def _far_target(cpu: Processor, selector: int, *, call: bool) -> Segment | None:
    """The code segment to go to; None when a gate or TSS has done the transfer."""
    if is_null(selector):
        raise Fault.gp()
    raw = read_descriptor(cpu, selector)
    segment = segment_of(selector, raw)
    if is_code(segment):
        return _direct_target(cpu, segment)
    error = error_code(selector)
    if segment.s:
        raise Fault.gp(error)
    privileged = max(cpu.cpl, selector & 3) > segment.dpl
    if segment.type in _CALL_GATES and not (cpu.long_mode and segment.type == System.CALL16):
        call_gates.transfer(cpu, selector, call=call)
    elif segment.type in _TSS and not cpu.long_mode:
        if privileged:
            raise Fault.gp(error)
        tasks.switch_by_transfer(cpu, selector, call=call)
    elif segment.type == System.TASK and not cpu.long_mode:
        if privileged:
            raise Fault.gp(error)
        if not segment.present:
            raise Fault.np(error)
        tasks.switch_by_transfer(cpu, gate_of(raw).selector, call=call)
    else:
        raise Fault.gp(error)
    return None


def _direct_target(cpu: Processor, code: Segment) -> Segment:
    """CONFORMING-CODE-SEGMENT and NONCONFORMING-CODE-SEGMENT: the CPL stays."""
    error = error_code(code.selector)
    if is_conforming(code):
        privileged = code.dpl > cpu.cpl
    else:
        privileged = code.selector & 3 > cpu.cpl or code.dpl != cpu.cpl
    if privileged or (cpu.long_mode and code.l and code.db):
        raise Fault.gp(error)
    if not code.present:
        raise Fault.np(error)
    return replace(mark_accessed(cpu, code), selector=code.selector & ~3 | cpu.cpl)


@semantics("retf", "retfq")
def ret_far(cpu: Processor, insn: Instruction) -> None:
    """The immediate releases parameters, to an outer level on both stacks."""
    size = insn.operand_size
    released = insn.operands[0].read(cpu) & 0xFFFF if insn.operands else 0
    rip, selector = cpu.pop(size), cpu.pop(size) & 0xFFFF
    if cpu.real_or_vm86:
        _load_real_code(cpu, selector, rip)
        _release(cpu, released)
        return
    code = return_code(cpu, selector)
    check_target(cpu, code, rip)
    _release(cpu, released)
    if selector & 3 > cpu.cpl:
        rsp, stack_selector = cpu.pop(size), cpu.pop(size) & 0xFFFF
        load_stack(cpu, code, return_stack(cpu, stack_selector, code), rsp)
        release_data_segments(cpu)
        _release(cpu, released)
    else:
        cpu.set_segment(CS, code)
    cpu.next_rip = rip


def _release(cpu: Processor, count: int) -> None:
    put(cpu, RSP, cpu.stack_size, get(cpu, RSP, cpu.stack_size) + count & cpu.stack_mask)
