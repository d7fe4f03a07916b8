"""x87 control: FNINIT, control and status word, environment, FNSAVE, stack management (SDM vol. 1, ch. 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import x87_registers as stack
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import Memory, StackRegister
from pykvm.model.cpu.semantics import semantics
from pykvm.x86.bits import Cr0
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_ONES: Final = 0xFFFF0000
"""The upper halves of 32-bit slots that hold 16 bits."""
_REGISTER_BYTES: Final = 10
_ST_MASK: Final = (1 << 80) - 1


# --- conditions and exceptions ----------------------------------------------------------------------------


def require_x87(cpu: Processor, *, waiting: bool = True) -> None:
    """#NM with CR0.EM or TS; ``waiting`` instructions raise #MF for a pending exception (SDM vol. 1, 8.6)."""
    if cpu.cr0 & (Cr0.EM | Cr0.TS):
        raise Fault.nm()
    if waiting and cpu.x87.status & stack.SUMMARY:
        raise Fault(Vector.MF)


def begin(cpu: Processor, insn: Instruction) -> None:
    """Check the conditions of an instruction that is not a control instruction.

    Call ``done`` at its end.
    """
    require_x87(cpu)


def done(cpu: Processor, insn: Instruction) -> None:
    """Note which instruction it was and its memory operand (SDM vol. 1, 8.1.8 and 8.1.9)."""
    x87 = cpu.x87
    assert insn.modrm is not None
    x87.opcode = (insn.opcode[0] & 7) << 8 | insn.modrm
    x87.instruction_pointer = cpu.rip
    if insn.operands and isinstance(insn.operands[-1], Memory):
        x87.data_pointer = insn.operands[-1].offset(cpu)


def signal(cpu: Processor, flags: int) -> bool:
    """Set exception flags (and C1 or SF among them); whether one of them is unmasked.

    An unmasked one waits in ES for the next waiting instruction.
    """
    x87 = cpu.x87
    x87.status |= flags
    stack.summarize(x87)
    return bool(flags & ~x87.control & stack.EXCEPTIONS)


def clear_c1(cpu: Processor) -> None:
    cpu.x87.status &= ~stack.C1


# --- the instructions without operands --------------------------------------------------------------------


@semantics("wait")
def wait(cpu: Processor, insn: Instruction) -> None:
    """FWAIT: #NM needs CR0.MP besides TS."""
    if cpu.cr0 & Cr0.MP and cpu.cr0 & Cr0.TS:
        raise Fault.nm()
    if cpu.x87.status & stack.SUMMARY:
        raise Fault(Vector.MF)


@semantics("fninit")
def fninit(cpu: Processor, insn: Instruction) -> None:
    require_x87(cpu, waiting=False)
    stack.initialize(cpu.x87)


@semantics("fnclex")
def fnclex(cpu: Processor, insn: Instruction) -> None:
    require_x87(cpu, waiting=False)
    cpu.x87.status &= 0x7F00


@semantics("fnop")
def fnop(cpu: Processor, insn: Instruction) -> None:
    begin(cpu, insn)
    done(cpu, insn)


@semantics("feni8087_nop", "fdisi8087_nop", "fsetpm")
def fsetpm(cpu: Processor, insn: Instruction) -> None:
    """Meant something to the 8087 and 80287 (SDM vol. 3, 24.18.8)."""
    require_x87(cpu, waiting=False)


@semantics("fincstp")
def fincstp(cpu: Processor, insn: Instruction) -> None:
    begin(cpu, insn)
    clear_c1(cpu)
    stack.set_top(cpu.x87, stack.top(cpu.x87) + 1)
    done(cpu, insn)


@semantics("fdecstp")
def fdecstp(cpu: Processor, insn: Instruction) -> None:
    begin(cpu, insn)
    clear_c1(cpu)
    stack.set_top(cpu.x87, stack.top(cpu.x87) - 1)
    done(cpu, insn)


@semantics("ffree")
def ffree(cpu: Processor, insn: Instruction) -> None:
    begin(cpu, insn)
    clear_c1(cpu)
    stack.set_empty(cpu.x87, _index(insn))
    done(cpu, insn)


@semantics("ffreep")
def ffreep(cpu: Processor, insn: Instruction) -> None:
    """FFREE and pop; not in the SDM, but in all processors (APM vol. 5, appendix)."""
    begin(cpu, insn)
    clear_c1(cpu)
    stack.set_empty(cpu.x87, _index(insn))
    pop(cpu)
    done(cpu, insn)


def _index(insn: Instruction) -> int:
    operand = insn.operands[-1]
    assert isinstance(operand, StackRegister)
    return operand.index


def pop(cpu: Processor) -> None:
    """Mark ST(0) empty and move TOP."""
    stack.set_empty(cpu.x87, 0)
    stack.set_top(cpu.x87, stack.top(cpu.x87) + 1)


# --- control and status word ------------------------------------------------------------------------------


@semantics("fldcw")
def fldcw(cpu: Processor, insn: Instruction) -> None:
    require_x87(cpu)
    stack.set_control(cpu.x87, insn.operands[0].read(cpu))


@semantics("fnstcw")
def fnstcw(cpu: Processor, insn: Instruction) -> None:
    require_x87(cpu, waiting=False)
    insn.operands[0].write(cpu, cpu.x87.control)


@semantics("fnstsw")
def fnstsw(cpu: Processor, insn: Instruction) -> None:
    """To memory or AX."""
    require_x87(cpu, waiting=False)
    insn.operands[0].write(cpu, cpu.x87.status)


# --- the environment --------------------------------------------------------------------------------------


def _environment(cpu: Processor, wide: bool) -> bytes:
    """14 or 28 bytes (SDM vol. 1, 8.1.10): selectors are zero, as CPUID says (leaf 7, EBX bit 13)."""
    x87 = cpu.x87
    words = (x87.control, x87.status, stack.full_tags(x87))
    instruction, data, opcode = x87.instruction_pointer, x87.data_pointer, x87.opcode
    if not wide:
        if cpu.real_or_vm86:
            tail = (instruction, instruction >> 4 & 0xF000 | opcode, data, data >> 4 & 0xF000)
        else:
            tail = (instruction, 0, data, 0)
        return b"".join((each & 0xFFFF).to_bytes(2, "little") for each in (*words, *tail))
    if cpu.real_or_vm86:
        tail = (
            _ONES | instruction & 0xFFFF, (instruction >> 16 & 0xFFFF) << 12 | opcode,
            _ONES | data & 0xFFFF, (data >> 16 & 0xFFFF) << 12,
        )  # fmt: skip
    else:
        tail = (instruction, opcode << 16, data, _ONES)
    slots = (*(_ONES | word for word in words), *tail)
    return b"".join((each & 0xFFFFFFFF).to_bytes(4, "little") for each in slots)


def _load_environment(cpu: Processor, image: bytes, wide: bool) -> None:
    """The inverse of ``_environment``."""
    size = 4 if wide else 2
    slots = [int.from_bytes(image[at : at + size], "little") for at in range(0, 7 * size, size)]
    x87 = cpu.x87
    x87.status = 0
    stack.set_control(x87, slots[0])
    stack.set_status(x87, slots[1])
    stack.set_full_tags(x87, slots[2] & 0xFFFF)
    if cpu.real_or_vm86:
        x87.opcode = slots[4] & 0x7FF
        x87.instruction_pointer = slots[3] & 0xFFFF | _upper(slots[4], wide)
        x87.data_pointer = slots[5] & 0xFFFF | _upper(slots[6], wide)
    else:
        x87.opcode = slots[4] >> 16 & 0x7FF
        x87.instruction_pointer, x87.data_pointer = slots[3], slots[5]


def _upper(slot: int, wide: bool) -> int:
    """Bits 16 and up of a linear address from the slot of a real-mode image."""
    return (slot >> 12 & (0xFFFF if wide else 0xF)) << 16


def _mask_exceptions(cpu: Processor) -> None:
    cpu.x87.control |= stack.EXCEPTIONS
    stack.summarize(cpu.x87)


def _is_wide(insn: Instruction) -> bool:
    return insn.operand_size != 2


def _memory(insn: Instruction) -> Memory:
    operand = insn.operands[0]
    assert isinstance(operand, Memory)
    return operand


@semantics("fnstenv")
def fnstenv(cpu: Processor, insn: Instruction) -> None:
    """Masks all exceptions afterwards."""
    require_x87(cpu, waiting=False)
    target = _memory(insn)
    cpu.store_bytes(target.segment, target.offset(cpu), _environment(cpu, _is_wide(insn)))
    _mask_exceptions(cpu)


@semantics("fldenv")
def fldenv(cpu: Processor, insn: Instruction) -> None:
    require_x87(cpu)
    source = _memory(insn)
    wide = _is_wide(insn)
    image = cpu.load_bytes(source.segment, source.offset(cpu), 28 if wide else 14)
    _load_environment(cpu, image, wide)


@semantics("fnsave")
def fnsave(cpu: Processor, insn: Instruction) -> None:
    """The environment and ST(0) to ST(7), 10 bytes each; then FNINIT."""
    require_x87(cpu, waiting=False)
    target = _memory(insn)
    registers = b"".join(stack.get(cpu.x87, n).to_bytes(_REGISTER_BYTES, "little") for n in range(8))
    image = _environment(cpu, _is_wide(insn)) + registers
    cpu.store_bytes(target.segment, target.offset(cpu), image)
    stack.initialize(cpu.x87)


@semantics("frstor")
def frstor(cpu: Processor, insn: Instruction) -> None:
    require_x87(cpu)
    source = _memory(insn)
    wide = _is_wide(insn)
    size = 28 if wide else 14
    image = cpu.load_bytes(source.segment, source.offset(cpu), size + 8 * _REGISTER_BYTES)
    _load_environment(cpu, image, wide)
    for n in range(8):
        at = size + n * _REGISTER_BYTES
        value = int.from_bytes(image[at : at + _REGISTER_BYTES], "little") & _ST_MASK
        cpu.x87.registers[stack.top(cpu.x87) + n & 7] = value
