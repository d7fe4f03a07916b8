"""Differences that are understood: what the SDM leaves open, and where a KVM is wrong.

Each has its evidence; docs/kvm-findings.md tells more about those of KVM.  A rule is as narrow as what was
seen: whatever no rule matches is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from pykvm.crosscheck.instructions.case import FLAT, InstructionCase, Outcome
from pykvm.observe.refusals import split
from pykvm.x86.exceptions import Vector


class Opcode(NamedTuple):
    """The instruction's bytes taken apart: prefixes with REX, opcode bytes, ModR/M behind them or 0."""

    prefixes: bytes
    code: bytes
    modrm: int

    @property
    def extension(self) -> int:
        """ModR/M.reg."""
        return self.modrm >> 3 & 7


Applies = Callable[[InstructionCase, Opcode, Outcome, Outcome], bool]


@dataclass(frozen=True, slots=True)
class Known:
    """``who`` differs from the model in cases that ``applies`` knows; ``why`` it does, in words."""

    name: str
    who: str
    why: str
    applies: Applies


TABLE: Final[list[Known]] = []


def known(name: str, who: str, why: str) -> Callable[[Applies], Applies]:
    """Enter a rule into the table; ``who`` is ``host``, ``kvm`` or ``any``."""

    def enter(applies: Applies) -> Applies:
        TABLE.append(Known(name, who, why, applies))
        return applies

    return enter


def explanation(who: str, case: InstructionCase, model: Outcome, other: Outcome) -> Known | None:
    """The first rule that explains why ``other``, which is ``who``'s, differs from the model's outcome."""
    opcode = _opcode(case)
    for each in TABLE:
        if each.who in {who, "any"} and each.applies(case, opcode, model, other):
            return each
    return None


def _opcode(case: InstructionCase) -> Opcode:
    prefixes, body = split(case.code.ljust(15, b"\0"), case.mode)
    length = 1
    if body[:1] == b"\x0f":
        length = 3 if body[1:2] in {b"\x38", b"\x3a"} else 2
    return Opcode(prefixes, body[:length], body[length] if len(body) > length else 0)


# --- what the SDM leaves open --------------------------------------------------------------------------


@known(
    "undefined shift",
    "any",
    "SHLD and SHRD by more than the operand's 16 bits: result and flags are undefined (SDM vol. 2, SHLD)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code in {b"\x0f\xa4", b"\x0f\xa5", b"\x0f\xac", b"\x0f\xad"} and (
        (0x66 in opcode.prefixes) != (case.mode == 16)
    )


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
    "stores of a faulting ENTER",
    "any",
    "an ENTER that faults may have pushed frame pointers already: below the stack pointer, so nobody's data",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code == b"\xc8" and model.vector == other.vector is not None


@known(
    "which fault of a far return comes first",
    "any",
    "RETF and IRET that would fault for more than one reason (SDM vol. 2 orders checks, not reads)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code in {b"\xca", b"\xcb", b"\xcf"} and None not in {model.vector, other.vector}


# --- a KVM that emulates -----------------------------------------------------------------------------------


def _opcodes(text: str) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(each) for each in text.split())


_SELECTORS: Final = _opcodes("8c 8e 9a ca cb cf ea ff 0f00 0f02 0f03 0fa0 0fa1 0fa8 0fa9 0fb2 0fb4 0fb5")


@known(
    "user code on kvm_pvm sees the host's descriptor tables",
    "kvm",
    "64-bit code at CPL 3 runs natively with the host's GDT and LDT: selectors mean something else",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.mode == 64 and case.cpl == 3 and opcode.code in _SELECTORS


@known(
    "kvm_pvm emulates what user code may not do",
    "kvm",
    "after #UD and #GP of 64-bit user code KVM's emulator tries the instruction, by rules of its own",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.mode == 64 and case.cpl == 3 and model.vector in {Vector.UD, Vector.GP}


@known(
    "kvm_pvm emulates with a stack pointer that is not canonical",
    "kvm",
    "64-bit user code whose RSP is not canonical is not entered but emulated, as far as the emulator goes",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    top = case.registers.rsp >> 47
    return case.mode == 64 and case.cpl == 3 and top not in {0, 0x1FFFF}


def _emulated(case: InstructionCase) -> bool:
    """What kvm_pvm runs in the kernel's emulator: everything but 64-bit code at CPL 3."""
    return case.mode != 64 or case.cpl == 0


_LACKED: Final = _opcodes("27 37 3f 62 63 9b c8 cc cd ce c4 c5 0f02 0f03 0fb8 0f77 0ff0 0f0d")
_LACKED_MAPS: Final = (b"\x0f\x38", b"\x0f\x3a")


@known(
    "KVM's emulator lacks the instruction",
    "kvm",
    "kvm-mmu.md 12.8: at CPL 3 KVM raises #UD for what its emulator does not know",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    lacked = (
        opcode.code in _LACKED
        or opcode.code[:2] in _LACKED_MAPS
        or (opcode.code == b"\x0f\x00" and opcode.extension in {4, 5})
        or case.floating is not None
    )
    return _emulated(case) and other.vector == Vector.UD and model.vector != Vector.UD and lacked


@known("KVM's emulator does not check alignment", "kvm", "#AC is not implemented (emulate.c, linearize)")
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return _emulated(case) and model.vector == Vector.AC


@known(
    "KVM's emulator runs TZCNT and LZCNT as BSF and BSR",
    "kvm",
    "kvm-mmu.md 12.8: the REP prefix of 0F BC and 0F BD is ignored",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return _emulated(case) and opcode.code in {b"\x0f\xbc", b"\x0f\xbd"} and 0xF3 in opcode.prefixes


@known(
    "KVM's emulator lets flat segments wrap",
    "kvm",
    "an operand that crosses 4 GiB in a segment of that limit faults on processors (SDM vol. 3, 5.3)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return (
        case.mode == 32
        and model.vector in {Vector.GP, Vector.SS}
        and (other.vector == Vector.PF and (other.address or 0) >= 0xFFFFFF00)
    )
