"""Model-specific registers (SDM vol. 4; KVM backs the same ones).

``read_msr`` and ``write_msr`` serve RDMSR and WRMSR, and the machine's reading and loading of state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.control import require_cpl0
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import FS, GS, RAX, RCX, RDX
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.tables import require_canonical
from pykvm.x86.bits import Cr0, Efer

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

TSC: Final = 0x10
APIC_BASE: Final = 0x1B
SYSENTER_CS: Final = 0x174
SYSENTER_ESP: Final = 0x175
SYSENTER_EIP: Final = 0x176
PAT: Final = 0x277
MTRR_DEF_TYPE: Final = 0x2FF
PKRS: Final = 0x6E1
XSS: Final = 0xDA0
EFER: Final = 0xC0000080
STAR: Final = 0xC0000081
LSTAR: Final = 0xC0000082
CSTAR: Final = 0xC0000083
SYSCALL_MASK: Final = 0xC0000084
FS_BASE: Final = 0xC0000100
GS_BASE: Final = 0xC0000101
KERNEL_GS_BASE: Final = 0xC0000102
TSC_AUX: Final = 0xC0000103

_M32: Final = 0xFFFFFFFF
_M64: Final = 0xFFFFFFFFFFFFFFFF
_VARIABLE_RANGES: Final = 8
_MTRR_FIXED: Final = (0x250, 0x258, 0x259, *range(0x268, 0x270))
_MTRR_TYPES: Final = frozenset({0, 1, 4, 5, 6})
_PAT_TYPES: Final = frozenset({0, 1, 4, 5, 6, 7})

Read = Callable[["Processor"], int]
Write = Callable[["Processor", int], None]


@dataclass(frozen=True, slots=True)
class Msr:
    """One register.

    Without ``read`` and ``write`` it is plain storage in ``cpu.msrs``, which starts as ``initial``.
    ``check`` raises Fault for values that are refused.  ``feature`` is the field of Features without which
    the register does not exist.  ``read_only`` refuses writes, ``write_only`` reads.
    """

    initial: int = 0
    check: Write | None = None
    read: Read | None = None
    write: Write | None = None
    feature: str = ""
    read_only: bool = False
    write_only: bool = False


# --- checks ---------------------------------------------------------------------------------------------


def bits(allowed: int) -> Write:
    """Refuse bits outside ``allowed``."""

    def check(cpu: Processor, value: int) -> None:
        if value & ~allowed:
            raise Fault.gp()

    return check


def _memory_types(allowed: frozenset[int]) -> Write:
    """Eight memory types, one in each byte (SDM vol. 3, 12.11.2.2 and 12.12.2)."""

    def check(cpu: Processor, value: int) -> None:
        if any(each not in allowed for each in value.to_bytes(8, "little")):
            raise Fault.gp()

    return check


def _check_mtrr_base(cpu: Processor, value: int) -> None:
    if value & 0xFF not in _MTRR_TYPES or value & 0xF00 or value >> cpu.features.physical_bits:
        raise Fault.gp()


def _check_mtrr_mask(cpu: Processor, value: int) -> None:
    if value & 0x7FF or value >> cpu.features.physical_bits:
        raise Fault.gp()


def _check_mtrr_default(cpu: Processor, value: int) -> None:
    if value & ~0xCFF or value & 0xFF not in _MTRR_TYPES:
        raise Fault.gp()


# --- registers with a life of their own ------------------------------------------------------------------


def _write_efer(cpu: Processor, value: int) -> None:
    """LMA is not writable; LME cannot change while paging is on (SDM vol. 3, 2.2.1 and 10.8.5)."""
    features = cpu.features
    allowed = int(Efer.LMA)  # ~ of an IntFlag knows only named bits
    allowed |= int(Efer.SCE) if features.syscall else 0
    allowed |= int(Efer.LME) if features.lm else 0
    allowed |= int(Efer.NXE) if features.nx else 0
    changed = value ^ cpu.efer
    if value & ~allowed or (changed & Efer.LME and cpu.cr0 & Cr0.PG):
        raise Fault.gp()
    cpu.efer = int(value & ~Efer.LMA | cpu.efer & Efer.LMA)
    cpu.update_mode()
    cpu.control_changed()


def _write_apic_base(cpu: Processor, value: int) -> None:
    """Bit 8 BSP, 10 x2APIC, 11 enable; the modes change as SDM vol. 3, figure 11-27 allows."""
    extended, enabled = 1 << 10, 1 << 11
    allowed = (1 << cpu.features.physical_bits) - 0x1000 | enabled | 1 << 8
    allowed |= extended if cpu.features.x2apic else 0
    modes = extended | enabled
    old, new = cpu.apic_base & modes, value & modes
    if value & ~allowed or new == extended:
        raise Fault.gp()
    if (old == modes and new == enabled) or (not old and new == modes):
        raise Fault.gp()
    cpu.apic_base = value


def read_tsc(cpu: Processor) -> int:
    """The time-stamp counter: one tick an instruction, so that runs repeat exactly."""
    return cpu.instructions + cpu.tsc_offset & _M64


def _write_tsc(cpu: Processor, value: int) -> None:
    adjust = cpu.msrs.get(_TSC_ADJUST, 0) + value - read_tsc(cpu)
    cpu.tsc_offset = value - cpu.instructions & _M64
    cpu.msrs[_TSC_ADJUST] = adjust & _M64


_TSC_ADJUST: Final = 0x3B


def _write_tsc_adjust(cpu: Processor, value: int) -> None:
    """A change of it changes the counter by as much (SDM vol. 3, 18.17.3)."""
    cpu.tsc_offset = cpu.tsc_offset + value - cpu.msrs.get(_TSC_ADJUST, 0) & _M64
    cpu.msrs[_TSC_ADJUST] = value


def _read_base(segment: int) -> Read:
    return lambda cpu: cpu.segments[segment].base


def write_base(segment: int) -> Write:
    """The full base of FS or GS, which only 64-bit mode uses wholly."""

    def write(cpu: Processor, value: int) -> None:
        require_canonical(cpu, value)
        cpu.set_segment(segment, replace(cpu.segments[segment], base=value))

    return write


def _write_pkrs(cpu: Processor, value: int) -> None:
    if value > _M32:
        raise Fault.gp()
    cpu.pkrs = value
    cpu.flush_tlb()


def _write_xss(cpu: Processor, value: int) -> None:
    """No supervisor state component exists here."""
    if value:
        raise Fault.gp()


def _check_sysenter(cpu: Processor, value: int) -> None:
    """AMD's processors use 32 bits of it and refuse nothing (APM vol. 2, 6.1.2)."""
    if not cpu.features.amd:
        require_canonical(cpu, value)


# --- the table --------------------------------------------------------------------------------------------

TABLE: Final[dict[int, Msr]] = {
    TSC: Msr(read=read_tsc, write=_write_tsc),
    0x17: Msr(read_only=True),  # IA32_PLATFORM_ID
    APIC_BASE: Msr(read=lambda cpu: cpu.apic_base, write=_write_apic_base),
    0x2A: Msr(read_only=True),  # EBL_CR_POWERON
    _TSC_ADJUST: Msr(write=_write_tsc_adjust, feature="tsc_adjust"),
    0x48: Msr(check=bits(0x487), feature="speculation_control"),  # IA32_SPEC_CTRL
    0x49: Msr(check=bits(0x1), feature="speculation_control", write_only=True),  # IA32_PRED_CMD: IBPB
    0x8B: Msr(write=lambda cpu, value: None),  # IA32_BIOS_SIGN_ID: no microcode
    0xCE: Msr(read_only=True),  # MSR_PLATFORM_INFO
    0xFE: Msr(initial=0x500 | _VARIABLE_RANGES, read_only=True),  # IA32_MTRRCAP: WC, fixed ranges
    SYSENTER_CS: Msr(),
    SYSENTER_ESP: Msr(check=_check_sysenter),
    SYSENTER_EIP: Msr(check=_check_sysenter),
    0x179: Msr(read_only=True),  # IA32_MCG_CAP: no banks
    0x17A: Msr(check=bits(0x7)),  # IA32_MCG_STATUS: RIPV, EIPV, MCIP
    0x1A0: Msr(initial=1, check=bits(0xC51889)),  # IA32_MISC_ENABLE: fast strings
    0x1D9: Msr(check=bits(0x3)),  # IA32_DEBUGCTL: LBR, BTF
    PAT: Msr(initial=0x0007040600070406, check=_memory_types(_PAT_TYPES)),
    MTRR_DEF_TYPE: Msr(check=_check_mtrr_default),
    PKRS: Msr(read=lambda cpu: cpu.pkrs, write=_write_pkrs, feature="pks"),
    XSS: Msr(read=lambda cpu: cpu.xss, write=_write_xss, feature="xsaves"),
    EFER: Msr(read=lambda cpu: cpu.efer, write=_write_efer),
    STAR: Msr(),
    LSTAR: Msr(check=require_canonical, feature="lm"),
    CSTAR: Msr(check=require_canonical, feature="lm"),
    SYSCALL_MASK: Msr(check=bits(_M32), feature="lm"),
    FS_BASE: Msr(read=_read_base(FS), write=write_base(FS), feature="lm"),
    GS_BASE: Msr(read=_read_base(GS), write=write_base(GS), feature="lm"),
    KERNEL_GS_BASE: Msr(check=require_canonical, feature="lm"),
    TSC_AUX: Msr(check=bits(_M32), feature="tsc_aux"),
    0xC0010010: Msr(read_only=True, feature="amd"),  # SYSCFG
    0xC0010015: Msr(check=bits(0x1040148), write=lambda cpu, value: None, feature="amd"),  # HWCR, as KVM
}
for _range in range(_VARIABLE_RANGES):
    TABLE[0x200 + 2 * _range] = Msr(check=_check_mtrr_base)
    TABLE[0x201 + 2 * _range] = Msr(check=_check_mtrr_mask)
for _fixed in _MTRR_FIXED:
    TABLE[_fixed] = Msr(check=_memory_types(_MTRR_TYPES))


def supported_msrs() -> tuple[int, ...]:
    """The indices whose values a saved state must contain."""
    return tuple(index for index, msr in TABLE.items() if not msr.read_only and not msr.write_only)


def _find(cpu: Processor, index: int, host: bool) -> Msr:
    found = TABLE.get(index)
    if found is None or (found.feature and not host and not getattr(cpu.features, found.feature)):
        raise Fault.gp()
    return found


def read_msr(cpu: Processor, index: int, *, host: bool = False) -> int:
    """The value; #GP(0) for what does not exist.  ``host``: whatever the guest's CPUID says."""
    found = _find(cpu, index, host)
    if found.write_only:
        if host:
            return 0
        raise Fault.gp()
    return found.read(cpu) if found.read else cpu.msrs.get(index, found.initial)


def write_msr(cpu: Processor, index: int, value: int, *, host: bool = False) -> None:
    """Store 64 bits; #GP(0) for what does not exist, is read-only or does not take the value."""
    found = _find(cpu, index, host)
    if found.read_only and not (host and value == read_msr(cpu, index, host=True)):
        raise Fault.gp()
    if found.check:
        found.check(cpu, value)
    if found.write:
        found.write(cpu, value)
    elif not found.read_only and not found.write_only:
        cpu.msrs[index] = value


# --- the instructions -------------------------------------------------------------------------------------


@semantics("rdmsr")
def rdmsr(cpu: Processor, insn: Instruction) -> None:
    require_cpl0(cpu)
    value = read_msr(cpu, cpu.regs[RCX] & _M32)
    cpu.regs[RAX], cpu.regs[RDX] = value & _M32, value >> 32


@semantics("wrmsr")
def wrmsr(cpu: Processor, insn: Instruction) -> None:
    require_cpl0(cpu)
    value = (cpu.regs[RDX] & _M32) << 32 | cpu.regs[RAX] & _M32
    write_msr(cpu, cpu.regs[RCX] & _M32, value)
