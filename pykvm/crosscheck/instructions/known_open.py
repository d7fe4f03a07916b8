"""Differences that the SDM leaves open, or in which AMD's processors deviate from it."""

from __future__ import annotations

from typing import Final

from pykvm.crosscheck.instructions.case import FLAT, InstructionCase, Outcome
from pykvm.crosscheck.instructions.rule import Opcode, known, opcodes
from pykvm.x86.exceptions import Vector
from pykvm.x86.registers import GENERAL

_MANY_PREFIXES: Final = 6
"""With as many a VEX or XOP instruction with an immediate exceeds 15 bytes."""


@known(
    "undefined shift",
    "any",
    "SHLD and SHRD by more than the operand's 16 bits: result and flags are undefined (SDM vol. 2, SHLD)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    count = case.code[-1] if opcode.code in opcodes("0fa4 0fac") else case.registers.rcx
    short = (0x66 in opcode.prefixes) != (case.mode == 16)
    return opcode.code in opcodes("0fa4 0fa5 0fac 0fad") and short and count & 31 > 16


@known(
    "undefined BSWAP",
    "any",
    "BSWAP of a 16-bit register is undefined (SDM vol. 2, BSWAP)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    swaps = len(opcode.code) == 2 and opcode.code[0] == 0x0F and 0xC8 <= opcode.code[1] <= 0xCF
    short = (0x66 in opcode.prefixes) != (case.mode == 16)
    return swaps and short and model.vector is other.vector is None


@known(
    "undefined bits of LAR",
    "any",
    "bits 19:16 of the access rights that it loads are undefined (SDM vol. 2, LAR)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    if opcode.code != b"\x0f\x02" or model.vector is not None or other.vector is not None:
        return False
    pairs = [(getattr(model.registers, name), getattr(other.registers, name)) for name in GENERAL]
    return model.memory == other.memory and all((one ^ two) & ~0xF0000 == 0 for one, two in pairs)


@known(
    "undefined bytes at a page's end",
    "any",
    "how many bytes of an undefined instruction are fetched before #UD or #GP is not architectural",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    end = FLAT.code_end
    return (
        case.mode != 16
        and case.linear + 15 > end
        and {model.vector, other.vector} <= {Vector.UD, Vector.PF, Vector.GP}
        and end in {model.address, other.address}
    )


@known(
    "stores of a faulting ENTER or PUSHA",
    "any",
    "what they pushed before the fault may stay in memory: below the stack pointer, so nobody's data",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code in {b"\xc8", b"\x60"} and model.vector == other.vector is not None


@known(
    "which fault of a far return comes first",
    "any",
    "RETF and IRET that would fault for more than one reason (SDM vol. 2 orders checks, not reads)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code in {b"\xca", b"\xcb", b"\xcf"} and None not in {model.vector, other.vector}


@known(
    "too long and undefined",
    "any",
    "bytes beyond 15 that would make no instruction anyway: #GP for the length or #UD first",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    long = len(case.code) > 15 or len(opcode.prefixes) >= _MANY_PREFIXES
    return long and {model.vector, other.vector} == {Vector.UD, Vector.GP}


@known(
    "MMX state after a faulting MASKMOVQ",
    "any",
    "AMD's processors have marked the MMX registers in use already when the store faults (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code == b"\x0f\xf7" and model.vector == other.vector is not None


@known(
    "which byte of a saved state faults",
    "any",
    "FXSAVE, FNSAVE, FNSTENV and their kin: AMD's processors try the last byte first, and check AC before "
    "the alignment of 16 bytes (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    states = (b"\x0f\xae", 0), (b"\x0f\xae", 1), (b"\xd9", 4), (b"\xd9", 6), (b"\xdd", 4), (b"\xdd", 6)
    return (opcode.code, opcode.extension) in states and None not in {model.vector, other.vector}


@known(
    "LOCK before VERR and VERW",
    "host",
    "AMD's processors read the operand before they raise #UD for LOCK (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code == b"\x0f\x00" and 0xF0 in opcode.prefixes and model.vector == Vector.UD


@known(
    "which operand of CMPS is read first",
    "any",
    "AMD's processors read the source first in REPE CMPSB and last in all others (host); KVM's emulator last",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code in {b"\xa6", b"\xa7"} and None not in {model.vector, other.vector}


@known(
    "which fault of a near CALL comes first",
    "any",
    "AMD's processors push the return address before they look at the target (host), the SDM looks first",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    calls = opcode.code == b"\xe8" or (opcode.code == b"\xff" and opcode.extension == 2)
    return calls and None not in {model.vector, other.vector}


@known(
    "offsets that are not canonical in FS and GS",
    "any",
    "AMD's processors raise #GP for the offset even where the sum with the base is canonical (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    based = bool({0x64, 0x65} & set(opcode.prefixes)) and bool(case.fs_base | case.gs_base)
    return case.mode == 64 and based and model.vector == Vector.PF and other.vector in {Vector.GP, Vector.UD}


@known(
    "registers of a faulting POPA",
    "any",
    "AMD's processors have loaded some registers already when a later read faults (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code == b"\x61" and model.vector == other.vector is not None


@known(
    "selectors of the host's own descriptors",
    "host",
    "Linux has descriptors (TSS, TLS, 7BH for the processor's number) that the guest around a case lacks",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return model.vector == Vector.GP and 0x38 <= (model.error or 0) < 0x80 and other.vector != Vector.PF


@known(
    "where a far CALL out of 64-bit code pushes",
    "any",
    "AMD's processors cut the stack's addresses to 32 bits where the new code is 32-bit code (host); it "
    "shows with RSP below 16 or beyond 4 GiB",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    far_call = case.mode == 64 and opcode.code == b"\xff" and opcode.extension == 3
    return far_call and not 16 <= case.registers.rsp < 1 << 32
