"""Data transfer between registers and memory (SDM vol. 1, 7.3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu import flags
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import MASK, SIGN, STATUS, ZF
from pykvm.model.cpu.implicit import get, put, require
from pykvm.model.cpu.instruction import DS, RAX, RBX, RCX, RDX, Memory
from pykvm.model.cpu.semantics import semantics

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor


@semantics("mov")
def mov(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    target.write(cpu, source.read(cpu))


@semantics("movzx")
def movzx(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    target.write(cpu, source.read(cpu))


@semantics("movsx", "movsxd")
def movsx(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    value = source.read(cpu)
    if value & SIGN[source.size]:
        value |= MASK[target.size] & ~MASK[source.size]
    target.write(cpu, value)


@semantics("lea")
def lea(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    assert isinstance(source, Memory)
    target.write(cpu, source.offset(cpu) & MASK[target.size])


@semantics("xchg", lockable=True)
def xchg(cpu: Processor, insn: Instruction) -> None:
    first, second = insn.operands
    one, other = first.read_for_update(cpu), second.read_for_update(cpu)
    first.write(cpu, other)
    second.write(cpu, one)


@semantics("bswap", undefined=0)
def bswap(cpu: Processor, insn: Instruction) -> None:
    (target,) = insn.operands
    if target.size == 2:
        target.write(cpu, 0)  # undefined (SDM vol. 2, BSWAP); processors give zero
    else:
        target.write(cpu, int.from_bytes(target.read(cpu).to_bytes(target.size, "little"), "big"))


@semantics("movbe")
def movbe(cpu: Processor, insn: Instruction) -> None:
    require(cpu.features.movbe)
    target, source = insn.operands
    target.write(cpu, int.from_bytes(source.read(cpu).to_bytes(source.size, "little"), "big"))


@semantics("movnti")
def movnti(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    target.write(cpu, source.read(cpu))


@semantics("xlat")
def xlat(cpu: Processor, insn: Instruction) -> None:
    """AL from the table at rBX, whose segment can be overridden."""
    offset = cpu.regs[RBX] + (cpu.regs[RAX] & 0xFF) & insn.address_mask
    put(cpu, RAX, 1, cpu.load(insn.segment_or(DS), offset, 1))


@semantics("cmpxchg", lockable=True)
def cmpxchg(cpu: Processor, insn: Instruction) -> None:
    """Memory is written in any case, with its old value where the comparison fails (SDM vol. 2, CMPXCHG)."""
    target, source = insn.operands
    old, expected = target.read_for_update(cpu), get(cpu, RAX, target.size)
    _, status = flags.subtract(expected, old, 0, target.size)
    if old == expected:
        target.write(cpu, source.read(cpu))
    else:
        if target.is_memory:
            target.write(cpu, old)
        put(cpu, RAX, target.size, old)
    cpu.rflags = cpu.rflags & ~STATUS | status


def _compare_exchange_pair(cpu: Processor, insn: Instruction, half: int) -> None:
    """CMPXCHG8B and CMPXCHG16B, on rDX:rAX and rCX:rBX of ``half`` bytes each."""
    (target,) = insn.operands
    old = target.read_for_update(cpu)
    bits = 8 * half
    if old == get(cpu, RDX, half) << bits | get(cpu, RAX, half):
        target.write(cpu, get(cpu, RCX, half) << bits | get(cpu, RBX, half))
        cpu.rflags |= ZF
    else:
        target.write(cpu, old)
        put(cpu, RAX, half, old & MASK[half])
        put(cpu, RDX, half, old >> bits)
        cpu.rflags &= ~ZF


@semantics("cmpxchg8b", lockable=True)
def cmpxchg8b(cpu: Processor, insn: Instruction) -> None:
    require(cpu.features.cx8)
    _compare_exchange_pair(cpu, insn, 4)


@semantics("cmpxchg16b", lockable=True)
def cmpxchg16b(cpu: Processor, insn: Instruction) -> None:
    require(cpu.features.cx16)
    (target,) = insn.operands
    assert isinstance(target, Memory)
    if cpu.linear(target.segment, target.offset(cpu), 1, True) & 15:
        raise Fault.gp()
    _compare_exchange_pair(cpu, insn, 8)
