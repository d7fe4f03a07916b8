"""Where capstone's reading of an encoding differs from processors, and how it is put right.

Each rule names its source.  tests/model/test_decode.py holds an example of each; docs/model.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import capstone
from capstone import x86

from pykvm.model.cpu.instruction import Immediate, Operand

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


def correct(draft: Draft) -> None:
    """Put right what capstone made of the encoding."""
    for operand in draft.operands:
        if isinstance(operand, Immediate):
            pass
