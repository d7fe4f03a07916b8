"""Control registers: MOV CRn, LMSW, SMSW, CLTS, and what a change of mode needs (SDM vol. 3, 2.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import CS, ControlRegister
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.stacks import TSS16_TYPES
from pykvm.x86.bits import Cr0, Cr4, Efer

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_CR0_BITS: Final = (
    Cr0.PE | Cr0.MP | Cr0.EM | Cr0.TS | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.NW | Cr0.CD | Cr0.PG
)  # fmt: skip
_CR4_ALWAYS: Final = (
    Cr4.VME | Cr4.PVI | Cr4.TSD | Cr4.DE | Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.PCE
    | Cr4.OSFXSR | Cr4.OSXMMEXCPT
)  # fmt: skip
"""What every processor since the Pentium III has; like KVM we let a guest use them whatever CPUID says."""
_CR4_BY_FEATURE: Final = {
    "umip": Cr4.UMIP,
    "la57": Cr4.LA57,
    "fsgsbase": Cr4.FSGSBASE,
    "pcid": Cr4.PCIDE,
    "xsave": Cr4.OSXSAVE,
    "smep": Cr4.SMEP,
    "smap": Cr4.SMAP,
    "pku": Cr4.PKE,
    "pks": Cr4.PKS,
}
_CR3_NO_FLUSH: Final = 1 << 63
_PDPTE_CR0: Final = Cr0.PG | Cr0.CD | Cr0.NW
_PDPTE_CR4: Final = Cr4.PAE | Cr4.PGE | Cr4.PSE | Cr4.SMEP
"""Bits whose change loads the PDPTE registers (SDM vol. 3, 4.4.1)."""
_LMSW_BITS: Final = Cr0.PE | Cr0.MP | Cr0.EM | Cr0.TS


def require_cpl0(cpu: Processor) -> None:
    """#GP(0) for unprivileged code."""
    if cpu.cpl:
        raise Fault.gp()


def refuse_under_umip(cpu: Processor) -> None:
    """SGDT, SIDT, SLDT, SMSW and STR outside CPL 0 with CR4.UMIP: #GP(0) (SDM vol. 3, 2.5)."""
    if cpu.cpl and cpu.cr4 & Cr4.UMIP:
        raise Fault.gp()


# --- CR0 ------------------------------------------------------------------------------------------------


def set_cr0(cpu: Processor, value: int) -> None:
    """MOV to CR0 (SDM vol. 2, MOV to/from Control Registers): undefined low bits are ignored, ET is 1."""
    if value >> 32:
        raise Fault.gp()
    value = value & _CR0_BITS | Cr0.ET
    if (value & Cr0.PG and not value & Cr0.PE) or (value & Cr0.NW and not value & Cr0.CD):
        raise Fault.gp()
    efer = cpu.efer
    if value & Cr0.PG and not cpu.cr0 & Cr0.PG and efer & Efer.LME:
        _check_activation(cpu)
        efer |= Efer.LMA
    if cpu.cr0 & Cr0.PG and not value & Cr0.PG:
        if cpu.bits64 or cpu.cr4 & Cr4.PCIDE:
            raise Fault.gp()
        efer &= ~Efer.LMA
    loads = value & Cr0.PG and cpu.cr4 & Cr4.PAE and not efer & Efer.LMA
    if loads and (value ^ cpu.cr0) & _PDPTE_CR0:
        cpu.pdptrs = cpu.load_pdptrs()
    cpu.cr0, cpu.efer = int(value), int(efer)
    cpu.update_mode()
    cpu.control_changed()


def _check_activation(cpu: Processor) -> None:
    """What setting PG with EFER.LME needs (SDM vol. 3, 10.8.5.1)."""
    tss16 = cpu.tr.type in TSS16_TYPES and not cpu.features.amd
    if not cpu.cr4 & Cr4.PAE or cpu.segments[CS].l or tss16:
        raise Fault.gp()


@semantics("lmsw")
def lmsw(cpu: Processor, insn: Instruction) -> None:
    """Loads PE, MP, EM and TS; PE cannot be cleared with it."""
    require_cpl0(cpu)
    source = insn.operands[0].read(cpu)
    set_cr0(cpu, cpu.cr0 & ~(_LMSW_BITS & ~Cr0.PE) | source & _LMSW_BITS)


@semantics("smsw")
def smsw(cpu: Processor, insn: Instruction) -> None:
    """Memory takes 16 bits of CR0, a register as many as it has."""
    refuse_under_umip(cpu)
    target = insn.operands[0]
    target.write(cpu, cpu.cr0 & (1 << 8 * target.size) - 1)


@semantics("clts")
def clts(cpu: Processor, insn: Instruction) -> None:
    require_cpl0(cpu)
    cpu.cr0 &= ~int(Cr0.TS)


# --- CR3 ------------------------------------------------------------------------------------------------


def set_cr3(cpu: Processor, value: int) -> None:
    """MOV to CR3.  Bit 63 with CR4.PCIDE only asks not to flush; our caches are coherent, so flushing
    all the same shows nowhere but in what a host's KVM counts."""
    keeps = bool(cpu.cr4 & Cr4.PCIDE and value & _CR3_NO_FLUSH)
    if cpu.cr4 & Cr4.PCIDE:
        value &= ~_CR3_NO_FLUSH
    if value >> cpu.features.physical_bits and cpu.long_mode:
        raise Fault.gp()
    before = cpu.cr3
    cpu.cr3 = value
    if cpu.pae_paging:
        try:
            cpu.pdptrs = cpu.load_pdptrs()
        except Fault:
            cpu.cr3 = before
            raise
    cpu.control_changed(loads_cr3=True, keeps_pcid=keeps)


# --- CR4 ------------------------------------------------------------------------------------------------


def cr4_allowed(cpu: Processor) -> int:
    """The bits of CR4 that are not reserved for this processor."""
    allowed = int(_CR4_ALWAYS)
    for feature, bit in _CR4_BY_FEATURE.items():
        if getattr(cpu.features, feature):
            allowed |= int(bit)  # ~ of an IntFlag knows only named bits
    return allowed


def set_cr4(cpu: Processor, value: int) -> None:
    """MOV to CR4 (SDM vol. 2, MOV-Move to/from Control Registers; vol. 3, 4.1.2 and 4.10.1)."""
    changed = value ^ cpu.cr4
    if value & ~cr4_allowed(cpu):
        raise Fault.gp()
    if cpu.long_mode and (not value & Cr4.PAE or changed & Cr4.LA57):
        raise Fault.gp()
    if changed & value & Cr4.PCIDE and (not cpu.long_mode or cpu.cr3 & 0xFFF):
        raise Fault.gp()
    loads = cpu.cr0 & Cr0.PG and value & Cr4.PAE and not cpu.long_mode
    if loads and changed & _PDPTE_CR4:
        cpu.pdptrs = cpu.load_pdptrs()
    cpu.cr4 = int(value)
    cpu.update_mode()
    cpu.control_changed()


# --- CR2, CR8, and the instruction ----------------------------------------------------------------------


def set_cr2(cpu: Processor, value: int) -> None:
    cpu.cr2 = value


def set_cr8(cpu: Processor, value: int) -> None:
    """The task priority: bits 63:4 are reserved (SDM vol. 3, 11.8.6)."""
    if value >> 4:
        raise Fault.gp()
    cpu.cr8 = value


_READ: Final = {
    0: lambda cpu: cpu.cr0,
    2: lambda cpu: cpu.cr2,
    3: lambda cpu: cpu.cr3,
    4: lambda cpu: cpu.cr4,
    8: lambda cpu: cpu.cr8,
}
_WRITE: Final = {0: set_cr0, 2: set_cr2, 3: set_cr3, 4: set_cr4, 8: set_cr8}


@semantics("mov_cr", undefined=0x8D5)
def mov_cr(cpu: Processor, insn: Instruction) -> None:
    """64 bits wide in 64-bit mode, else 32; CR1, CR5 to CR7 and CR9 to CR15 raise #UD."""
    target, source = insn.operands
    register = target if isinstance(target, ControlRegister) else source
    assert isinstance(register, ControlRegister)
    if register.index not in _READ:
        raise Fault.ud()
    require_cpl0(cpu)
    if register is target:
        _WRITE[register.index](cpu, source.read(cpu))
    else:
        target.write(cpu, _READ[register.index](cpu) & (1 << 8 * target.size) - 1)
