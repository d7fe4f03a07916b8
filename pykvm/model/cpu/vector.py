"""What all MMX and SSE instructions share: their conditions, operands and lanes.

A register is one integer; lane 0 is in its lowest bits (SDM vol. 1, 9.2 and 10.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import x87_registers as stack
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import Immediate, Memory, Mmx, Operand
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.xstate import MXCSR_MM
from pykvm.x86.bits import Cr0, Cr4
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

M32: Final = (1 << 32) - 1
M64: Final = (1 << 64) - 1
M128: Final = (1 << 128) - 1

Combine = Callable[[int, int, int], int]
"""From destination, source, and the register's size in bits (or an immediate) to the new destination."""


# --- conditions -------------------------------------------------------------------------------------------


def require_sse(cpu: Processor, feature: str) -> None:
    """#UD without the feature, with CR0.EM or without CR4.OSFXSR; #NM with CR0.TS (SDM vol. 3, 13.1)."""
    if not getattr(cpu.features, feature) or cpu.cr0 & Cr0.EM or not cpu.cr4 & Cr4.OSFXSR:
        raise Fault.ud()
    if cpu.cr0 & Cr0.TS:
        raise Fault.nm()


def require_mmx(cpu: Processor, feature: str) -> None:
    """#UD without the feature or with CR0.EM; #NM with CR0.TS; #MF for a pending x87 exception
    (SDM vol. 3, 12.1)."""
    if not getattr(cpu.features, feature) or cpu.cr0 & Cr0.EM:
        raise Fault.ud()
    if cpu.cr0 & Cr0.TS:
        raise Fault.nm()
    if cpu.x87.status & stack.SUMMARY:
        raise Fault(Vector.MF)


def begin(cpu: Processor, insn: Instruction, mmx: str, xmm: str) -> int:
    """Check the conditions of the form with MMX or with XMM registers; the register's size in bytes."""
    if any(isinstance(operand, Mmx) for operand in insn.operands):
        require_mmx(cpu, mmx)
        return 8
    require_sse(cpu, xmm)
    return 16


def touch_mmx(cpu: Processor) -> None:
    """Every MMX instruction but EMMS makes TOP 0 and all registers non-empty (SDM vol. 1, 9.6.2)."""
    cpu.x87.tags = 0
    stack.set_top(cpu.x87, 0)


# --- operands ---------------------------------------------------------------------------------------------


def _address(cpu: Processor, operand: Memory, size: int, *, aligned: bool, write: bool = False) -> int:
    """The linear address.  Alignment to 16 comes before all that can be wrong with it (host)."""
    offset = operand.offset(cpu)
    if aligned and size == 16 and cpu.windows[operand.segment].base + offset & 15:
        raise Fault.gp()
    return cpu.linear(operand.segment, offset, size, write)


def load(cpu: Processor, operand: Memory, size: int, *, aligned: bool = False) -> int:
    """Read memory; ``aligned``: #GP(0) unless the linear address is a multiple of 16 where 16 are read."""
    address = _address(cpu, operand, size, aligned=aligned)
    return int.from_bytes(cpu.load_linear(address, size), "little")


def store(cpu: Processor, operand: Memory, size: int, value: int, *, aligned: bool = False) -> None:
    """The counterpart of ``load``."""
    address = _address(cpu, operand, size, aligned=aligned, write=True)
    cpu.store_linear(address, value.to_bytes(size, "little"))


def read(cpu: Processor, operand: Operand, size: int, *, aligned: bool | None = None) -> int:
    """A source: ``size`` bytes of memory, or a register as it is.

    Without ``aligned`` it must be, unless MXCSR.MM says otherwise.
    """
    if isinstance(operand, Memory):
        checked = not cpu.mxcsr & MXCSR_MM if aligned is None else aligned
        return load(cpu, operand, size, aligned=checked)
    return operand.read(cpu)


def finish(cpu: Processor, target: Operand, value: int) -> None:
    """Write a vector register, which nothing may follow."""
    if isinstance(target, Mmx):
        touch_mmx(cpu)
    target.write(cpu, value)


# --- lanes ------------------------------------------------------------------------------------------------


def lanes(value: int, width: int, total: int) -> list[int]:
    """The lanes of ``width`` bits in ``total`` bits, lowest first."""
    mask = (1 << width) - 1
    return [value >> at & mask for at in range(0, total, width)]


def signed(value: int, width: int) -> int:
    """A lane as a signed integer."""
    return value - (1 << width) if value >> width - 1 else value


def signed_lanes(value: int, width: int, total: int) -> list[int]:
    return [signed(lane, width) for lane in lanes(value, width, total)]


def join(values: Iterable[int], width: int) -> int:
    """The inverse of ``lanes``; each value is cut to its lane."""
    mask = (1 << width) - 1
    result = 0
    for number, value in enumerate(values):
        result |= (value & mask) << number * width
    return result


def saturate(value: int, width: int) -> int:
    """To the range of a signed lane."""
    limit = 1 << width - 1
    return max(-limit, min(limit - 1, value))


def saturate_unsigned(value: int, width: int) -> int:
    """To the range of an unsigned lane."""
    return max(0, min((1 << width) - 1, value))


# --- entering rows into the table -------------------------------------------------------------------------


def packed(name: str, mmx: str, xmm: str, combine: Combine) -> None:
    """destination = combine(destination, source, bits): ``mmx`` and ``xmm`` are the features of the forms,
    "" where there is none."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand = insn.operands
        size = begin(cpu, insn, mmx, xmm)
        value = combine(target.read(cpu), read(cpu, operand, operand.size), 8 * size)
        finish(cpu, target, value)

    semantics(name)(execute)


def packed_immediate(name: str, mmx: str, xmm: str, combine: Combine) -> None:
    """destination = combine(destination, source, immediate)."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand, immediate = insn.operands
        assert isinstance(immediate, Immediate)
        begin(cpu, insn, mmx, xmm)
        value = combine(target.read(cpu), read(cpu, operand, operand.size), immediate.value)
        finish(cpu, target, value)

    semantics(name)(execute)
