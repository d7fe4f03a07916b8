"""Decimal adjustments, AAM, AAD and SALC: not in 64-bit mode (SDM vol. 1, 7.3.2.4 and 7.3.2.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu import flags
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import AF, CF, OF, PF, SF, STATUS, ZF
from pykvm.model.cpu.implicit import get, put
from pykvm.model.cpu.instruction import RAX
from pykvm.model.cpu.semantics import semantics

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor


def _adjust(cpu: Processor, direction: int) -> None:
    """DAA (1) and DAS (-1): AL corrected to two decimal digits after an addition or subtraction."""
    al = get(cpu, RAX, 1)
    low = 6 if al & 0xF > 9 or cpu.rflags & AF else 0
    high = 0x60 if al > 0x99 or cpu.rflags & CF else 0
    combine = flags.add if direction > 0 else flags.subtract
    value, status = combine(al, low + high, 0, 1)
    # A borrow from the lower correction of DAS alone is a carry, too; DAA has none.
    status = status & ~(AF | CF) | (AF if low else 0) | (CF if high or al + low * direction < 0 else 0)
    put(cpu, RAX, 1, value)
    cpu.rflags = cpu.rflags & ~STATUS | status


@semantics("daa", undefined=OF)
def daa(cpu: Processor, insn: Instruction) -> None:
    _adjust(cpu, 1)


@semantics("das", undefined=OF)
def das(cpu: Processor, insn: Instruction) -> None:
    _adjust(cpu, -1)


def _adjust_ascii(cpu: Processor, amount: int) -> None:
    """AAA (0x106) and AAS (-0x106): AL corrected to one digit, the carry goes to AH."""
    status = 0
    ax = get(cpu, RAX, 2)
    if ax & 0xF > 9 or cpu.rflags & AF:
        ax = ax + amount & 0xFFFF
        status = AF | CF
    put(cpu, RAX, 2, ax & 0xFF0F)
    cpu.rflags = cpu.rflags & ~STATUS | status | flags.of_result(ax & 0xF, 1)


@semantics("aaa", undefined=OF | SF | ZF | PF)
def aaa(cpu: Processor, insn: Instruction) -> None:
    _adjust_ascii(cpu, 0x106)


@semantics("aas", undefined=OF | SF | ZF | PF)
def aas(cpu: Processor, insn: Instruction) -> None:
    _adjust_ascii(cpu, -0x106)


@semantics("aam", undefined=OF | AF | CF)
def aam(cpu: Processor, insn: Instruction) -> None:
    """AL split into quotient (AH) and remainder (AL) by the immediate, usually 10."""
    base = insn.operands[0].read(cpu)
    if not base:
        raise Fault.de()
    high, low = divmod(get(cpu, RAX, 1), base)
    put(cpu, RAX, 2, high << 8 | low)
    cpu.rflags = cpu.rflags & ~STATUS | flags.of_result(low, 1)


@semantics("aad", undefined=OF | AF | CF)
def aad(cpu: Processor, insn: Instruction) -> None:
    """AH * base + AL in AL, zero in AH."""
    ax = get(cpu, RAX, 2)
    product = (ax >> 8) * insn.operands[0].read(cpu) & 0xFF
    value, status = flags.add(ax & 0xFF, product, 0, 1)
    put(cpu, RAX, 2, value)
    cpu.rflags = cpu.rflags & ~STATUS | status


@semantics("salc")
def salc(cpu: Processor, insn: Instruction) -> None:
    """AL is 0xFF with CF set, else 0 (opcode D6, documented since 2016 only: SDM vol. 2, table A-2)."""
    put(cpu, RAX, 1, 0xFF if cpu.rflags & CF else 0)
