"""What a rule about known differences is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from pykvm.crosscheck.instructions.case import InstructionCase, Outcome
from pykvm.observe.refusals import split


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
    """Enter a rule into the table; ``who`` is ``host``, ``kvm``, ``any``, or ``tcg`` for both in its labs."""

    def enter(applies: Applies) -> Applies:
        TABLE.append(Known(name, who, why, applies))
        return applies

    return enter


def opcode_of(case: InstructionCase) -> Opcode:
    """Taken apart without decoding: what is no instruction has an opcode, too."""
    prefixes, body = split(case.code.ljust(15, b"\0"), case.mode)
    length = 1
    if body[:1] == b"\x0f":
        length = 3 if body[1:2] in {b"\x38", b"\x3a"} else 2
    return Opcode(prefixes, body[:length], body[length] if len(body) > length else 0)


def opcodes(text: str) -> frozenset[bytes]:
    """Opcodes in hexadecimal."""
    return frozenset(bytes.fromhex(each) for each in text.split())
