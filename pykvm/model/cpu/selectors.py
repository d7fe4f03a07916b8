"""LDTR, TR and questions about selectors (SDM vol. 2, LLDT, LTR, SLDT, STR, LAR, LSL, VERR, ARPL)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.control import refuse_under_umip, require_cpl0
from pykvm.model.cpu.descriptors import (
    CODE,
    READABLE,
    WRITABLE,
    System,
    descriptor_address,
    error_code,
    is_conforming,
    is_null,
    null_segment,
    read_descriptor,
    segment_of,
    set_type,
)
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.semantics import semantics
from pykvm.x86.bits import Rflags
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_ZF: Final = int(Rflags.ZF)
_BUSY: Final = 2
_TSS: Final = frozenset({System.TSS16, System.TSS16_BUSY, System.TSS32, System.TSS32_BUSY})
_CALL_AND_TASK: Final = frozenset({System.CALL16, System.TASK, System.CALL32})
_LONG_TYPES: Final = frozenset({System.LDT, System.TSS32, System.TSS32_BUSY})


def _require_protected(cpu: Processor) -> None:
    """These instructions are unknown in real-address and virtual-8086 mode."""
    if cpu.real_or_vm86:
        raise Fault.ud()


# --- LDTR and TR -----------------------------------------------------------------------------------------


def _system_segment(cpu: Processor, selector: int) -> Segment:
    """An LDT or TSS descriptor from the GDT: 16 bytes with a 64-bit base in IA-32e mode."""
    error = error_code(selector)
    if selector & 4:
        raise Fault.gp(error)
    raw = read_descriptor(cpu, selector, size=16 if cpu.long_mode else 8)
    segment = segment_of(selector, raw & 0xFFFFFFFFFFFFFFFF)
    if not cpu.long_mode:
        return segment
    base = segment.base | (raw >> 64 & 0xFFFFFFFF) << 32
    # the type field of the upper half must be 0 (SDM vol. 3, 3.5.2 and 7.2.3)
    if raw >> 104 & 0x1F or not cpu.is_canonical(base):
        raise Fault.gp(error)
    return replace(segment, base=base)


@semantics("lldt")
def lldt(cpu: Processor, insn: Instruction) -> None:
    _require_protected(cpu)
    require_cpl0(cpu)
    selector = insn.operands[0].read(cpu)
    if is_null(selector):
        cpu.ldt = null_segment(selector)
        return
    segment = _system_segment(cpu, selector)
    if segment.s or segment.type != System.LDT:
        raise Fault.gp(error_code(selector))
    if not segment.present:
        raise Fault.np(error_code(selector))
    cpu.ldt = segment


@semantics("ltr")
def ltr(cpu: Processor, insn: Instruction) -> None:
    """Marks the TSS busy."""
    _require_protected(cpu)
    require_cpl0(cpu)
    selector = insn.operands[0].read(cpu)
    if is_null(selector):
        raise Fault.gp()
    segment = _system_segment(cpu, selector)
    available = (System.TSS32,) if cpu.long_mode else (System.TSS16, System.TSS32)
    if segment.s or segment.type not in available:
        raise Fault.gp(error_code(selector))
    if not segment.present:
        raise Fault.np(error_code(selector))
    cpu.tr = set_type(cpu, segment, segment.type | _BUSY)


def _store_selector(cpu: Processor, insn: Instruction, selector: int) -> None:
    """16 bits to memory; a register gets the operand size, zero-extended."""
    _require_protected(cpu)
    refuse_under_umip(cpu)
    insn.operands[0].write(cpu, selector)


@semantics("sldt")
def sldt(cpu: Processor, insn: Instruction) -> None:
    _store_selector(cpu, insn, cpu.ldt.selector)


@semantics("str")
def store_task_register(cpu: Processor, insn: Instruction) -> None:
    _store_selector(cpu, insn, cpu.tr.selector)


# --- questions -------------------------------------------------------------------------------------------


def _read_selector(cpu: Processor, insn: Instruction, position: int) -> int:
    return insn.operands[position].read(cpu) & 0xFFFF


def _visible(cpu: Processor, selector: int) -> tuple[Segment, int] | None:
    """The descriptor and its bytes if selector and privilege let the program see it; no fault otherwise."""
    if is_null(selector) or descriptor_address(cpu, selector) is None:
        return None
    raw = read_descriptor(cpu, selector)
    segment = segment_of(selector, raw)
    if not is_conforming(segment) and max(cpu.cpl, selector & 3) > segment.dpl:
        return None
    return segment, raw


def _answer(cpu: Processor, yes: bool) -> None:
    cpu.rflags = cpu.rflags | _ZF if yes else cpu.rflags & ~_ZF


@semantics("lar")
def lar(cpu: Processor, insn: Instruction) -> None:
    """The second doubleword of the descriptor, masked; ZF says whether there is one to see."""
    _require_protected(cpu)
    known = _LONG_TYPES | {System.CALL32} if cpu.long_mode else _TSS | _CALL_AND_TASK | {System.LDT}
    found = _visible(cpu, _read_selector(cpu, insn, 1))
    if found and not found[0].s and found[0].type not in known:
        found = None
    _answer(cpu, found is not None)
    if found:
        rights = found[1] >> 32 & 0x00FFFF00
        insn.operands[0].write(cpu, rights & (0xFFFF if insn.operand_size == 2 else 0xFFFFFFFF))


@semantics("lsl")
def lsl(cpu: Processor, insn: Instruction) -> None:
    """The limit in bytes; gates have none."""
    _require_protected(cpu)
    known = _LONG_TYPES if cpu.long_mode else _TSS | {System.LDT}
    found = _visible(cpu, _read_selector(cpu, insn, 1))
    if found and not found[0].s and found[0].type not in known:
        found = None
    _answer(cpu, found is not None)
    if found:
        insn.operands[0].write(cpu, found[0].limit & (0xFFFF if insn.operand_size == 2 else 0xFFFFFFFF))


@semantics("verr")
def verr(cpu: Processor, insn: Instruction) -> None:
    """Whether the segment is readable from here."""
    _require_protected(cpu)
    found = _visible(cpu, _read_selector(cpu, insn, 0))
    _answer(
        cpu,
        bool(found and found[0].s and (not found[0].type & CODE or found[0].type & READABLE)),
    )


@semantics("verw")
def verw(cpu: Processor, insn: Instruction) -> None:
    """Whether it is writable."""
    _require_protected(cpu)
    found = _visible(cpu, _read_selector(cpu, insn, 0))
    _answer(cpu, bool(found and found[0].s and not found[0].type & CODE and found[0].type & WRITABLE))


@semantics("arpl")
def arpl(cpu: Processor, insn: Instruction) -> None:
    """Raise the RPL of the destination to that of the source; else it is not written (host)."""
    _require_protected(cpu)
    target, source = insn.operands
    selector, rpl = target.read(cpu) & 0xFFFF, source.read(cpu) & 3
    raised = selector & 3 < rpl
    _answer(cpu, raised)
    if raised:
        target.write(cpu, selector & ~3 | rpl)
