"""Events, run state, debug registers, LAPIC of a vCPU (api.rst 4.16, 4.31 to 4.39, 4.57, 4.58, 4.64)."""

from __future__ import annotations

import errno
from dataclasses import fields
from enum import IntEnum
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import KvmError, UsageError
from pykvm.kvm.fields import fill
from pykvm.machine.state import LAPIC_BYTES, DebugRegisters, VcpuEvents

if TYPE_CHECKING:
    from pykvm.abi.library import CData

_EVENTS = tuple(field.name for field in fields(VcpuEvents))
_LAPIC_REFUSALS: Refusals = {
    errno.EINVAL: (
        KvmError,
        "this vCPU has no LAPIC in the kernel; call create_irqchip before the first vCPU.",
    )
}


def fill_events(events: CData, value: VcpuEvents) -> None:
    """Write a kvm_vcpu_events.  Raises UsageError for fields out of range."""
    fill(events, **{name: getattr(value, name) for name in _EVENTS})


def read_events(events: CData) -> VcpuEvents:
    """Read a kvm_vcpu_events."""
    return VcpuEvents(*(getattr(events, name) for name in _EVENTS))


class MpState(IntEnum):
    """What a vCPU does at its next run (api.rst 4.38); all but RUNNABLE need a LAPIC in the kernel."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


class VcpuEventState(Managed):
    """Events of a vCPU, and ways to cause some."""

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT (api.rst 4.16): queue an external interrupt as a PIC would (vector 0 to 255).

        It is delivered at the next entry, even with RFLAGS.IF clear: wait with ``request_interrupt_window``
        for the moment when the guest takes one.  A second one takes the place of one not yet delivered.
        Raises KvmError: EINVAL above 255, ENXIO with a PIC in the kernel, EEXIST while one is queued beside
        a LAPIC in the kernel (split irqchip).
        """
        request = ffi.new("struct kvm_interrupt *")
        fill(request, irq=vector)
        refusals: Refusals = {
            errno.EINVAL: (KvmError, f"{vector} is no vector; use 0 to 255."),
            errno.EEXIST: (KvmError, "an interrupt is queued already; run the vCPU until it is taken."),
            errno.ENXIO: (KvmError, "the PIC is in the kernel; use set_irq_line or signal_msi."),
        }
        self.ioctl(lib.KVM_INTERRUPT, request, "KVM_INTERRUPT", refusals)

    def nmi(self) -> None:
        """KVM_NMI (api.rst 4.64, KVM_CAP_USER_NMI): queue a non-maskable interrupt."""
        self.ioctl(lib.KVM_NMI, None, "KVM_NMI")

    def get_mp_state(self) -> MpState:
        """KVM_GET_MP_STATE (api.rst 4.38, KVM_CAP_MP_STATE).

        Takes a pending INIT or SIPI first, which changes registers: ask for this before them.
        """
        state = ffi.new("struct kvm_mp_state *")
        self.ioctl(lib.KVM_GET_MP_STATE, state, "KVM_GET_MP_STATE")
        return MpState(state.mp_state)

    def set_mp_state(self, value: int) -> None:
        """KVM_SET_MP_STATE (api.rst 4.39, KVM_CAP_MP_STATE).  Raises KvmError (EINVAL)."""
        state = ffi.new("struct kvm_mp_state *")
        fill(state, mp_state=int(value))
        refusals: Refusals = {
            errno.EINVAL: (
                KvmError,
                "without a LAPIC in the kernel a vCPU can only be RUNNABLE, and no SIPI fits in system "
                "management mode or while INIT is latched.",
            )
        }
        self.ioctl(lib.KVM_SET_MP_STATE, state, "KVM_SET_MP_STATE", refusals)

    def get_events(self) -> VcpuEvents:
        """KVM_GET_VCPU_EVENTS (api.rst 4.31, KVM_CAP_VCPU_EVENTS)."""
        events = ffi.new("struct pykvm_vcpu_events *")
        self.ioctl(lib.KVM_GET_VCPU_EVENTS, events, "KVM_GET_VCPU_EVENTS")
        return read_events(events)

    def set_events(self, value: VcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS (api.rst 4.32, KVM_CAP_VCPU_EVENTS).

        Raises UsageError for fields out of range, KvmError (EINVAL) for flags whose capability is off or
        for an exception that is injected and pending at once.
        """
        events = ffi.new("struct pykvm_vcpu_events *")
        fill_events(events, value)
        refusals: Refusals = {
            errno.EINVAL: (
                KvmError,
                "flags name a field whose capability is not enabled on this VM (exception payload, triple "
                "fault), or the fields contradict each other.",
            )
        }
        self.ioctl(lib.KVM_SET_VCPU_EVENTS, events, "KVM_SET_VCPU_EVENTS", refusals)

    def get_debug_registers(self) -> DebugRegisters:
        """KVM_GET_DEBUGREGS (api.rst 4.33, KVM_CAP_DEBUGREGS): the guest's own."""
        debug = ffi.new("struct kvm_debugregs *")
        self.ioctl(lib.KVM_GET_DEBUGREGS, debug, "KVM_GET_DEBUGREGS")
        first, second, third, fourth = debug.db
        return DebugRegisters((first, second, third, fourth), debug.dr6, debug.dr7, debug.flags)

    def set_debug_registers(self, value: DebugRegisters) -> None:
        """KVM_SET_DEBUGREGS (api.rst 4.34, KVM_CAP_DEBUGREGS).

        Raises UsageError for fields out of range, KvmError (EINVAL) above 32 bits of DR6 or DR7.
        """
        debug = ffi.new("struct kvm_debugregs *")
        fill(debug, db=value.db, dr6=value.dr6, dr7=value.dr7, flags=value.flags)
        refusals: Refusals = {
            errno.EINVAL: (KvmError, "DR6 and DR7 have 32 bits, and the flags are reserved (0).")
        }
        self.ioctl(lib.KVM_SET_DEBUGREGS, debug, "KVM_SET_DEBUGREGS", refusals)

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC (api.rst 4.57, KVM_CAP_IRQCHIP): the 1024 bytes of the LAPIC's register page.

        Register r of SDM vol. 3, table 11-1 is the 32-bit word at offset r.  Raises KvmError (EINVAL)
        without a LAPIC in the kernel.
        """
        lapic = ffi.new("struct pykvm_lapic *")
        self.ioctl(lib.KVM_GET_LAPIC, lapic, "KVM_GET_LAPIC", _LAPIC_REFUSALS)
        return bytes(ffi.buffer(lapic))

    def set_lapic(self, registers: bytes) -> None:
        """KVM_SET_LAPIC (api.rst 4.58, KVM_CAP_IRQCHIP).

        Its mode is that of the APIC base register, so set the special registers first.  Raises UsageError
        unless it has 1024 bytes, KvmError (EINVAL) without a LAPIC in the kernel or for another's APIC id.
        """
        if len(registers) != LAPIC_BYTES:
            raise UsageError(f"A LAPIC's register page has {LAPIC_BYTES} bytes, not {len(registers)}.")
        lapic = ffi.new("struct pykvm_lapic *")
        ffi.memmove(lapic, registers, LAPIC_BYTES)
        self.ioctl(lib.KVM_SET_LAPIC, lapic, "KVM_SET_LAPIC", _LAPIC_REFUSALS)
