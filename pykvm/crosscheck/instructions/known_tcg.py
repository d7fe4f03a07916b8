"""Bugs of QEMU's TCG, which is the processor in labs without acceleration: for KVM's guests and for the host.

They explain nothing anywhere else.  docs/kvm-findings.md lists them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from pykvm.crosscheck.instructions.case import InstructionCase, Outcome
from pykvm.crosscheck.instructions.rule import Opcode, known, opcodes
from pykvm.x86.bits import PageFault
from pykvm.x86.exceptions import Vector

_X87: Final = range(0xD8, 0xE0)
_DENORMAL: Final = 2
"""MXCSR.DE."""
_MANDATORY: Final = {0x66, 0xF2, 0xF3}


_LONGEST_OPERAND: Final = 64
_ARITHMETIC: Final = {
    *(bytes([0x0F, code]) for code in (*range(0x51, 0x60), *range(0x2A, 0x30), 0x7C, 0x7D, 0xC2, 0xD0, 0xE6)),
    *(bytes([0x0F, 0x3A, code]) for code in (*range(0x08, 0x0C), 0x40, 0x41)),
}
"""SSE arithmetic, comparisons, rounding and conversions."""


def _same_but_floating(model: Outcome, other: Outcome) -> bool:
    """Whether everything but x87, MMX and SSE state is the same; flags aside, of which some are undefined."""
    return (
        (model.vector, model.address) == (other.vector, other.address)
        and (model.error == other.error or None in {model.error, other.error})
        and model.memory == other.memory
        and replace(model.registers, rflags=0) == replace(other.registers, rflags=0)
        and not (model.failure or other.failure)
    )


@known(
    "emulator: QEMU's TCG has an x87 of its own",
    "tcg",
    "it knows no stack faults, C1, DE, unsupported formats and reserved bits, and rounds some results "
    "otherwise",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    if opcode.code[0] not in _X87 or model.failure or other.failure:
        return False
    general = replace(model.registers, rflags=0) == replace(other.registers, rflags=0)
    return general and model.vector == other.vector


@known(
    "emulator: QEMU's TCG leaves an MMX register's exponent as it was",
    "tcg",
    "processors set bits 79:64 of a written MMX register (SDM vol. 1, 9.2.1)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    if not _same_but_floating(model, other) or model.floating is None or other.floating is None:
        return False
    pairs = zip(model.floating.fpr, other.floating.fpr, strict=True)
    low = all(one[:8] == another[:8] for one, another in pairs)
    return low and replace(model.floating, fpr=other.floating.fpr) == other.floating


@known(
    "emulator: QEMU's TCG enters MMX state before an operand faults",
    "tcg",
    "TOP is 0 and all tags are valid after an MMX instruction that did not happen, and after a CVTPI2PS that "
    "reads memory; EMMS leaves TOP as it was",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    faulted = model.vector is not None and opcode.code[0] == 0x0F
    converted = opcode.code == b"\x0f\x2a" and opcode.modrm < 0xC0  # CVTPI2PS: no MMX register is read
    emptied = opcode.code == b"\x0f\x77"  # EMMS
    plain = _MANDATORY.isdisjoint(opcode.prefixes)
    return plain and (faulted or converted or emptied) and _same_but_floating(model, other)


@known("emulator: QEMU's TCG does not set MXCSR.DE", "tcg", "no SSE instruction reports a denormal operand")
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    if not _same_but_floating(model, other) or model.floating is None or other.floating is None:
        return False
    marked = replace(other.floating, mxcsr=other.floating.mxcsr | _DENORMAL)
    return marked == model.floating


@known(
    "emulator: QEMU's TCG makes a read-modify-write a read and then a write",
    "tcg",
    "the page fault's error code says that it was a read, and its address where that failed; processors "
    "translate for the write at once",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    if not model.vector == other.vector == Vector.PF or None in {model.error, other.error}:
        return False
    near = 0 <= (other.address or 0) - (model.address or 0) < _LONGEST_OPERAND
    return near and bool((model.error or 0) & ~(other.error or 0) & PageFault.WR)


@known("emulator: QEMU's TCG does not check alignment", "tcg", "#AC is not implemented")
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return model.vector == Vector.AC


@known(
    "emulator: QEMU's TCG takes unaligned operands of 16 bytes",
    "tcg",
    "most SSE instructions without VEX raise #GP for them (SDM vol. 1, 4.1.1)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    refused = model.vector == Vector.GP and not model.error and opcode.code[0] == 0x0F
    return refused and case.floating is not None and other.vector in {None, Vector.PF}


@known(
    "emulator: QEMU's TCG follows Intel in near branches with 66",
    "tcg",
    "in 64-bit code AMD's processors branch within 64 KiB (APM vol. 3, near branches); TCG ignores 66",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    near = (
        opcode.code[0] in {0xC2, 0xC3, 0xE8, 0xE9, 0xEB, *range(0x70, 0x80), *range(0xE0, 0xE4)}
        or (opcode.code == b"\xff" and opcode.extension in {2, 4})
        or (len(opcode.code) == 2 and 0x80 <= opcode.code[1] <= 0x8F)
    )
    return case.mode == 64 and near and 0x66 in opcode.prefixes


@known(
    "emulator: QEMU's TCG knows no CMPXCHG8B and CMPXCHG16B with 66, F2 or F3",
    "tcg",
    "processors ignore these prefixes there; TCG raises #UD",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    compares = opcode.code in opcodes("0fc7") and opcode.extension == 1
    return compares and not _MANDATORY.isdisjoint(opcode.prefixes) and other.vector == Vector.UD


@known(
    "emulator: QEMU's TCG does SSE arithmetic otherwise",
    "tcg",
    "another of two NaNs, no denormals-are-zero in MIN and MAX, no #XM for a denormal operand",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    if opcode.code not in _ARITHMETIC or other.vector is not None:
        return False
    return model.vector == Vector.XM or (model.vector is None and _same_but_floating(model, other))


@known(
    "emulator: QEMU's TCG checks no limits and rights of segments",
    "tcg",
    "operands beyond a limit, and writes through CS, go through; where their page is absent they are #PF",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    refused = model.vector in {Vector.GP, Vector.SS} and not model.error
    return case.mode != 64 and refused and other.vector in {None, Vector.PF}


@known(
    "emulator: QEMU's TCG reads 64-bit far pointers",
    "tcg",
    "with REX.W, as Intel's processors do; AMD's ignore it (APM vol. 3, LFS)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    wide = case.mode == 64 and b"\x48" <= opcode.prefixes[-1:] < b"\x50"
    far = opcode.code in opcodes("0fb2 0fb4 0fb5") or (opcode.code == b"\xff" and opcode.extension in {3, 5})
    return wide and far


@known(
    "emulator: QEMU's TCG finds at the fetch that a branch's target is not canonical",
    "tcg",
    "the branch itself should raise #GP, with its registers as before (SDM vol. 2, RET, CALL, JMP)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    near = opcode.code[0] in {0xC2, 0xC3, 0xE8, 0xE9} or (
        opcode.code == b"\xff" and opcode.extension in {2, 4}
    )
    return case.mode == 64 and near and model.vector == other.vector == Vector.GP


@known(
    "emulator: QEMU's TCG takes MOVNTI with 66",
    "tcg",
    "66 0F C3 is no instruction (SDM vol. 2, MOVNTI)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code == b"\x0f\xc3" and 0x66 in opcode.prefixes and model.vector == Vector.UD
