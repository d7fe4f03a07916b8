"""Binary integer arithmetic and logic (SDM vol. 1, 7.3.2 to 7.3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import flags
from pykvm.model.cpu.flags import AF, CF, MASK, OF, SIGN, STATUS
from pykvm.model.cpu.implicit import get, put, require
from pykvm.model.cpu.instruction import RAX, RDX
from pykvm.model.cpu.semantics import semantics

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_OTHERS: Final = ~STATUS
_ALL_BUT_CARRY: Final = STATUS & ~CF


@semantics("add", lockable=True)
def add(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    result, status = flags.add(target.read_for_update(cpu), source.read(cpu), 0, target.size)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & _OTHERS | status


@semantics("adc", lockable=True)
def adc(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    result, status = flags.add(target.read_for_update(cpu), source.read(cpu), cpu.rflags & CF, target.size)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & _OTHERS | status


@semantics("sub", lockable=True)
def sub(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    result, status = flags.subtract(target.read_for_update(cpu), source.read(cpu), 0, target.size)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & _OTHERS | status


@semantics("sbb", lockable=True)
def sbb(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    result, status = flags.subtract(
        target.read_for_update(cpu), source.read(cpu), cpu.rflags & CF, target.size
    )
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & _OTHERS | status


@semantics("cmp")
def cmp(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    _, status = flags.subtract(target.read(cpu), source.read(cpu), 0, target.size)
    cpu.rflags = cpu.rflags & _OTHERS | status


@semantics("and", undefined=AF, lockable=True)
def and_(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    result = target.read_for_update(cpu) & source.read(cpu)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & _OTHERS | flags.logic(result, target.size)


@semantics("or", undefined=AF, lockable=True)
def or_(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    result = target.read_for_update(cpu) | source.read(cpu)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & _OTHERS | flags.logic(result, target.size)


@semantics("xor", undefined=AF, lockable=True)
def xor(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    result = target.read_for_update(cpu) ^ source.read(cpu)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & _OTHERS | flags.logic(result, target.size)


@semantics("test", undefined=AF)
def test(cpu: Processor, insn: Instruction) -> None:
    first, second = insn.operands
    cpu.rflags = cpu.rflags & _OTHERS | flags.logic(first.read(cpu) & second.read(cpu), first.size)


@semantics("not", lockable=True)
def not_(cpu: Processor, insn: Instruction) -> None:
    (target,) = insn.operands
    target.write(cpu, target.read_for_update(cpu) ^ MASK[target.size])


@semantics("neg", lockable=True)
def neg(cpu: Processor, insn: Instruction) -> None:
    (target,) = insn.operands
    result, status = flags.subtract(0, target.read_for_update(cpu), 0, target.size)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & _OTHERS | status


@semantics("inc", lockable=True)
def inc(cpu: Processor, insn: Instruction) -> None:
    (target,) = insn.operands
    result, status = flags.add(target.read_for_update(cpu), 1, 0, target.size)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & ~_ALL_BUT_CARRY | status & _ALL_BUT_CARRY


@semantics("dec", lockable=True)
def dec(cpu: Processor, insn: Instruction) -> None:
    (target,) = insn.operands
    result, status = flags.subtract(target.read_for_update(cpu), 1, 0, target.size)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & ~_ALL_BUT_CARRY | status & _ALL_BUT_CARRY


def _add_with(cpu: Processor, insn: Instruction, carry: int) -> None:
    """a + b + the flag ``carry``, whose carry goes to that flag alone."""
    target, source = insn.operands
    total = target.read(cpu) + source.read(cpu) + bool(cpu.rflags & carry)
    target.write(cpu, total & MASK[target.size])
    cpu.rflags = cpu.rflags & ~carry | (carry if total > MASK[target.size] else 0)


@semantics("adcx")
def adcx(cpu: Processor, insn: Instruction) -> None:
    require(cpu.features.adx)
    _add_with(cpu, insn, CF)


@semantics("adox")
def adox(cpu: Processor, insn: Instruction) -> None:
    require(cpu.features.adx)
    _add_with(cpu, insn, OF)


@semantics("xadd", lockable=True)
def xadd(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    old = target.read_for_update(cpu)
    result, status = flags.add(old, source.read(cpu), 0, target.size)
    if target.is_memory:  # before the source changes, which may be part of its address
        target.write(cpu, result)
        source.write(cpu, old)
    else:  # of one register twice the sum stays (SDM vol. 2, XADD)
        source.write(cpu, old)
        target.write(cpu, result)
    cpu.rflags = cpu.rflags & _OTHERS | status


@semantics("cbw", "cwde", "cdqe")
def extend_accumulator(cpu: Processor, insn: Instruction) -> None:
    """CBW, CWDE, CDQE: the lower half of the accumulator sign-extended into the whole."""
    half = insn.operand_size // 2
    value = get(cpu, RAX, half)
    if value & SIGN[half]:
        value |= MASK[insn.operand_size] ^ MASK[half]
    put(cpu, RAX, insn.operand_size, value)


@semantics("cwd", "cdq", "cqo")
def extend_into_rdx(cpu: Processor, insn: Instruction) -> None:
    """CWD, CDQ, CQO: the accumulator's sign in every bit of rDX."""
    size = insn.operand_size
    put(cpu, RDX, size, MASK[size] if cpu.regs[RAX] & SIGN[size] else 0)
