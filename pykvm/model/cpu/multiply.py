"""Multiplication and division (SDM vol. 1, 7.3.2.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import AF, CF, MASK, OF, PF, SF, STATUS, ZF, signed
from pykvm.model.cpu.implicit import get, put
from pykvm.model.cpu.instruction import RAX, RDX
from pykvm.model.cpu.semantics import semantics

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor


def _get_double(cpu: Processor, size: int) -> int:
    """rDX:rAX of ``size`` bytes each; for 1 byte AX."""
    if size == 1:
        return get(cpu, RAX, 2)
    return get(cpu, RDX, size) << 8 * size | get(cpu, RAX, size)


def _put_double(cpu: Processor, size: int, high: int, low: int) -> None:
    if size == 1:
        put(cpu, RAX, 2, high << 8 | low)
    else:
        put(cpu, RAX, size, low)
        put(cpu, RDX, size, high)


def _set_overflow(cpu: Processor, overflow: bool) -> None:
    """CF and OF: the product needs its upper half.  The other flags are undefined: they stay."""
    cpu.rflags = cpu.rflags & ~(CF | OF) | (CF | OF if overflow else 0)


@semantics("mul", undefined=SF | ZF | AF | PF)
def mul(cpu: Processor, insn: Instruction) -> None:
    (source,) = insn.operands
    size = source.size
    product = get(cpu, RAX, size) * source.read(cpu)
    _put_double(cpu, size, product >> 8 * size, product & MASK[size])
    _set_overflow(cpu, product > MASK[size])


@semantics("imul", undefined=SF | ZF | AF | PF)
def imul(cpu: Processor, insn: Instruction) -> None:
    """One operand: rDX:rAX; two: the first times the second; three: the second times the third."""
    target = insn.operands[0]
    size = target.size
    if len(insn.operands) == 1:
        product = signed(get(cpu, RAX, size), size) * signed(target.read(cpu), size)
        _put_double(cpu, size, product >> 8 * size & MASK[size], product & MASK[size])
    else:
        factor, other = insn.operands[-2:]
        product = signed(factor.read(cpu), size) * signed(other.read(cpu), size)
        target.write(cpu, product & MASK[size])
    _set_overflow(cpu, product != signed(product & MASK[size], size))


def _set_undefined(cpu: Processor) -> None:
    """All flags are undefined after a division; this is what AMD Zen leaves there."""
    cpu.rflags = cpu.rflags & ~(SF | ZF | PF) | AF


@semantics("div", undefined=STATUS)
def div(cpu: Processor, insn: Instruction) -> None:
    (source,) = insn.operands
    divisor = source.read(cpu)
    if not divisor:
        raise Fault.de()
    quotient, remainder = divmod(_get_double(cpu, source.size), divisor)
    if quotient > MASK[source.size]:
        raise Fault.de()
    _put_double(cpu, source.size, remainder, quotient)
    _set_undefined(cpu)


@semantics("idiv", undefined=STATUS)
def idiv(cpu: Processor, insn: Instruction) -> None:
    """The quotient is cut towards zero, the remainder has the dividend's sign."""
    (source,) = insn.operands
    size = source.size
    dividend = signed(_get_double(cpu, size), 2 * size)
    divisor = signed(source.read(cpu), size)
    if not divisor:
        raise Fault.de()
    quotient, remainder = divmod(abs(dividend), abs(divisor))
    if (dividend < 0) != (divisor < 0):
        quotient = -quotient
    if dividend < 0:
        remainder = -remainder
    if quotient != signed(quotient & MASK[size], size):
        raise Fault.de()
    _put_double(cpu, size, remainder & MASK[size], quotient & MASK[size])
    _set_undefined(cpu)
