"""Single bits, bit scans and counts (SDM vol. 1, 7.3.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu import flags
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import AF, CF, OF, PARITY, PF, SF, STATUS, ZF, signed
from pykvm.model.cpu.implicit import require
from pykvm.model.cpu.instruction import Immediate, Memory, Operand
from pykvm.model.cpu.semantics import semantics
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_BIT_TESTS = OF | SF | AF | PF
"""Undefined after BT and its relatives; ZF stays (SDM vol. 2, BT)."""


def _locate(cpu: Processor, insn: Instruction) -> tuple[Operand, int]:
    """The operand that holds the bit, and the bit's mask in it.

    A register as bit number reaches beyond a memory operand: the number is signed, and the access goes to
    the element of the operand's size that holds the bit (SDM vol. 2, BT).
    """
    base, number = insn.operands
    width = 8 * base.size
    index = number.read(cpu)
    if isinstance(base, Memory) and not isinstance(number, Immediate):
        step = (signed(index, number.size) // width) * base.size
        base = base.moved(step)
    return base, 1 << index % width


def _set_carry(cpu: Processor, bit: int) -> None:
    cpu.rflags = cpu.rflags & ~CF | (CF if bit else 0)


@semantics("bt", undefined=_BIT_TESTS)
def bt(cpu: Processor, insn: Instruction) -> None:
    base, mask = _locate(cpu, insn)
    _set_carry(cpu, base.read(cpu) & mask)


@semantics("bts", undefined=_BIT_TESTS, lockable=True)
def bts(cpu: Processor, insn: Instruction) -> None:
    base, mask = _locate(cpu, insn)
    value = base.read_for_update(cpu)
    base.write(cpu, value | mask)
    _set_carry(cpu, value & mask)


@semantics("btr", undefined=_BIT_TESTS, lockable=True)
def btr(cpu: Processor, insn: Instruction) -> None:
    base, mask = _locate(cpu, insn)
    value = base.read_for_update(cpu)
    base.write(cpu, value & ~mask)
    _set_carry(cpu, value & mask)


@semantics("btc", undefined=_BIT_TESTS, lockable=True)
def btc(cpu: Processor, insn: Instruction) -> None:
    base, mask = _locate(cpu, insn)
    value = base.read_for_update(cpu)
    base.write(cpu, value ^ mask)
    _set_carry(cpu, value & mask)


def _scan(cpu: Processor, insn: Instruction, backwards: bool) -> None:
    """Of a zero source the target keeps its value: undefined in the SDM, documented by AMD (APM vol. 3)."""
    target, source = insn.operands
    value = source.read(cpu)
    status = ZF | PF
    if value:
        index = value.bit_length() - 1 if backwards else _trailing_zeros(value)
        target.write(cpu, index)
        status = PARITY[index]
    cpu.rflags = cpu.rflags & ~STATUS | status


def _trailing_zeros(value: int) -> int:
    return (value & -value).bit_length() - 1


@semantics("bsf", undefined=STATUS & ~ZF)
def bsf(cpu: Processor, insn: Instruction) -> None:
    _scan(cpu, insn, backwards=False)


@semantics("bsr", undefined=STATUS & ~ZF)
def bsr(cpu: Processor, insn: Instruction) -> None:
    _scan(cpu, insn, backwards=True)


def _count_zeros(cpu: Processor, insn: Instruction, count: int) -> None:
    """The result of TZCNT and LZCNT: CF says that there was no one bit, ZF that the result is zero."""
    target = insn.operands[0]
    target.write(cpu, count)
    status = (CF if count == 8 * target.size else 0) | (0 if count else ZF)
    cpu.rflags = cpu.rflags & ~(STATUS ^ OF) | status


@semantics("tzcnt", undefined=OF | SF | AF | PF)
def tzcnt(cpu: Processor, insn: Instruction) -> None:
    """Without BMI1 the prefix is ignored, and this is BSF."""
    if not cpu.features.bmi1:
        bsf(cpu, insn)
        return
    target, source = insn.operands
    value = source.read(cpu)
    _count_zeros(cpu, insn, _trailing_zeros(value) if value else 8 * target.size)


@semantics("lzcnt", undefined=OF | SF | AF | PF)
def lzcnt(cpu: Processor, insn: Instruction) -> None:
    """Without ABM the prefix is ignored, and this is BSR."""
    if not cpu.features.abm:
        bsr(cpu, insn)
        return
    target, source = insn.operands
    _count_zeros(cpu, insn, 8 * target.size - source.read(cpu).bit_length())


@semantics("popcnt")
def popcnt(cpu: Processor, insn: Instruction) -> None:
    require(cpu.features.popcnt)
    target, source = insn.operands
    value = source.read(cpu)
    target.write(cpu, value.bit_count())
    cpu.rflags = cpu.rflags & ~STATUS | (0 if value else ZF)


@semantics("bound")
def bound(cpu: Processor, insn: Instruction) -> None:
    """#BR unless the signed index lies between the two bounds in memory (SDM vol. 2, BOUND)."""
    index, bounds = insn.operands
    size = index.size
    assert isinstance(bounds, Memory)
    offset = bounds.offset(cpu)
    low = signed(cpu.load(bounds.segment, offset, size), size)
    high = signed(cpu.load(bounds.segment, offset + size & bounds.mask, size), size)
    if not low <= signed(index.read(cpu), size) <= high:
        raise Fault(Vector.BR)


_POLYNOMIAL = 0x82F63B78
"""0x11EDC6F41 with its bits reversed (SDM vol. 2, CRC32)."""


@semantics("crc32")
def crc32(cpu: Processor, insn: Instruction) -> None:
    require(cpu.features.sse42)
    target, source = insn.operands
    crc = target.read(cpu) & flags.MASK[4] ^ source.read(cpu)
    for _ in range(8 * source.size):
        crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    target.write(cpu, crc)
