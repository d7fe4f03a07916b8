"""GDTR and IDTR, and instructions on translations and caches (SDM vol. 2, LGDT, SGDT, INVLPG, INVPCID)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.control import refuse_under_umip, require_cpl0
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import Memory, Register
from pykvm.model.cpu.semantics import semantics
from pykvm.x86.bits import Cr4
from pykvm.x86.registers import DescriptorTable

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_BASE24: Final = 0xFFFFFF
_TOP: Final = 0xFFFFFFFFFFFFFFFF


def require_canonical(cpu: Processor, address: int) -> None:
    """#GP(0) unless the upper bits of ``address`` repeat its sign (SDM vol. 1, 3.3.7.1)."""
    if not cpu.is_canonical(address):
        raise Fault.gp()


def _memory(insn: Instruction) -> Memory:
    """The memory operand of an instruction that has no register form."""
    operand = insn.operands[-1]
    if not isinstance(operand, Memory):
        raise Fault.ud()
    return operand


def _load_table(cpu: Processor, insn: Instruction) -> DescriptorTable:
    """Limit and base: 8 bytes of base in 64-bit mode, else 4, of which a 16-bit operand size uses 3."""
    source = _memory(insn)
    require_cpl0(cpu)
    size = 8 if cpu.bits64 else 4
    value = int.from_bytes(cpu.load_bytes(source.segment, source.offset(cpu), 2 + size), "little")
    base = value >> 16
    if cpu.bits64:
        require_canonical(cpu, base)
    elif insn.operand_size == 2:
        base &= _BASE24
    return DescriptorTable(base, value & 0xFFFF)


def _store_table(cpu: Processor, insn: Instruction, table: DescriptorTable) -> None:
    target = _memory(insn)
    refuse_under_umip(cpu)
    base, size = (table.base, 8) if cpu.bits64 else (table.base & 0xFFFFFFFF, 4)
    if not cpu.bits64 and insn.operand_size == 2:
        base &= _BASE24
    data = (base << 16 | table.limit).to_bytes(2 + size, "little")
    cpu.store_bytes(target.segment, target.offset(cpu), data)


@semantics("lgdt")
def lgdt(cpu: Processor, insn: Instruction) -> None:
    cpu.gdt = _load_table(cpu, insn)


@semantics("lidt")
def lidt(cpu: Processor, insn: Instruction) -> None:
    cpu.idt = _load_table(cpu, insn)


@semantics("sgdt")
def sgdt(cpu: Processor, insn: Instruction) -> None:
    _store_table(cpu, insn, cpu.gdt)


@semantics("sidt")
def sidt(cpu: Processor, insn: Instruction) -> None:
    _store_table(cpu, insn, cpu.idt)


@semantics("invlpg")
def invlpg(cpu: Processor, insn: Instruction) -> None:
    """Drops the translations of one page; no address is wrong."""
    target = _memory(insn)
    require_cpl0(cpu)
    address = cpu.windows[target.segment].base + target.offset(cpu)
    cpu.flush_page(address & (_TOP if cpu.bits64 else 0xFFFFFFFF))


@semantics("invpcid")
def invpcid(cpu: Processor, insn: Instruction) -> None:
    """Type 0 one address, 1 one PCID, 2 everything, 3 everything but global pages: all are flushed."""
    source = _memory(insn)
    if not cpu.features.invpcid:
        raise Fault.ud()
    require_cpl0(cpu)
    kind = insn.operands[0]
    assert isinstance(kind, Register)
    descriptor = cpu.load_bytes(source.segment, source.offset(cpu), 16)
    pcid, address = int.from_bytes(descriptor[:8], "little"), int.from_bytes(descriptor[8:], "little")
    type_ = kind.read(cpu)
    if type_ > 3 or pcid >> 12:
        raise Fault.gp()
    if type_ < 2 and pcid and not cpu.cr4 & Cr4.PCIDE:
        raise Fault.gp()
    if type_ == 0:
        require_canonical(cpu, address)
    cpu.flush_pcid(type_, pcid, address)


@semantics("wbinvd", "wbnoinvd", "invd")
def wbinvd(cpu: Processor, insn: Instruction) -> None:
    """There are no data caches here.  A processor without WBNOINVD runs it as WBINVD."""
    require_cpl0(cpu)
