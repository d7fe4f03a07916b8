"""The state of a vCPU and of a machine as plain values that can go through JSON.

Save the vCPUs, then the machine; load the vCPUs, then the machine: its clock continues from the moment of
loading, and its interrupt controllers, loaded last, hand what is pending to LAPICs that are complete.
Memory is not part of it.

``from_json`` is strict (see pykvm.machine.codec): it decodes what came over a network.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from pykvm.errors import UsageError
from pykvm.machine.codec import Decoder, encode, octets, optional, record, sequence, signed, unsigned
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import GENERAL, SEGMENTS, DescriptorTable, Registers, Segment, SpecialRegisters

LAPIC_BYTES = 1024
IRQCHIP_BYTES = 512
MAX_XSAVE_BYTES = 1 << 16
MAX_CPUID_ENTRIES = 256
MAX_MSRS = 1024
MAX_XCRS = 16


@dataclass(frozen=True, slots=True)
class Msr:
    """A model-specific register and its value (SDM vol. 4)."""

    index: int
    value: int


@dataclass(frozen=True, slots=True)
class Xcr:
    """An extended control register; 0 is XCR0, the enabled state components (SDM vol. 3, 2.6)."""

    index: int
    value: int


@dataclass(frozen=True, slots=True)
class VcpuEvents:
    """Exceptions, interrupts and NMIs on their way into the guest (api.rst 4.31).

    ``injected`` events are re-delivered at the next entry, ``pending`` ones still have to be considered.
    ``flags`` (KVM_VCPUEVENT_VALID_*) says which fields a load takes over.
    """

    exception_injected: int = 0
    exception_nr: int = 0
    exception_has_error_code: int = 0
    exception_pending: int = 0
    exception_error_code: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0
    interrupt_injected: int = 0
    interrupt_nr: int = 0
    interrupt_soft: int = 0
    interrupt_shadow: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    nmi_masked: int = 0
    sipi_vector: int = 0
    smi_smm: int = 0
    smi_pending: int = 0
    smi_smm_inside_nmi: int = 0
    smi_latched_init: int = 0
    triple_fault_pending: int = 0
    flags: int = 0


@dataclass(frozen=True, slots=True)
class DebugRegisters:
    """DR0 to DR3, DR6 and DR7 of the guest (SDM vol. 3, 18.2); ``flags`` is reserved by KVM."""

    db: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr6: int = 0xFFFF0FF0
    dr7: int = 0x400
    flags: int = 0


@dataclass(frozen=True, slots=True)
class ClockState:
    """kvmclock in nanoseconds (api.rst 4.29).

    ``realtime`` (ns since the epoch) and ``host_tsc`` are the host's at that instant and valid where
    ``flags`` has KVM_CLOCK_REALTIME (4) and KVM_CLOCK_HOST_TSC (8).
    """

    clock: int
    flags: int = 0
    realtime: int = 0
    host_tsc: int = 0


@dataclass(frozen=True, slots=True)
class IrqChips:
    """The in-kernel interrupt controllers, each as the 512 bytes of KVM_GET_IRQCHIP (api.rst 4.26)."""

    pic_master: bytes
    pic_slave: bytes
    ioapic: bytes


@dataclass(frozen=True, slots=True)
class PitChannel:
    """One of the i8254's three counters (struct kvm_pit_channel_state)."""

    count: int
    latched_count: int
    count_latched: int
    status_latched: int
    status: int
    read_state: int
    write_state: int
    write_latch: int
    rw_mode: int
    mode: int
    bcd: int
    gate: int
    count_load_time: int


@dataclass(frozen=True, slots=True)
class PitState:
    """The in-kernel timer (api.rst 4.72); flag 1: HPET legacy mode, 2: speaker on."""

    channels: tuple[PitChannel, ...]
    flags: int = 0


@dataclass(frozen=True, slots=True)
class VcpuState:
    """Everything that another vCPU needs to go on from here.

    ``xsave`` is KVM's XSAVE area (api.rst 4.42), ``lapic`` the 1024 bytes of the local APIC's registers or
    None without one in the kernel, ``mp_state`` KVM_MP_STATE_* (api.rst 4.38), ``tsc_khz`` the guest's TSC
    frequency or None where the host does not tell.
    """

    cpuid: tuple[CpuidEntry, ...]
    registers: Registers
    special: SpecialRegisters
    xsave: bytes
    xcrs: tuple[Xcr, ...]
    msrs: tuple[Msr, ...]
    events: VcpuEvents
    mp_state: int
    debug: DebugRegisters
    lapic: bytes | None = None
    tsc_khz: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Nested dicts and lists of numbers and hexadecimal strings; the keys are the fields' names."""
        result: dict[str, Any] = encode(self)
        return result

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The inverse.  Raises UsageError, naming the member, for anything that ``to_json`` cannot make."""
        state = _VCPU(data, "vcpu")
        for name, indices in (
            ("msrs", [msr.index for msr in state["msrs"]]),
            ("xcrs", [xcr.index for xcr in state["xcrs"]]),
        ):
            if len(set(indices)) != len(indices):
                raise UsageError(f"vcpu.{name} has an index twice.")
        return cls(**state)


@dataclass(frozen=True, slots=True)
class MachineState:
    """The machine's own state, apart from slots, memory and vCPUs; None for what was not created."""

    clock: ClockState | None = None
    irqchips: IrqChips | None = None
    pit: PitState | None = None

    def to_json(self) -> dict[str, Any]:
        """As VcpuState.to_json."""
        result: dict[str, Any] = encode(self)
        return result

    @classmethod
    def from_json(cls, data: object) -> Self:
        """As VcpuState.from_json."""
        return cls(**_MACHINE(data, "machine"))


# --- what the members may hold -------------------------------------------------------------------


def _all(names: tuple[str, ...], item: Decoder[Any]) -> dict[str, Decoder[Any]]:
    return dict.fromkeys(names, item)


def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def _four(value: object, path: str) -> Any:
    return sequence(_U64, 4, 4)(value, path)


_BIT, _U8, _U16, _U32, _U64 = unsigned(1), unsigned(8), unsigned(16), unsigned(32), unsigned(64)
_SEGMENT = record(
    Segment,
    {"base": _U64, "limit": _U32, "selector": _U16, "type": unsigned(4), "present": _BIT, "dpl": unsigned(2)}
    | _all(("db", "s", "l", "g", "avl", "unusable"), _BIT),
)
_TABLE = record(DescriptorTable, {"base": _U64, "limit": _U16})
_SPECIAL = record(
    SpecialRegisters,
    _all(SEGMENTS, _SEGMENT)
    | {"gdt": _TABLE, "idt": _TABLE}
    | _all(("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"), _U64)
    | {"interrupt": optional(_U8), "pdptrs": optional(_four)},
)
_EVENTS = record(
    VcpuEvents,
    _all(_names(VcpuEvents), _U8)
    | {"exception_error_code": _U32, "exception_payload": _U64, "sipi_vector": _U32, "flags": _U32},
)
_CHIP = octets(IRQCHIP_BYTES, IRQCHIP_BYTES)
_CHANNEL = record(
    PitChannel,
    _all(_names(PitChannel), _U8)
    | {"count": unsigned(17, 0x10000), "latched_count": _U16, "count_load_time": signed(64)},
)
_VCPU: Decoder[dict[str, Any]] = record(
    dict,
    {
        "cpuid": sequence(record(CpuidEntry, _all(_names(CpuidEntry), _U32)), MAX_CPUID_ENTRIES),
        "registers": record(Registers, _all((*GENERAL, "rip", "rflags"), _U64)),
        "special": _SPECIAL,
        "xsave": octets(0, MAX_XSAVE_BYTES),
        "xcrs": sequence(record(Xcr, {"index": _U32, "value": _U64}), MAX_XCRS),
        "msrs": sequence(record(Msr, {"index": _U32, "value": _U64}), MAX_MSRS),
        "events": _EVENTS,
        "mp_state": unsigned(32, 10),
        "debug": record(DebugRegisters, {"db": _four, "dr6": _U64, "dr7": _U64, "flags": _U64}),
        "lapic": optional(octets(LAPIC_BYTES, LAPIC_BYTES)),
        "tsc_khz": optional(_U32),
    },
)
_MACHINE: Decoder[dict[str, Any]] = record(
    dict,
    {
        "clock": optional(
            record(ClockState, {"clock": _U64, "flags": _U32} | _all(("realtime", "host_tsc"), _U64))
        ),
        "irqchips": optional(record(IrqChips, _all(("pic_master", "pic_slave", "ioapic"), _CHIP))),
        "pit": optional(record(PitState, {"channels": sequence(_CHANNEL, 3, 3), "flags": _U32})),
    },
)
