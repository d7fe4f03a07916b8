"""BMI1 and BMI2: VEX-encoded instructions on general registers (SDM vol. 1, 5.1.16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu import flags
from pykvm.model.cpu.flags import AF, CF, MASK, PF, SF, STATUS, signed
from pykvm.model.cpu.implicit import get, require
from pykvm.model.cpu.instruction import RDX
from pykvm.model.cpu.semantics import semantics

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor


def _require(cpu: Processor, feature: bool) -> None:
    """#UD without the feature, and in real and virtual-8086 mode (SDM vol. 2, table 2-29)."""
    require(feature and not cpu.real_or_vm86)


def _set_logic(cpu: Processor, result: int, size: int, carry: bool = False) -> None:
    """SF and ZF of the result, OF clear, CF as given; AF and PF are undefined: clear, and of the result."""
    status = flags.logic(result, size) | (CF if carry else 0)
    cpu.rflags = cpu.rflags & ~STATUS | status


# --- BMI1 ------------------------------------------------------------------------------------------------


@semantics("andn", undefined=AF | PF)
def andn(cpu: Processor, insn: Instruction) -> None:
    _require(cpu, cpu.features.bmi1)
    target, inverted, other = insn.operands
    result = ~inverted.read(cpu) & other.read(cpu) & MASK[target.size]
    target.write(cpu, result)
    _set_logic(cpu, result, target.size)


@semantics("bextr", undefined=AF | SF | PF)
def bextr(cpu: Processor, insn: Instruction) -> None:
    """Bits from the start in the control's low byte, as many as its second byte says."""
    _require(cpu, cpu.features.bmi1)
    target, source, control = insn.operands
    start, length = control.read(cpu) & 0xFF, control.read(cpu) >> 8 & 0xFF
    result = source.read(cpu) >> start & (1 << length) - 1
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & ~STATUS | AF | flags.of_result(result, target.size) & ~SF


@semantics("blsi", undefined=AF | PF)
def blsi(cpu: Processor, insn: Instruction) -> None:
    """The lowest one bit alone; CF: there was one."""
    _require(cpu, cpu.features.bmi1)
    target, source = insn.operands
    value = source.read(cpu)
    target.write(cpu, value & -value)
    _set_logic(cpu, value & -value, target.size, value != 0)


@semantics("blsmsk", undefined=AF | PF)
def blsmsk(cpu: Processor, insn: Instruction) -> None:
    """All bits up to the lowest one bit; CF: there was none."""
    _require(cpu, cpu.features.bmi1)
    target, source = insn.operands
    value = source.read(cpu)
    result = (value ^ value - 1) & MASK[target.size]
    target.write(cpu, result)
    _set_logic(cpu, result, target.size, value == 0)


@semantics("blsr", undefined=AF | PF)
def blsr(cpu: Processor, insn: Instruction) -> None:
    """The lowest one bit reset; CF: there was none."""
    _require(cpu, cpu.features.bmi1)
    target, source = insn.operands
    value = source.read(cpu)
    target.write(cpu, value & value - 1)
    _set_logic(cpu, value & value - 1, target.size, value == 0)


# --- BMI2 ------------------------------------------------------------------------------------------------


@semantics("bzhi", undefined=AF | PF)
def bzhi(cpu: Processor, insn: Instruction) -> None:
    """The bits from the index upwards cleared; CF: the index is beyond the operand."""
    _require(cpu, cpu.features.bmi2)
    target, source, index = insn.operands
    number = index.read(cpu) & 0xFF
    result = source.read(cpu) & (1 << number) - 1
    target.write(cpu, result)
    _set_logic(cpu, result, target.size, number >= 8 * target.size)


@semantics("mulx")
def mulx(cpu: Processor, insn: Instruction) -> None:
    """rDX times the source, without flags; of one register twice the upper half stays."""
    _require(cpu, cpu.features.bmi2)
    high, low, source = insn.operands
    product = get(cpu, RDX, high.size) * source.read(cpu)
    low.write(cpu, product & MASK[low.size])
    high.write(cpu, product >> 8 * high.size)


@semantics("pdep")
def pdep(cpu: Processor, insn: Instruction) -> None:
    """The source's low bits spread to where the mask has ones."""
    _require(cpu, cpu.features.bmi2)
    target, source, mask = insn.operands
    value, places, result = source.read(cpu), mask.read(cpu), 0
    while places:
        place = places & -places
        if value & 1:
            result |= place
        value >>= 1
        places ^= place
    target.write(cpu, result)


@semantics("pext")
def pext(cpu: Processor, insn: Instruction) -> None:
    """The source's bits where the mask has ones, gathered at the bottom."""
    _require(cpu, cpu.features.bmi2)
    target, source, mask = insn.operands
    value, places, result, bit = source.read(cpu), mask.read(cpu), 0, 1
    while places:
        place = places & -places
        if value & place:
            result |= bit
        bit <<= 1
        places ^= place
    target.write(cpu, result)


@semantics("rorx")
def rorx(cpu: Processor, insn: Instruction) -> None:
    _require(cpu, cpu.features.bmi2)
    target, source, count = insn.operands
    bits = 8 * target.size
    value, places = source.read(cpu), count.read(cpu) % bits
    target.write(cpu, (value >> places | value << bits - places) & MASK[target.size])


@semantics("shlx")
def shlx(cpu: Processor, insn: Instruction) -> None:
    _require(cpu, cpu.features.bmi2)
    target, source, count = insn.operands
    target.write(cpu, source.read(cpu) << count.read(cpu) % (8 * target.size) & MASK[target.size])


@semantics("shrx")
def shrx(cpu: Processor, insn: Instruction) -> None:
    _require(cpu, cpu.features.bmi2)
    target, source, count = insn.operands
    target.write(cpu, source.read(cpu) >> count.read(cpu) % (8 * target.size))


@semantics("sarx")
def sarx(cpu: Processor, insn: Instruction) -> None:
    _require(cpu, cpu.features.bmi2)
    target, source, count = insn.operands
    value = signed(source.read(cpu), target.size) >> count.read(cpu) % (8 * target.size)
    target.write(cpu, value & MASK[target.size])
