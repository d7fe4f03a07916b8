"""PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM vol. 2, 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu.flags import CF, OF, SF, STATUS, ZF, signed
from pykvm.model.cpu.instruction import RAX, RCX, RDX
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.vector import join, lanes, read, require_sse, signed_lanes

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor


def _explicit_length(cpu: Processor, insn: Instruction, register: int, count: int) -> int:
    """The magnitude of EAX or EDX (with REX.W RAX or RDX), at most all elements."""
    size = 8 if insn.rex & 8 else 4
    return min(abs(signed(cpu.regs[register] & (1 << 8 * size) - 1, size)), count)


def _implicit_length(elements: list[int]) -> int:
    """Up to the first zero."""
    return elements.index(0) if 0 in elements else len(elements)


def _equal_any(a: list[int], b: list[int], count: int) -> list[bool]:
    return [i < len(b) and b[i] in a for i in range(count)]


def _ranges(a: list[int], b: list[int], count: int) -> list[bool]:
    pairs = list(zip(a[::2], a[1::2], strict=False))
    return [i < len(b) and any(low <= b[i] <= high for low, high in pairs) for i in range(count)]


def _equal_each(a: list[int], b: list[int], count: int) -> list[bool]:
    return [(a[i] == b[i]) if i < min(len(a), len(b)) else i >= max(len(a), len(b)) for i in range(count)]


def _equal_ordered(a: list[int], b: list[int], count: int) -> list[bool]:
    """Whether a begins at each element of b; what lies beyond the register matches."""
    return [
        all(i + j < len(b) and b[i + j] == a[j] for j in range(min(len(a), count - i))) for i in range(count)
    ]


_AGGREGATIONS = (_equal_any, _ranges, _equal_each, _equal_ordered)


def _compare(cpu: Processor, insn: Instruction) -> tuple[list[bool], int]:
    """The second intermediate result, and the width of an element; sets the flags."""
    target, operand = insn.operands[:2]
    control = insn.encoding[-1]
    require_sse(cpu, "sse42")
    width = 16 if control & 1 else 8
    split = signed_lanes if control & 2 else lanes
    a, b = split(target.read(cpu), width, 128), split(read(cpu, operand, 16, aligned=False), width, 128)
    count = len(a)
    if insn.name.startswith("pcmpe"):
        first, second = (_explicit_length(cpu, insn, register, count) for register in (RAX, RDX))
    else:
        first, second = _implicit_length(a), _implicit_length(b)
    result = _AGGREGATIONS[control >> 2 & 3](a[:first], b[:second], count)
    if control & 0x10:
        masked = control & 0x20
        result = [each if masked and i >= second else not each for i, each in enumerate(result)]
    flags = (CF if any(result) else 0) | (OF if result[0] else 0)
    flags |= (ZF if second < count else 0) | (SF if first < count else 0)
    cpu.rflags = cpu.rflags & ~STATUS | flags
    return result, width


@semantics("pcmpestri", "pcmpistri")
def pcmpstri(cpu: Processor, insn: Instruction) -> None:
    """The index of the lowest, or with bit 6 of the highest, true element to ECX; their number if none is."""
    result, _ = _compare(cpu, insn)
    true = [i for i, each in enumerate(result) if each] or [len(result)]
    cpu.regs[RCX] = true[-1] if insn.encoding[-1] & 0x40 else true[0]


@semantics("pcmpestrm", "pcmpistrm")
def pcmpstrm(cpu: Processor, insn: Instruction) -> None:
    """A mask to XMM0: a bit, or with bit 6 a whole element of ones, for each true element."""
    result, width = _compare(cpu, insn)
    cpu.xmm[0] = join((-1 if each else 0 for each in result), width if insn.encoding[-1] & 0x40 else 1)
