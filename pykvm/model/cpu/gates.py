"""Through IVT or IDT to a handler: gates and stack switches (SDM vol. 3, 6.12 and 6.14)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from pykvm.model.cpu import stacks, tasks
from pykvm.model.cpu.descriptors import (
    EXT,
    Gate,
    System,
    error_code,
    gate_of,
    is_code,
    is_conforming,
    is_null,
    mark_accessed,
    null_segment,
    read_segment,
    real_segment,
    with_ext,
)
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import CS, DS, ES, FS, GS, RSP, SS
from pykvm.model.cpu.stacks import push_all, stack_error
from pykvm.x86.bits import Rflags
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor

_IDT: Final = 2
_IF: Final = int(Rflags.IF)
_CLEARED: Final = int(Rflags.TF | Rflags.NT | Rflags.RF | Rflags.VM)
_CLEARED_REAL: Final = int(Rflags.TF | Rflags.IF | Rflags.RF | Rflags.AC)
_INTERRUPT: Final = frozenset({System.INTERRUPT16, System.INTERRUPT32})
_WIDE_GATES: Final = frozenset({System.INTERRUPT32, System.TRAP32})
_GATES: Final = _WIDE_GATES | {System.INTERRUPT16, System.TRAP16, System.TASK}


class Event(NamedTuple):
    """What goes to a handler.

    ``error`` is the error code or None.  ``software`` says INT n, INT3 or INTO: the gate's DPL is checked and
    EXT stays clear.  ``rip`` is the return address, ``rflags`` the image to push.
    """

    vector: int
    error: int | None
    software: bool
    rip: int
    rflags: int

    @property
    def ext(self) -> int:
        """Bit 0 of the error code of a fault during the delivery."""
        return 0 if self.software else EXT

    @property
    def idt_error(self) -> int:
        """The error code that names the vector's gate (SDM vol. 3, 6.13)."""
        return self.vector << 3 | _IDT | self.ext


def enter(cpu: Processor, event: Event) -> None:
    """Go to the handler: CS, SS, RSP and RFLAGS change, ``cpu.next_rip`` is its first instruction.

    Raises Fault for what is wrong on the way.
    """
    if not cpu.protected_mode:
        _enter_real(cpu, event)
    elif cpu.long_mode:
        _enter_long(cpu, event)
    else:
        _enter_protected(cpu, event)


def _enter_real(cpu: Processor, event: Event) -> None:
    """SDM vol. 3, 21.1.4; vol. 2, INT n, REAL-ADDRESS-MODE.  No error code is pushed."""
    at = event.vector * 4
    if at + 3 > cpu.idt.limit:
        raise Fault.gp()
    vector = cpu.load_system(cpu.idt.base + at, 4)
    for value in (event.rflags, cpu.segments[CS].selector, event.rip):
        cpu.push(value & 0xFFFF, 2)
    cpu.set_segment(CS, real_segment(cpu, CS, vector >> 16))
    cpu.set_rflags(cpu.rflags & ~_CLEARED_REAL)
    cpu.next_rip = vector & 0xFFFF


# --- the gate and the code segment behind it -----------------------------------------------------------


def read_gate(cpu: Processor, event: Event, size: int) -> Gate:
    """The gate of an event's vector, checked."""
    at = event.vector * size
    if at + size - 1 > cpu.idt.limit:
        raise Fault.gp(event.idt_error)
    raw = cpu.load_system(cpu.idt.base + at, size)
    gate = gate_of(raw)
    if raw >> 44 & 1 or gate.type not in (_WIDE_GATES if size == 16 else _GATES):
        raise Fault.gp(event.idt_error)
    if event.software and gate.dpl < cpu.cpl:
        raise Fault.gp(event.idt_error)
    if not gate.present:
        raise Fault.np(event.idt_error)
    return gate


def handler_code(cpu: Processor, selector: int, ext: int, *, marks: bool = True) -> Segment:
    """The handler's code segment, checked, with the RPL that it will run at; ``marks`` its accessed bit."""
    if is_null(selector):
        raise Fault.gp(ext)
    code = read_segment(cpu, selector, with_ext(Fault.gp, ext))
    error = error_code(selector) | ext
    if not is_code(code) or code.dpl > cpu.cpl or (cpu.long_mode and (not code.l or code.db)):
        raise Fault.gp(error)
    if not code.present:
        raise Fault.np(error)
    cpl = cpu.cpl if is_conforming(code) else code.dpl
    if cpu.vm86 and cpl != 0:
        raise Fault.gp(error)
    return replace(mark_accessed(cpu, code) if marks else code, selector=selector & ~3 | cpl)


def leave(cpu: Processor, gate: Gate, code: Segment, ext: int) -> None:
    """Load CS:RIP and the handler's RFLAGS."""
    offset = gate.offset if gate.type in _WIDE_GATES else gate.offset & 0xFFFF
    if not cpu.long_mode and offset > code.limit:
        raise Fault.gp(ext)
    if cpu.long_mode and not cpu.is_canonical(offset):
        raise Fault.gp(ext)
    cpu.set_rflags(cpu.rflags & ~(_CLEARED | (_IF if gate.type in _INTERRUPT else 0)))
    cpu.set_segment(CS, code)
    cpu.next_rip = offset


# --- protected mode ------------------------------------------------------------------------------------


def _enter_protected(cpu: Processor, event: Event) -> None:
    """SDM vol. 2, INT n, PROTECTED-MODE."""
    gate = read_gate(cpu, event, 8)
    if gate.type == System.TASK:
        tasks.switch_by_interrupt(cpu, gate.selector, event.rip, event.rflags, event.error, event.ext)
        return
    code = handler_code(cpu, gate.selector, event.ext)
    size = 4 if gate.type in _WIDE_GATES else 2
    frame = (event.rflags, cpu.segments[CS].selector, event.rip)
    cpl = code.selector & 3
    if cpl == cpu.cpl:
        with stack_error(event.ext):
            push_all(cpu, frame, size, event.error)
    else:
        _push_on_inner_stack(cpu, cpl, frame, size, event)
    leave(cpu, gate, code, event.ext)


def _push_on_inner_stack(cpu: Processor, cpl: int, frame: tuple[int, ...], size: int, event: Event) -> None:
    """INTER-PRIVILEGE-LEVEL-INTERRUPT and INTERRUPT-FROM-VIRTUAL-8086-MODE."""
    old = [segment.selector for segment in cpu.segments]
    frame = (old[SS], cpu.regs[RSP], *frame)
    from_vm86 = cpu.vm86
    if from_vm86:
        frame = (old[GS], old[FS], old[DS], old[ES], *frame)
        cpu.set_rflags(cpu.rflags & ~int(Rflags.VM))
    selector, offset = stacks.inner_stack(cpu, cpl, event.ext)
    stack = stacks.inner_stack_segment(cpu, selector, cpl, event.ext)
    cpu.set_segment(SS, stack)
    cpu.regs[RSP] = offset
    with stack_error(error_code(selector) | event.ext):
        push_all(cpu, frame, size, event.error)
    if from_vm86:
        for number in (ES, DS, FS, GS):
            cpu.set_segment(number, null_segment(0))


# --- IA-32e mode ---------------------------------------------------------------------------------------


def long_frame(cpu: Processor, event: Event) -> tuple[int, ...]:
    """What is pushed, but for the error code."""
    return (
        cpu.segments[SS].selector, cpu.regs[RSP], event.rflags, cpu.segments[CS].selector, event.rip,
    )  # fmt: skip


def _enter_long(cpu: Processor, event: Event) -> None:
    """SDM vol. 3, 6.14: 16-byte gates, IST, an aligned stack, SS:RSP pushed always."""
    gate = read_gate(cpu, event, 16)
    code = handler_code(cpu, gate.selector, event.ext)
    cpl = code.selector & 3
    ist = gate.parameters & 7
    frame = long_frame(cpu, event)
    rsp = cpu.regs[RSP]
    if ist:
        rsp = stacks.interrupt_stack(cpu, ist, event.ext)
    elif cpl < cpu.cpl:
        rsp = stacks.inner_stack64(cpu, cpl, event.ext)
    if cpl < cpu.cpl:
        cpu.segments[SS] = null_segment(cpl, cpl)
    leave(cpu, gate, code, event.ext)
    cpu.regs[RSP] = rsp & ~0xF
    with stack_error(event.ext):
        push_all(cpu, frame, 8, event.error)
