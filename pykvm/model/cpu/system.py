"""Small system instructions: time, HLT, extended control registers, segment bases, keys, hypercalls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.machine.exits import Halted
from pykvm.model.cpu.control import require_cpl0
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import CF, STATUS
from pykvm.model.cpu.instruction import FS, GS, RAX, RCX, RDX
from pykvm.model.cpu.msrs import GS_BASE, KERNEL_GS_BASE, TSC_AUX, read_msr, read_tsc, write_base
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.xstate import X87, in_use, supported_xcr0
from pykvm.x86.bits import Cr4, Rflags

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_M32: Final = 0xFFFFFFFF
_M64: Final = 0xFFFFFFFFFFFFFFFF
_KVM_ENOSYS: Final = -1000
_KVM_EPERM: Final = -1


def _put_edx_eax(cpu: Processor, value: int) -> None:
    cpu.regs[RAX], cpu.regs[RDX] = value & _M32, value >> 32


def _require(present: bool | int) -> None:
    if not present:
        raise Fault.ud()


@semantics("hlt")
def hlt(cpu: Processor, insn: Instruction) -> None:
    require_cpl0(cpu)
    cpu.exits.append(Halted())


@semantics("monitor", "mwait")
def monitor(cpu: Processor, insn: Instruction) -> None:
    """As KVM has them where CPUID offers them: no waiting."""
    _require(cpu.features.monitor and not cpu.cpl)
    if cpu.regs[RCX] & _M32:
        raise Fault.gp()
    if insn.name == "monitor":
        cpu.load(insn.segment_or(3), cpu.regs[RAX] & insn.address_mask, 1)


# --- time and chance --------------------------------------------------------------------------------------


@semantics("rdtsc")
def rdtsc(cpu: Processor, insn: Instruction) -> None:
    if cpu.cpl and cpu.cr4 & Cr4.TSD:
        raise Fault.gp()
    _put_edx_eax(cpu, read_tsc(cpu))


@semantics("rdtscp")
def rdtscp(cpu: Processor, insn: Instruction) -> None:
    _require(cpu.features.rdtscp)
    rdtsc(cpu, insn)
    cpu.regs[RCX] = read_msr(cpu, TSC_AUX)


@semantics("rdpid")
def rdpid(cpu: Processor, insn: Instruction) -> None:
    _require(cpu.features.rdpid)
    insn.operands[0].write(cpu, read_msr(cpu, TSC_AUX))


@semantics("rdpmc")
def rdpmc(cpu: Processor, insn: Instruction) -> None:
    """There are no performance counters, so every index is wrong."""
    raise Fault.gp()


def _scramble(value: int) -> int:
    """A bijection of 64-bit integers whose results look random (the finalizer of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _M64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _M64
    return value ^ value >> 31


@semantics("rdrand", "rdseed")
def rdrand(cpu: Processor, insn: Instruction) -> None:
    """Made from the time-stamp counter, so that runs repeat exactly; always succeeds (CF)."""
    _require(cpu.features.rdrand if insn.name == "rdrand" else cpu.features.rdseed)
    target = insn.operands[0]
    golden = 0x9E3779B97F4A7C15
    target.write(cpu, _scramble((read_tsc(cpu) + 1) * golden & _M64) & (1 << 8 * target.size) - 1)
    cpu.rflags = cpu.rflags & ~STATUS | CF


# --- extended control registers ---------------------------------------------------------------------------


@semantics("xgetbv")
def xgetbv(cpu: Processor, insn: Instruction) -> None:
    """XCR0, or with ECX 1 the components of it that are in use."""
    _require(cpu.cr4 & Cr4.OSXSAVE)
    index = cpu.regs[RCX] & _M32
    if index > 1 or (index and not cpu.features.xgetbv1):
        raise Fault.gp()
    _put_edx_eax(cpu, cpu.xcr0 & in_use(cpu) if index else cpu.xcr0)


@semantics("xsetbv")
def xsetbv(cpu: Processor, insn: Instruction) -> None:
    _require(cpu.cr4 & Cr4.OSXSAVE)
    require_cpl0(cpu)
    value = (cpu.regs[RDX] & _M32) << 32 | cpu.regs[RAX] & _M32
    if cpu.regs[RCX] & _M32 or not value & X87 or value & ~supported_xcr0(cpu):
        raise Fault.gp()
    cpu.xcr0 = value


# --- segment bases ----------------------------------------------------------------------------------------


@semantics("swapgs")
def swapgs(cpu: Processor, insn: Instruction) -> None:
    _require(cpu.bits64)
    require_cpl0(cpu)
    kernel = cpu.msrs.get(KERNEL_GS_BASE, 0)
    cpu.msrs[KERNEL_GS_BASE] = read_msr(cpu, GS_BASE, host=True)
    write_base(GS)(cpu, kernel)


def _require_fsgsbase(cpu: Processor) -> None:
    _require(cpu.bits64 and cpu.cr4 & Cr4.FSGSBASE)


def _read_base(cpu: Processor, insn: Instruction, segment: int) -> None:
    _require_fsgsbase(cpu)
    target = insn.operands[0]
    target.write(cpu, cpu.segments[segment].base & (1 << 8 * target.size) - 1)


@semantics("rdfsbase")
def rdfsbase(cpu: Processor, insn: Instruction) -> None:
    _read_base(cpu, insn, FS)


@semantics("rdgsbase")
def rdgsbase(cpu: Processor, insn: Instruction) -> None:
    _read_base(cpu, insn, GS)


@semantics("wrfsbase")
def wrfsbase(cpu: Processor, insn: Instruction) -> None:
    _require_fsgsbase(cpu)
    write_base(FS)(cpu, insn.operands[0].read(cpu))


@semantics("wrgsbase")
def wrgsbase(cpu: Processor, insn: Instruction) -> None:
    _require_fsgsbase(cpu)
    write_base(GS)(cpu, insn.operands[0].read(cpu))


# --- SMAP and protection keys -----------------------------------------------------------------------------


@semantics("clac")
def clac(cpu: Processor, insn: Instruction) -> None:
    _require(cpu.features.smap and not cpu.cpl)
    cpu.set_rflags(cpu.rflags & ~Rflags.AC)


@semantics("stac")
def stac(cpu: Processor, insn: Instruction) -> None:
    _require(cpu.features.smap and not cpu.cpl)
    cpu.set_rflags(cpu.rflags | Rflags.AC)


@semantics("rdpkru")
def rdpkru(cpu: Processor, insn: Instruction) -> None:
    _require(cpu.cr4 & Cr4.PKE)
    if cpu.regs[RCX] & _M32:
        raise Fault.gp()
    _put_edx_eax(cpu, cpu.pkru)


@semantics("wrpkru")
def wrpkru(cpu: Processor, insn: Instruction) -> None:
    _require(cpu.cr4 & Cr4.PKE)
    if cpu.regs[RCX] & _M32 or cpu.regs[RDX] & _M32:
        raise Fault.gp()
    cpu.pkru = cpu.regs[RAX] & _M32
    cpu.flush_tlb()


# --- hypercalls -------------------------------------------------------------------------------------------


@semantics("vmcall", "vmmcall")
def vmcall(cpu: Processor, insn: Instruction) -> None:
    """KVM's hypercalls, of which this machine has none; both names work whatever the vendor."""
    result = _KVM_EPERM if cpu.cpl else _KVM_ENOSYS
    cpu.regs[RAX] = result & (_M64 if cpu.bits64 else _M32)
