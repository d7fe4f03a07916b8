"""SYSCALL, SYSRET, SYSENTER and SYSEXIT (SDM vol. 2; APM vol. 3, where AMD's processors differ)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import msrs
from pykvm.model.cpu.control import require_cpl0
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import CS, R11, RCX, RDX, RSP, SS
from pykvm.model.cpu.semantics import semantics
from pykvm.x86.bits import Efer, Rflags
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_M32: Final = 0xFFFFFFFF
_M64: Final = 0xFFFFFFFFFFFFFFFF
_SELECTOR: Final = 0xFFFC
_SYSRET_FLAGS: Final = 0x3C7FD7  # all but RF and VM
_RF, _VM, _IF, _TF = int(Rflags.RF), int(Rflags.VM), int(Rflags.IF), int(Rflags.TF)


def _code(selector: int, *, wide: bool = False) -> Segment:
    """CS as these instructions make it, flat, whatever the descriptor says; its RPL is the new CPL."""
    return Segment(
        limit=_M32, selector=selector, type=0xB, dpl=selector & 3, db=int(not wide), l=int(wide), g=1
    )


def _stack(selector: int) -> Segment:
    return Segment(limit=_M32, selector=selector, type=3, dpl=selector & 3, db=1, g=1)


def _enter(cpu: Processor, code: Segment, stack: Segment) -> None:
    cpu.segments[CS] = code
    cpu.set_segment(SS, stack)


# --- SYSCALL and SYSRET ----------------------------------------------------------------------------------


def _require_syscall(cpu: Processor) -> None:
    """#UD without EFER.SCE; Intel's processors have SYSCALL and SYSRET in 64-bit mode only."""
    if not cpu.efer & Efer.SCE or cpu.real_or_vm86 or not (cpu.bits64 or cpu.features.amd):
        raise Fault.ud()


@semantics("syscall")
def syscall(cpu: Processor, insn: Instruction) -> None:
    """No stack switch and no checks.  TF decides by its new value whether a single-step trap follows."""
    _require_syscall(cpu)
    star = cpu.msrs.get(msrs.STAR, 0)
    selector = star >> 32 & _SELECTOR
    cpu.regs[RCX] = cpu.next_rip
    if cpu.long_mode:
        cpu.regs[R11] = cpu.rflags & ~_RF
        cpu.next_rip = cpu.msrs.get(msrs.LSTAR if cpu.bits64 else msrs.CSTAR, 0)
        cpu.set_rflags(cpu.rflags & ~(cpu.msrs.get(msrs.SYSCALL_MASK, 0) & _M32 | _RF))
    else:
        cpu.next_rip = star & _M32
        cpu.set_rflags(cpu.rflags & ~(_IF | _VM | _RF))
    _enter(cpu, _code(selector, wide=cpu.long_mode), _stack(selector + 8))
    cpu.single_step = bool(cpu.rflags & _TF)


@semantics("sysret", "sysretq")
def sysret(cpu: Processor, insn: Instruction) -> None:
    """To CPL 3: 64-bit code with REX.W, else 32-bit code.

    A return address that is not canonical raises #GP(0) here on Intel's processors, and on AMD's only when
    it is fetched.  AMD's leave the attributes of SS alone.
    """
    _require_syscall(cpu)
    require_cpl0(cpu)
    star = cpu.msrs.get(msrs.STAR, 0)
    wide = insn.operand_size == 8
    selector = (star >> 48) + 16 * wide | 3
    target = cpu.regs[RCX] if wide else cpu.regs[RCX] & _M32
    if wide and not cpu.features.amd and not cpu.is_canonical(target):
        raise Fault.gp()
    if cpu.long_mode:
        cpu.set_rflags(cpu.regs[R11] & _SYSRET_FLAGS)
    else:
        cpu.set_rflags(cpu.rflags | _IF)
    stack = (star >> 48) + 8 | 3
    kept = replace(cpu.segments[SS], selector=stack, dpl=3)
    _enter(cpu, _code(selector, wide=wide), kept if cpu.features.amd else _stack(stack))
    cpu.next_rip = target


# --- SYSENTER and SYSEXIT --------------------------------------------------------------------------------


def _require_sysenter(cpu: Processor) -> None:
    """AMD's processors have SYSENTER and SYSEXIT outside IA-32e mode only."""
    if cpu.features.amd and cpu.long_mode:
        raise Fault.ud()
    if not cpu.protected_mode or not cpu.features.sep:
        raise Fault.gp() if cpu.features.sep else Fault.ud()


@semantics("sysenter")
def sysenter(cpu: Processor, insn: Instruction) -> None:
    """To CPL 0; a null IA32_SYSENTER_CS raises #GP(0).  From virtual-8086 mode, too."""
    _require_sysenter(cpu)
    selector = cpu.msrs.get(msrs.SYSENTER_CS, 0) & _SELECTOR
    if not selector:
        raise Fault.gp()
    wide = cpu.long_mode
    mask = _M64 if wide else _M32
    cpu.set_rflags(cpu.rflags & ~(_VM | _IF | _RF))
    cpu.regs[RSP] = cpu.msrs.get(msrs.SYSENTER_ESP, 0) & mask
    cpu.next_rip = cpu.msrs.get(msrs.SYSENTER_EIP, 0) & mask
    _enter(cpu, _code(selector, wide=wide), _stack(selector + 8))


@semantics("sysexit", "sysexitq")
def sysexit(cpu: Processor, insn: Instruction) -> None:
    """To CPL 3 at EDX with ESP from ECX; with REX.W to 64-bit code, whose addresses must be canonical."""
    _require_sysenter(cpu)
    selector = cpu.msrs.get(msrs.SYSENTER_CS, 0) & _SELECTOR
    require_cpl0(cpu)
    if cpu.vm86 or not selector:
        raise Fault.gp()
    wide = insn.operand_size == 8
    target, rsp = cpu.regs[RDX], cpu.regs[RCX]
    if wide and not (cpu.is_canonical(target) and cpu.is_canonical(rsp)):
        raise Fault.gp()
    code = selector + (32 if wide else 16) | 3
    _enter(cpu, _code(code, wide=wide), _stack(code + 8 | 3))
    cpu.regs[RSP] = rsp if wide else rsp & _M32
    cpu.next_rip = target if wide else target & _M32
