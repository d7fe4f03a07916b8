"""Instruction prefixes by the SDM's rules (vol. 2, 2.1.1 and 2.2.1), and how decoding can fail."""

from __future__ import annotations

from typing import Final

from pykvm.model.cpu.instruction import CS, DS, ES, FS, GS, SS

MAX_LENGTH: Final = 15
"""Bytes of the longest instruction; a longer one raises #GP (SDM vol. 3, 6.15, interrupt 13)."""

SEGMENT_PREFIXES: Final = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}
_PREFIX_OF_SEGMENT: Final = {segment: prefix for prefix, segment in SEGMENT_PREFIXES.items()}
_LEGACY: Final = frozenset({0xF0, 0xF2, 0xF3, 0x66, 0x67, *SEGMENT_PREFIXES})


class TruncatedError(Exception):
    """The bytes end within the instruction: fetch more."""


class InvalidEncodingError(Exception):
    """The bytes are no instruction of this processor: #UD."""


class TooLongError(Exception):
    """The instruction exceeds 15 bytes: #GP(0)."""


class Prefixes:
    """The prefixes of one instruction, read as a processor does; ``end`` is where the opcode starts.

    Of repeated ones the last counts, of F2 and F3 together the last, too.
    """

    __slots__ = ("address", "end", "lock", "operand", "rep", "rex", "segment")

    def __init__(self, code: bytes, bits: int) -> None:
        self.lock = self.operand = self.address = False
        self.rep = self.rex = 0
        self.segment: int | None = None
        at = 0
        while at < len(code):
            byte = code[at]
            if byte in SEGMENT_PREFIXES:
                # In 64-bit mode ES, CS, SS and DS overrides are null prefixes: ignored, FS or GS stays.
                if bits != 64 or byte in {0x64, 0x65}:
                    self.segment = SEGMENT_PREFIXES[byte]
            elif byte == 0x66:
                self.operand = True
            elif byte == 0x67:
                self.address = True
            elif byte == 0xF0:
                self.lock = True
            elif byte in {0xF2, 0xF3}:
                self.rep = byte
            elif bits == 64 and byte & 0xF0 == 0x40:
                # REX counts only directly before the opcode.
                if at + 1 < len(code) and code[at + 1] not in _LEGACY:
                    self.rex = byte
            else:
                break
            at += 1
            if at >= MAX_LENGTH:
                raise TooLongError
        else:
            raise TruncatedError
        self.end = at

    @property
    def wide(self) -> bool:
        """REX.W."""
        return bool(self.rex & 8)

    @property
    def mandatory(self) -> bool:
        """Any that is part of the opcode in the two- and three-byte maps: 66, F2 or F3."""
        return self.operand or self.rep != 0

    def canonical(self, *, address: bool | None = None) -> bytes:
        """The prefixes that matter for decoding, once each; ``address`` overrides the one for addresses.

        LOCK is judged here, not by capstone.
        """
        result = bytearray()
        if self.segment is not None:
            result.append(_PREFIX_OF_SEGMENT[self.segment])
        if self.address if address is None else address:
            result.append(0x67)
        if self.operand:
            result.append(0x66)
        if self.rep:
            result.append(self.rep)
        if self.rex:
            result.append(self.rex)
        return bytes(result)
