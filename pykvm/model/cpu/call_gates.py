"""Call gates (SDM vol. 3, 5.8.2 to 5.8.5; vol. 2, CALL and JMP, sections CALL-GATE)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pykvm.model.cpu import stacks
from pykvm.model.cpu.descriptors import (
    Gate,
    System,
    error_code,
    gate_of,
    is_code,
    is_conforming,
    is_null,
    mark_accessed,
    null_segment,
    read_descriptor,
    read_segment,
)
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import CS, RSP, SS
from pykvm.model.cpu.iret import check_target
from pykvm.model.cpu.stacks import push_all, stack_error
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor


def transfer(cpu: Processor, selector: int, *, call: bool) -> None:
    """Through the call gate that ``selector`` names."""
    gate = _read_gate(cpu, selector)
    code = _gate_target(cpu, gate, call=call)
    size = 8 if cpu.long_mode else 2 if gate.type == System.CALL16 else 4
    offset = gate.offset & 0xFFFF if size == 2 else gate.offset
    check_target(cpu, code, offset)
    frame = (cpu.segments[CS].selector, cpu.next_rip)
    if call and code.selector & 3 < cpu.cpl:
        if cpu.long_mode:
            _switch_stack64(cpu, code, frame)
        else:
            _switch_stack(cpu, code.selector & 3, frame, size, gate.parameters)
    elif call:
        if cpu.long_mode:
            cpu.set_segment(CS, code)  # the pushes are those of 64-bit mode
        push_all(cpu, frame, size)
    cpu.set_segment(CS, code)
    cpu.next_rip = offset


def _read_gate(cpu: Processor, selector: int) -> Gate:
    """The gate, which CPL and RPL must be allowed to use; 16 bytes in IA-32e mode."""
    error = error_code(selector)
    raw = read_descriptor(cpu, selector, size=16 if cpu.long_mode else 8)
    gate = gate_of(raw)
    if max(cpu.cpl, selector & 3) > gate.dpl:
        raise Fault.gp(error)
    if raw >> 104 & 0x1F:  # the upper half's type field must be 0 (SDM vol. 3, 5.8.3.1)
        raise Fault.gp(error)
    if not gate.present:
        raise Fault.np(error)
    return gate


def _gate_target(cpu: Processor, gate: Gate, *, call: bool) -> Segment:
    """The gate's code segment; only CALL reaches an inner privilege level."""
    if is_null(gate.selector):
        raise Fault.gp()
    error = error_code(gate.selector)
    code = read_segment(cpu, gate.selector)
    inward = call or is_conforming(code)
    privileged = code.dpl > cpu.cpl if inward else code.dpl != cpu.cpl
    if not is_code(code) or privileged or (cpu.long_mode and (not code.l or code.db)):
        raise Fault.gp(error)
    if not code.present:
        raise Fault.np(error)
    cpl = cpu.cpl if is_conforming(code) else code.dpl
    return replace(mark_accessed(cpu, code), selector=gate.selector & ~3 | cpl)


def _switch_stack(cpu: Processor, cpl: int, frame: tuple[int, ...], size: int, parameters: int) -> None:
    """MORE-PRIVILEGE: a stack from the TSS, with the old SS:ESP and copies of the parameters."""
    selector, offset = stacks.inner_stack(cpu, cpl, 0)
    stack = stacks.inner_stack_segment(cpu, selector, cpl, 0)
    rsp = cpu.regs[RSP]
    copies = [
        cpu.load(SS, rsp + number * size & cpu.stack_mask, size) for number in reversed(range(parameters))
    ]
    old = (cpu.segments[SS].selector, rsp)
    cpu.set_segment(SS, stack)
    cpu.regs[RSP] = offset
    with stack_error(error_code(selector)):
        push_all(cpu, (*old, *copies, *frame), size)


def _switch_stack64(cpu: Processor, code: Segment, frame: tuple[int, ...]) -> None:
    """The same in IA-32e mode: SS is null, nothing is copied."""
    cpl = code.selector & 3
    rsp = stacks.inner_stack64(cpu, cpl, 0)
    old = (cpu.segments[SS].selector, cpu.regs[RSP])
    cpu.segments[SS] = null_segment(cpl, cpl)
    cpu.set_segment(CS, code)
    cpu.regs[RSP] = rsp
    with stack_error(0):
        push_all(cpu, (*old, *frame), 8)
