"""Where capstone's reading of an encoding differs from processors, and how it is put right.

Each rule names its source.  tests/model/test_decode.py holds an example of each; docs/model.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import capstone
from capstone import x86

from pykvm.model.cpu.instruction import Operand

if TYPE_CHECKING:
    from pykvm.model.cpu.decode import Prefixes

_RELATIVE: Final = frozenset({x86.X86_GRP_BRANCH_RELATIVE})


@dataclass(slots=True)
class Draft:
    """An instruction before its corrections; ``prefixes`` are those in force."""

    name: str
    operands: list[Operand]
    opcode: bytes
    modrm: int | None
    operand_size: int
    address_size: int
    bits: int
    amd: bool
    prefixes: Prefixes
    displacement_end: int


def opcode_bytes(body: bytes) -> bytes:
    """The opcode at the start of an instruction without prefixes; VEX prefixes count as one byte."""
    if body[0] != 0x0F:
        return body[:1]
    return body[:3] if body[1:2] in {b"\x38", b"\x3a"} else body[:2]


def is_relative(found: capstone.CsInsn) -> bool:
    """Whether the immediate is a branch target relative to the next instruction."""
    return any(group in _RELATIVE for group in found.groups)


def _is_near_branch(body: bytes) -> bool:
    return (
        body[:1] in {b"\xe8", b"\xe9", b"\xeb", b"\xc2", b"\xc3"}
        or 0x70 <= body[0] <= 0x7F
        or 0xE0 <= body[0] <= 0xE3
        or (body[0] == 0x0F and len(body) > 1 and 0x80 <= body[1] <= 0x8F)
        or (body[0] == 0xFF and len(body) > 1 and body[1] >> 3 & 7 in {2, 4})
    )


def prefixes(found: Prefixes, code: bytes, bits: int, amd: bool) -> bytes:
    """The prefix bytes to show capstone."""
    body = code[found.end :]
    # Intel processors ignore the operand-size prefix of near branches in 64-bit mode (SDM vol. 2, JMP, CALL,
    # RET, Jcc); AMD's use a 16-bit offset (APM vol. 3, "Near branches").
    if bits == 64 and not amd and body and found.operand and not found.rex & 8 and _is_near_branch(body):
        found.operand = False
    return found.canonical()


def encoding(found: Prefixes, body: bytes, bits: int) -> bytes:
    """The bytes behind the prefixes to show capstone, of the same length."""
    return body


_NAMES: Final = {
    # string instructions, which capstone calls by their size and some by the name of an SSE instruction
    b"\x6c": "ins", b"\x6d": "ins", b"\x6e": "outs", b"\x6f": "outs", b"\xa4": "movs", b"\xa5": "movs",
    b"\xa6": "cmps", b"\xa7": "cmps", b"\xaa": "stos", b"\xab": "stos", b"\xac": "lods", b"\xad": "lods",
    b"\xae": "scas", b"\xaf": "scas",
    # instructions on segment, control and debug registers, which share a name with general ones
    b"\x8c": "mov_sreg", b"\x8e": "mov_sreg", b"\x06": "push_sreg", b"\x0e": "push_sreg",
    b"\x16": "push_sreg", b"\x1e": "push_sreg", b"\x0f\xa0": "push_sreg", b"\x0f\xa8": "push_sreg",
    b"\x07": "pop_sreg", b"\x17": "pop_sreg", b"\x1f": "pop_sreg", b"\x0f\xa1": "pop_sreg",
    b"\x0f\xa9": "pop_sreg", b"\x0f\x20": "mov_cr", b"\x0f\x22": "mov_cr", b"\x0f\x21": "mov_dr",
    b"\x0f\x23": "mov_dr",
    # one name for all operand sizes; the size is in ``operand_size``
    b"\x60": "pusha", b"\x61": "popa", b"\x9c": "pushf", b"\x9d": "popf", b"\xcf": "iret",
    b"\xe3": "jrcxz", b"\xd7": "xlat", b"\xa0": "mov", b"\xa1": "mov", b"\xa2": "mov", b"\xa3": "mov",
}  # fmt: skip
"""Names by opcode, where capstone's names do not tell instructions apart or tell too many apart."""

_DEFAULT_64: Final = frozenset(
    [bytes([byte]) for byte in (*range(0x50, 0x60), 0x68, 0x6A, *range(0x70, 0x80), 0x8F, 0x9C, 0x9D)]
    + [bytes([byte]) for byte in (0xC2, 0xC3, 0xC8, 0xC9, *range(0xE0, 0xE4), 0xE8, 0xE9, 0xEB)]
    + [bytes([0x0F, byte]) for byte in (*range(0x80, 0x90), 0xA0, 0xA1, 0xA8, 0xA9)]
)
"""Opcodes with an operand size of 64 bits in 64-bit mode without REX.W: near branches, and all that use the
stack but far transfers (SDM vol. 1, 6.2.5; vol. 2, table A-1, superscripts d64 and f64)."""


def _defaults_to_64(draft: Draft) -> bool:
    group5 = draft.opcode == b"\xff" and draft.modrm is not None and draft.modrm >> 3 & 7 in {2, 4, 6}
    return group5 or draft.opcode in _DEFAULT_64


_NAMES_BY_EXTENSION: Final = {
    (b"\xff", 3): "lcall",
    (b"\xff", 5): "ljmp",
    (b"\xc0", 6): "shl",
    (b"\xc1", 6): "shl",
    (b"\xd0", 6): "shl",
    (b"\xd1", 6): "shl",
    (b"\xd2", 6): "shl",
    (b"\xd3", 6): "shl",
}
"""The same by opcode and the reg field of ModR/M: far forms, and the second encoding of SHL."""


def correct(draft: Draft) -> None:
    """Put right what capstone made of the encoding."""
    draft.name = _NAMES.get(draft.opcode, draft.name)
    if draft.bits == 64 and _defaults_to_64(draft):
        short = draft.prefixes.operand and not draft.prefixes.rex & 8
        draft.operand_size = 2 if short else 8
    if draft.modrm is not None:
        draft.name = _NAMES_BY_EXTENSION.get((draft.opcode, draft.modrm >> 3 & 7), draft.name)
