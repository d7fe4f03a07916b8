"""Events and debug registers of a vCPU as KVM's interface has them (api.rst 4.16, 4.31 to 4.39, 4.64)."""

from __future__ import annotations

import errno
from dataclasses import fields
from typing import Final

from pykvm.errors import KvmError, UsageError
from pykvm.machine.state import DebugRegisters, VcpuEvents
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.state import SHADOW_SS, SHADOW_STI
from pykvm.model.vcpu_registers import VcpuPart, check_width
from pykvm.x86.exceptions import Vector

_WIDE: Final = {"exception_error_code": 32, "exception_payload": 64, "sipi_vector": 32, "flags": 32}
_NMI_PENDING, _SIPI, _SHADOW, _SMM = 1, 2, 4, 8  # KVM_VCPUEVENT_VALID_*
_KVM_SHADOW_SS, _KVM_SHADOW_STI = 1, 2  # KVM_X86_SHADOW_INT_*
_NMI_VECTOR: Final = 2
_EXCEPTIONS: Final = 32
_OPERATION: Final = "KVM_SET_VCPU_EVENTS"


class VcpuEventState(VcpuPart):
    """Events of a vCPU, and ways to cause some."""

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT (api.rst 4.16): queue an external interrupt as a PIC would (vector 0 to 255).

        It is delivered at the next entry, even with RFLAGS.IF clear: wait with ``request_interrupt_window``
        for the moment when the guest takes one.  A second one takes the place of one not yet delivered.
        Raises KvmError (EINVAL) above 255.
        """
        check_width("irq", vector, 32)
        if vector > 255:
            raise KvmError(errno.EINVAL, "KVM_INTERRUPT", f"{vector} is no vector; use 0 to 255.")
        with self.use("KVM_INTERRUPT") as cpu:
            cpu.injected_interrupt = vector

    def nmi(self) -> None:
        """KVM_NMI (api.rst 4.64): queue a non-maskable interrupt."""
        with self.use("KVM_NMI") as cpu:
            cpu.pending_nmi = True

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE (api.rst 4.38): without a LAPIC always RUNNABLE (0)."""
        with self.use("KVM_GET_MP_STATE"):
            return 0

    def set_mp_state(self, value: int) -> None:
        """KVM_SET_MP_STATE (api.rst 4.39).  Raises KvmError (EINVAL) for anything but RUNNABLE."""
        with self.use("KVM_SET_MP_STATE"):
            if value:
                raise KvmError(
                    errno.EINVAL,
                    "KVM_SET_MP_STATE",
                    "the model has no LAPIC, without which a vCPU can only be RUNNABLE.",
                )

    def get_events(self) -> VcpuEvents:
        """KVM_GET_VCPU_EVENTS (api.rst 4.31)."""
        with self.use("KVM_GET_VCPU_EVENTS") as cpu:
            fault = cpu.injected_exception
            if fault is None and cpu.pending_debug:
                fault = Fault(Vector.DB)
            shadow = (_KVM_SHADOW_SS if cpu.shadow & SHADOW_SS else 0) | (
                _KVM_SHADOW_STI if cpu.shadow & SHADOW_STI else 0
            )
            return VcpuEvents(
                exception_injected=int(fault is not None),
                exception_nr=fault.vector if fault else 0,
                exception_has_error_code=int(fault is not None and fault.error is not None),
                exception_error_code=(fault.error or 0) if fault else 0,
                interrupt_injected=int(cpu.injected_interrupt is not None),
                interrupt_nr=cpu.injected_interrupt or 0,
                interrupt_shadow=shadow,
                nmi_pending=int(cpu.pending_nmi),
                nmi_masked=int(cpu.nmi_masked),
                flags=_NMI_PENDING | _SHADOW | _SMM,
            )

    def set_events(self, value: VcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS (api.rst 4.32).

        Raises UsageError for fields out of range, KvmError (EINVAL) for flags whose capability is off or
        for fields that contradict each other.
        """
        for field in fields(VcpuEvents):
            check_width(field.name, getattr(value, field.name), _WIDE.get(field.name, 8))
        smm = value.smi_smm or value.smi_pending or value.smi_smm_inside_nmi
        exception = value.exception_injected or value.exception_pending
        if (
            value.flags & ~(_NMI_PENDING | _SIPI | _SHADOW | _SMM)
            or (value.exception_injected and value.exception_pending)
            or (exception and (value.exception_nr >= _EXCEPTIONS or value.exception_nr == _NMI_VECTOR))
            or (value.flags & _SMM and smm)
        ):
            raise KvmError(
                errno.EINVAL,
                _OPERATION,
                "flags name a field whose capability is not enabled (exception payload, triple fault, system "
                "management mode), or the fields contradict each other.",
            )
        with self.use(_OPERATION) as cpu:
            error = value.exception_error_code if value.exception_has_error_code else None
            cpu.injected_exception = Fault(value.exception_nr, error) if exception else None
            cpu.pending_debug = 0
            cpu.injected_interrupt = value.interrupt_nr if value.interrupt_injected else None
            if value.flags & _SHADOW:
                shadow = value.interrupt_shadow
                cpu.shadow = (SHADOW_SS if shadow & _KVM_SHADOW_SS else 0) | (
                    SHADOW_STI if shadow & _KVM_SHADOW_STI else 0
                )
            if value.flags & _NMI_PENDING:
                cpu.pending_nmi = bool(value.nmi_pending or value.nmi_injected)
            cpu.nmi_masked = bool(value.nmi_masked)

    def get_debug_registers(self) -> DebugRegisters:
        """KVM_GET_DEBUGREGS (api.rst 4.33): the guest's own."""
        with self.use("KVM_GET_DEBUGREGS") as cpu:
            first, second, third, fourth = cpu.dr
            return DebugRegisters((first, second, third, fourth), cpu.dr6 | cpu.pending_debug, cpu.dr7)

    def set_debug_registers(self, value: DebugRegisters) -> None:
        """KVM_SET_DEBUGREGS (api.rst 4.34).

        Raises UsageError for fields out of range, KvmError (EINVAL) above 32 bits of DR6 or DR7.
        """
        if len(value.db) != 4:
            raise UsageError("There are four debug registers of addresses, DR0 to DR3.")
        for name, number in (*(("db", each) for each in value.db), ("dr6", value.dr6), ("dr7", value.dr7)):
            check_width(name, number, 64)
        if value.dr6 >> 32 or value.dr7 >> 32 or value.flags:
            raise KvmError(
                errno.EINVAL, "KVM_SET_DEBUGREGS", "DR6 and DR7 have 32 bits, and the flags are reserved (0)."
            )
        with self.use("KVM_SET_DEBUGREGS") as cpu:
            cpu.dr = list(value.db)
            cpu.dr6, cpu.dr7 = value.dr6, value.dr7
