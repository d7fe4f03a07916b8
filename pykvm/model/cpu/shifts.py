"""Shifts and rotates (SDM vol. 2, SAL/SAR/SHL/SHR, RCL/RCR/ROL/ROR, SHLD, SHRD).

The count is taken modulo 32, of 8-byte operands modulo 64; a count of zero changes no flag.  Of what the SDM
leaves undefined AF becomes set, and OF tells of the last of ``count`` steps by one (AMD Zen).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import flags
from pykvm.model.cpu.flags import AF, CF, MASK, OF, STATUS
from pykvm.model.cpu.semantics import Execute, semantics

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

Shift = Callable[[int, int, int, int], tuple[int, int, int]]
"""From value, count (1 to 63), size in bytes and carry in (0 or 1) to result, carry out and overflow."""


def _count(cpu: Processor, insn: Instruction) -> int:
    """The count as the processor uses it: of the last operand, or 1 where there is none."""
    size = insn.operands[0].size
    count = insn.operands[-1].read(cpu) if len(insn.operands) > 1 else 1
    return count & (63 if size == 8 else 31)


# --- shifts ----------------------------------------------------------------------------------------------


def _shl(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    """OF: the sign changed in the last step."""
    wide = value << count
    out = wide >> 8 * size & 1
    return wide & MASK[size], out, out ^ (wide >> 8 * size - 1 & 1)


def _shr(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    """OF: the sign before a shift by one."""
    return value >> count, value >> count - 1 & 1, (value >> count - 1) >> 8 * size - 1


def _sar(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    """OF: clear."""
    wide = flags.signed(value, size)
    return wide >> count & MASK[size], wide >> count - 1 & 1, 0


def _undefined_after_shift(cpu: Processor, insn: Instruction) -> int:
    """AF unless the count is zero; OF unless it is one."""
    count = _count(cpu, insn)
    return 0 if count == 0 else AF if count == 1 else AF | OF


def _undefined_after_logical_shift(cpu: Processor, insn: Instruction) -> int:
    """CF, too, where the count reaches the operand's width."""
    beyond = _count(cpu, insn) >= 8 * insn.operands[0].size
    return _undefined_after_shift(cpu, insn) | (CF if beyond else 0)


def status_after(result: int, carry: int, overflow: int, size: int) -> int:
    """The status flags after a shift."""
    return AF | flags.of_result(result, size) | (CF if carry else 0) | (OF if overflow else 0)


def _shift_with(shift: Shift) -> Execute:
    def execute(cpu: Processor, insn: Instruction) -> None:
        target = insn.operands[0]
        value, count = target.read_for_update(cpu), _count(cpu, insn)
        if not count:
            target.write(cpu, value)
            return
        result, carry, overflow = shift(value, count, target.size, 0)
        target.write(cpu, result)
        cpu.rflags = cpu.rflags & ~STATUS | status_after(result, carry, overflow, target.size)

    return execute


semantics("shl", "sal", undefined=_undefined_after_logical_shift)(_shift_with(_shl))
semantics("shr", undefined=_undefined_after_logical_shift)(_shift_with(_shr))
semantics("sar", undefined=_undefined_after_shift)(_shift_with(_sar))


# --- rotates ---------------------------------------------------------------------------------------------


def _rol(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    count %= 8 * size
    result = (value << count | value >> 8 * size - count) & MASK[size]
    out = result & 1
    return result, out, out ^ result >> 8 * size - 1


def _ror(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    count %= 8 * size
    result = (value >> count | value << 8 * size - count) & MASK[size]
    top = result >> 8 * size - 2
    return result, top >> 1, top >> 1 ^ top & 1


def _rcl(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    width = 8 * size + 1
    count %= width
    ring = carry << width - 1 | value
    ring = (ring << count | ring >> width - count) & (1 << width) - 1
    result, out = ring & MASK[size], ring >> width - 1
    return result, out, out ^ result >> 8 * size - 1


def _rcr(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    width = 8 * size + 1
    count %= width
    ring = carry << width - 1 | value
    ring = (ring >> count | ring << width - count) & (1 << width) - 1
    result = ring & MASK[size]
    top = result >> 8 * size - 2
    return result, ring >> width - 1, top >> 1 ^ top & 1


def _undefined_after_rotate(cpu: Processor, insn: Instruction) -> int:
    """OF unless the count is zero or one."""
    return OF if _count(cpu, insn) > 1 else 0


def _rotate_with(rotate: Shift) -> Execute:
    def execute(cpu: Processor, insn: Instruction) -> None:
        target = insn.operands[0]
        value, count = target.read_for_update(cpu), _count(cpu, insn)
        if not count:
            target.write(cpu, value)
            return
        result, carry, overflow = rotate(value, count, target.size, cpu.rflags & CF)
        target.write(cpu, result)
        cpu.rflags = cpu.rflags & ~(CF | OF) | (CF if carry else 0) | (OF if overflow else 0)

    return execute


semantics("rol", undefined=_undefined_after_rotate)(_rotate_with(_rol))
semantics("ror", undefined=_undefined_after_rotate)(_rotate_with(_ror))
semantics("rcl", undefined=_undefined_after_rotate)(_rotate_with(_rcl))
semantics("rcr", undefined=_undefined_after_rotate)(_rotate_with(_rcr))


SHIFTS: Final[dict[str, Shift]] = {
    "shl": _shl, "sal": _shl, "shr": _shr, "sar": _sar, "rol": _rol, "ror": _ror, "rcl": _rcl, "rcr": _rcr,
}  # fmt: skip
"""By name, for the translator."""


# --- double shifts ---------------------------------------------------------------------------------------


def _undefined_after_double_shift(cpu: Processor, insn: Instruction) -> int:
    """All where the count exceeds the operand's width, the result included."""
    count = _count(cpu, insn)
    return STATUS if count > 8 * insn.operands[0].size else _undefined_after_shift(cpu, insn)


def _double_shift(cpu: Processor, insn: Instruction, left: bool) -> None:
    target, source, _ = insn.operands
    size, bits = target.size, 8 * target.size
    value, fill, count = target.read_for_update(cpu), source.read(cpu), _count(cpu, insn)
    if not count:
        target.write(cpu, value)
        return
    # A count beyond 16 of a word goes on with the source's bits (host; undefined in the SDM).
    if left:
        wide = ((value << bits | fill) << bits | fill) << count
        result, carry = wide >> 2 * bits & MASK[size], wide >> 3 * bits & 1
        overflow = carry ^ result >> bits - 1
    else:
        wide = (fill << bits | fill) << bits | value
        result, carry = wide >> count & MASK[size], wide >> count - 1 & 1
        overflow = result >> bits - 1 ^ result >> bits - 2 & 1
    status = flags.of_result(result, size) | (CF if carry else 0) | (OF if overflow else 0)
    target.write(cpu, result)
    cpu.rflags = cpu.rflags & ~STATUS | AF | status


@semantics("shld", undefined=_undefined_after_double_shift)
def shld(cpu: Processor, insn: Instruction) -> None:
    _double_shift(cpu, insn, left=True)


@semantics("shrd", undefined=_undefined_after_double_shift)
def shrd(cpu: Processor, insn: Instruction) -> None:
    _double_shift(cpu, insn, left=False)
