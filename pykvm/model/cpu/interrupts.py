"""Events between instructions and their delivery: traps, NMI, interrupts, faults (SDM vol. 3, ch. 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.machine.exits import InternalError
from pykvm.model.cpu import gates
from pykvm.model.cpu.faults import Fault, NeedInput, TripleFault
from pykvm.model.cpu.state import SHADOW_SS
from pykvm.x86.bits import Rflags
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor

_IF: Final = int(Rflags.IF)
_RF: Final = int(Rflags.RF)
_HIT: Final = 0xF  # DR6.B3-B0
_DR6_ONES: Final = 0xFFFF0FF0
_GENERAL_DETECT: Final = 1 << 13  # DR7.GD
_DELIVERY: Final = 3  # KVM_INTERNAL_ERROR_DELIVERY_EV

_CONTRIBUTORY: Final = frozenset({Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.CP})


def take_event(cpu: Processor) -> bool:
    """Deliver what is pending before the coming instruction; whether something was.

    The order is that of SDM vol. 3, table 6-2, behind what the host injects.  Raises TripleFault.
    """
    if cpu.injected_exception is not None:
        fault, cpu.injected_exception = cpu.injected_exception, None
        deliver_fault(cpu, fault)
        return True
    if cpu.injected_interrupt is not None:
        vector, cpu.injected_interrupt = cpu.injected_interrupt, None
        _interrupt(cpu, vector)
        return True
    if cpu.shadow & SHADOW_SS:
        return False
    if cpu.pending_debug:
        dr6, cpu.pending_debug = cpu.pending_debug, 0
        _debug_trap(cpu, dr6)
        return True
    return _take_interrupt(cpu) or _take_code_breakpoint(cpu)


def _take_interrupt(cpu: Processor) -> bool:
    if cpu.shadow:
        return False
    if cpu.pending_nmi and not cpu.nmi_masked:
        cpu.pending_nmi = False
        cpu.nmi_masked = True  # until IRET (SDM vol. 3, 6.7.1)
        _interrupt(cpu, Vector.NMI)
        return True
    if cpu.pending_interrupt is not None and cpu.rflags & _IF:
        vector, cpu.pending_interrupt = cpu.pending_interrupt, None
        _interrupt(cpu, vector)
        return True
    return False


def _take_code_breakpoint(cpu: Processor) -> bool:
    """Instruction breakpoints are faults; RF holds them off (SDM vol. 3, 18.3.1.1)."""
    if not cpu.dr7 & 0xFF or cpu.rflags & _RF:
        return False
    address = cpu.code_window.base + cpu.rip & (0xFFFFFFFFFFFFFFFF if cpu.bits64 else 0xFFFFFFFF)
    hits = 0
    for number in range(4):
        enabled = cpu.dr7 >> 2 * number & 3
        kind_and_length = cpu.dr7 >> 16 + 4 * number & 0xF
        if enabled and not kind_and_length and cpu.dr[number] == address:
            hits |= 1 << number
    if hits:
        _debug_trap(cpu, hits)
    return bool(hits)


def deliver_fault(cpu: Processor, fault: Fault) -> None:
    """Enter the handler of an instruction's fault at ``cpu.rip``.  Raises TripleFault."""
    _record(cpu, fault)
    _deliver(cpu, fault, cpu.rflags | _RF)


def _debug_trap(cpu: Processor, dr6: int) -> None:
    fault = Fault(Vector.DB, dr6=dr6)
    _record(cpu, fault)
    _deliver(cpu, fault, cpu.rflags)


def _interrupt(cpu: Processor, vector: int) -> None:
    """An interrupt, whatever its vector, is no exception: a fault in its delivery comes in its place."""
    _deliver(cpu, Fault(vector), cpu.rflags, exception=False)


def _deliver(cpu: Processor, fault: Fault, rflags: int, *, exception: bool = True) -> None:
    """Enter the handler, or that of what goes wrong on the way; ``rflags`` is the image to push."""
    while True:
        cpu.begin()
        try:
            cpu.enter_handler(gates.Event(fault.vector, fault.error, False, cpu.rip, rflags))
        except Fault as second:
            cpu.rollback()
            fault = _combine(fault, second) if exception else second
            exception = True
            rflags = cpu.rflags | _RF
            _record(cpu, second)
        except NeedInput:
            # Tables or stack in a hole: the delivery cannot be resumed half-way, as in KVM.
            cpu.rollback()
            raise NeedInput(InternalError(_DELIVERY, ())) from None
        else:
            cpu.finish()
            return


def _record(cpu: Processor, fault: Fault) -> None:
    """What an exception leaves in CR2, DR6 and DR7 (SDM vol. 3, 6.15, interrupts 1 and 14)."""
    if fault.vector == Vector.PF:
        cpu.cr2 = fault.address
    elif fault.vector == Vector.DB and fault.dr6:
        cpu.dr6 = cpu.dr6 & ~_HIT | fault.dr6 | _DR6_ONES
        cpu.dr7 &= ~_GENERAL_DETECT


def _combine(first: Fault, second: Fault) -> Fault:
    """What follows from a fault during a delivery (SDM vol. 3, 6.15, tables 6-4 and 6-5)."""
    grave = second.vector in _CONTRIBUTORY or second.vector == Vector.PF
    if first.vector == Vector.DF and grave:
        raise TripleFault
    if (first.vector in _CONTRIBUTORY and second.vector in _CONTRIBUTORY) or (
        first.vector == Vector.PF and grave
    ):
        return Fault(Vector.DF, 0)
    return second
