"""Decoding: prefixes by the SDM's rules, everything behind them by capstone, corrected where it errs.

Prefixes are taken off and understood here (SDM vol. 2, 2.1.1), and only those that mean something are put
back, once each and in one order, before capstone sees the instruction: its reading of repeated, ignored and
contradicting prefixes differs from processors'.  What else it gets wrong is corrected in ``corrections.py``.
"""

from __future__ import annotations

from typing import Final

import capstone
from capstone import x86

from pykvm.model.cpu import corrections
from pykvm.model.cpu.flags import MASK
from pykvm.model.cpu.instruction import (
    CS,
    DS,
    ES,
    FS,
    GS,
    SS,
    ControlRegister,
    DebugRegister,
    HighByte,
    Immediate,
    Instruction,
    Memory,
    Mmx,
    Operand,
    Register,
    SegmentRegister,
    StackRegister,
    Xmm,
)
from pykvm.model.cpu.semantics import TABLE

MAX_LENGTH: Final = 15
"""Bytes of the longest instruction; a longer one raises #GP (SDM vol. 3, 6.15, interrupt 13)."""

SEGMENT_PREFIXES: Final = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}
_PREFIX_OF_SEGMENT: Final = {segment: prefix for prefix, segment in SEGMENT_PREFIXES.items()}
_LEGACY: Final = frozenset({0xF0, 0xF2, 0xF3, 0x66, 0x67, *SEGMENT_PREFIXES})

_CAPSTONE_MODE: Final = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}


class TruncatedError(Exception):
    """The bytes end within the instruction: fetch more."""


class InvalidEncodingError(Exception):
    """The bytes are no instruction of this processor: #UD."""


class TooLongError(Exception):
    """The instruction exceeds 15 bytes: #GP(0)."""


class UnknownInstructionError(Exception):
    """capstone knows the instruction, but there are no semantics for it."""

    def __init__(self, text: str, encoding: bytes) -> None:
        super().__init__(text)
        self.text = text
        self.encoding = encoding


class Prefixes:
    """The prefixes of one instruction, read as a processor does; ``end`` is where the opcode starts."""

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
                # REX counts only directly before the opcode (SDM vol. 2, 2.2.1).
                if at + 1 < len(code) and code[at + 1] not in _LEGACY and code[at + 1] & 0xF0 != 0x40:
                    self.rex = byte
            else:
                break
            at += 1
            if at >= MAX_LENGTH:
                raise TooLongError
        else:
            raise TruncatedError
        self.end = at

    def canonical(self) -> bytes:
        """The prefixes that matter for decoding, once each.  LOCK is judged here, not by capstone."""
        result = bytearray()
        if self.segment is not None:
            result.append(_PREFIX_OF_SEGMENT[self.segment])
        if self.address:
            result.append(0x67)
        if self.operand:
            result.append(0x66)
        if self.rep:
            result.append(self.rep)
        if self.rex:
            result.append(self.rex)
        return bytes(result)


class Decoder:
    """Decodes for one code size (16, 32 or 64), with a cache from bytes to instructions.

    ``amd`` follows AMD where vendors differ.  Branch targets are relative: operands of near branches hold
    the displacement, sign-extended to 8 bytes.
    """

    def __init__(self, bits: int, *, amd: bool = False) -> None:
        self.bits = bits
        self.amd = amd
        self._capstone = capstone.Cs(capstone.CS_ARCH_X86, _CAPSTONE_MODE[bits])
        self._capstone.detail = True
        self._cache: dict[bytes, Instruction] = {}

    def decode(self, code: bytes) -> Instruction:
        """The instruction at the start of ``code``; give up to 15 bytes.

        Raises TruncatedError, InvalidEncodingError, TooLongError, UnknownInstructionError.
        """
        known = self._cache.get(code)
        if known is None:
            if len(self._cache) > 65536:
                self._cache.clear()
            known = self._cache[code] = self._decode(code)
        return known

    def _decode(self, code: bytes) -> Instruction:
        prefixes = Prefixes(code, self.bits)
        canonical = corrections.prefixes(prefixes, code, self.bits, self.amd)
        tail = corrections.encoding(prefixes, code[prefixes.end :], self.bits)
        if not tail:
            raise TruncatedError
        found = next(self._capstone.disasm(canonical + tail, 0, 1), None)
        if found is None:
            # Padding tells bytes that are no instruction from ones that go on.
            room = MAX_LENGTH - len(code)
            for filler in (b"\0", b"\xc0") if room > 0 else ():
                if next(self._capstone.disasm(canonical + tail + filler * room, 0, 1), None) is not None:
                    raise TruncatedError
            raise InvalidEncodingError
        length = prefixes.end + found.size - len(canonical)
        if length > MAX_LENGTH:
            raise TooLongError
        return self._instruction(found, prefixes, len(canonical), code[:length])

    def _instruction(
        self, found: capstone.CsInsn, prefixes: Prefixes, skipped: int, encoding: bytes
    ) -> Instruction:
        bits = self.bits
        wide = bits == 64 and bool(prefixes.rex & 8)
        operand_size = (
            8 if wide else (2 if prefixes.operand else 4) if bits != 16 else 4 if prefixes.operand else 2
        )
        address_size = {64: (8, 4), 32: (4, 2), 16: (2, 4)}[bits][prefixes.address]
        body = encoding[prefixes.end :]
        opcode = corrections.opcode_bytes(body)
        modrm_at = len(opcode)
        has_modrm = bool(found.modrm_offset) or found.modrm != 0
        draft = corrections.Draft(
            name=self._capstone.insn_name(found.id),
            operands=[self._operand(found, each, prefixes, address_size) for each in found.operands],
            opcode=opcode,
            modrm=body[modrm_at] if has_modrm and modrm_at < len(body) else None,
            operand_size=operand_size,
            address_size=address_size,
            bits=bits,
            amd=self.amd,
            prefixes=prefixes,
            displacement_end=found.size,
        )
        corrections.correct(draft)
        text = f"{found.mnemonic} {found.op_str}".rstrip()
        entry = TABLE.get(draft.name)
        if entry is None:
            raise UnknownInstructionError(text, encoding)
        first = draft.operands[0] if draft.operands else None
        if prefixes.lock and not (entry.lockable and first is not None and first.is_memory):
            raise InvalidEncodingError
        return Instruction(
            name=draft.name,
            text=("lock " if prefixes.lock else "") + text,
            encoding=encoding,
            opcode=opcode,
            operands=tuple(draft.operands),
            operand_size=draft.operand_size,
            address_size=address_size,
            modrm=draft.modrm,
            rex=prefixes.rex,
            rep=prefixes.rep,
            lock=prefixes.lock,
            segment=prefixes.segment,
            semantics=entry,
        )

    def _operand(
        self, found: capstone.CsInsn, operand: x86.X86Op, prefixes: Prefixes, address_size: int
    ) -> Operand:
        if operand.type == x86.X86_OP_REG:
            return REGISTERS[operand.reg]
        if operand.type == x86.X86_OP_IMM:
            if corrections.is_relative(found):
                # capstone gives the target of a branch at address 0, cut to the operand size.
                bits = 8 * operand.size
                displacement = (operand.imm - found.size + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
                return Immediate(displacement, 8)
            return Immediate(operand.imm, operand.size)
        memory = operand.mem
        base = -1 if memory.base == x86.X86_REG_INVALID else _ADDRESS_REGISTERS[memory.base]
        index = -1 if memory.index == x86.X86_REG_INVALID else _ADDRESS_REGISTERS[memory.index]
        segment = prefixes.segment
        if memory.segment != x86.X86_REG_INVALID:
            # String destinations are always in ES, whatever the prefix.
            segment = _SEGMENTS[memory.segment]
        if segment is None:
            segment = SS if base in {4, 5} else DS
        return Memory(base, index, memory.scale, memory.disp, segment, MASK[address_size], operand.size)


def _registers() -> dict[int, Operand]:
    names64 = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    table: dict[str, Operand] = {}
    for number, name in enumerate(names64):
        table[name] = Register(number, 8)
        table["e" + name[1:]] = Register(number, 4)
        table[name[1:]] = Register(number, 2)
        table[name[1:] + "l" if number >= 4 else name[1] + "l"] = Register(number, 1)
        if number < 4:
            table[name[1] + "h"] = HighByte(number)
    for number in range(8, 16):
        for suffix, size in (("", 8), ("d", 4), ("w", 2), ("b", 1)):
            table[f"r{number}{suffix}"] = Register(number, size)
    for number, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs")):
        table[name] = SegmentRegister(number)
    for number in range(16):
        table[f"cr{number}"] = ControlRegister(number)
        table[f"dr{number}"] = DebugRegister(number)
        table[f"xmm{number}"] = Xmm(number, 16)
    for number in range(8):
        table[f"mm{number}"] = Mmx(number, 8)
        table[f"st{number}"] = StackRegister(number, 10)
    return {getattr(x86, f"X86_REG_{name.upper()}"): operand for name, operand in table.items()}


REGISTERS: Final = _registers()
"""Operands by capstone's register number; shared, since they hold no state."""

_SEGMENTS: Final = {
    number: each.index for number, each in REGISTERS.items() if isinstance(each, SegmentRegister)
}
_ADDRESS_REGISTERS: Final = {
    number: each.index for number, each in REGISTERS.items() if isinstance(each, Register) and each.size > 1
} | {x86.X86_REG_RIP: Memory.RIP, x86.X86_REG_EIP: Memory.RIP, x86.X86_REG_RIZ: -1, x86.X86_REG_EIZ: -1}
