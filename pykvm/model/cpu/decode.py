"""Decoding: prefixes by the SDM's rules, everything behind them by capstone, corrected where it errs.

Prefixes are taken off and understood here (SDM vol. 2, 2.1.1), and only those that mean something are put
back, once each and in one order, before capstone sees the instruction: its reading of repeated, ignored and
contradicting prefixes differs from processors'.  What else it gets wrong is corrected in ``corrections.py``.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Final

import capstone
from capstone import x86

from pykvm.model.cpu import corrections
from pykvm.model.cpu.flags import MASK
from pykvm.model.cpu.instruction import (
    DS,
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
from pykvm.model.cpu.prefixes import (
    MAX_LENGTH,
    InvalidEncodingError,
    Prefixes,
    TooLongError,
    TruncatedError,
)
from pykvm.model.cpu.semantics import TABLE

__all__ = ["MAX_LENGTH", "Decoder", "InvalidEncodingError", "TooLongError", "TruncatedError"]

_CAPSTONE_MODE: Final = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}


class UnknownInstructionError(Exception):
    """capstone knows the instruction, but there are no semantics for it."""

    def __init__(self, text: str, encoding: bytes) -> None:
        super().__init__(text)
        self.text = text
        self.encoding = encoding


def _disassembler(bits: int) -> capstone.Cs:
    result = capstone.Cs(capstone.CS_ARCH_X86, _CAPSTONE_MODE[bits])
    result.detail = True
    return result


@cache
def decoder(bits: int, *, amd: bool) -> Decoder:
    """The decoder of that kind, which all share: making one takes longer than a small machine lives."""
    return Decoder(bits, amd=amd)


class Decoder:
    """Decodes for one code size (16, 32 or 64), with a cache from bytes to instructions.

    ``amd`` follows AMD where vendors differ.  Branch targets are relative: operands of near branches hold
    the displacement, sign-extended to 8 bytes.
    """

    def __init__(self, bits: int, *, amd: bool = False) -> None:
        self.bits = bits
        self.amd = amd
        self._capstone = {each: _disassembler(each) for each in (16, 32, 64)}
        self._cache: dict[bytes, Instruction] = {}
        self._lock = threading.Lock()  # capstone is not for several threads at once

    def decode(self, code: bytes) -> Instruction:
        """The instruction at the start of ``code``; give up to 15 bytes.

        Raises TruncatedError, InvalidEncodingError, TooLongError, UnknownInstructionError.
        """
        known = self._cache.get(code)
        if known is None:
            if len(self._cache) > 65536:
                self._cache.clear()
            with self._lock:
                known = self._cache[code] = self._decode(code)
        return known

    def _decode(self, code: bytes) -> Instruction:
        prefixes = Prefixes(code, self.bits)
        body = code[prefixes.end :]
        if len(body) < corrections.least_length(body, self.bits):
            raise TruncatedError
        shown = corrections.shown(prefixes, body, self.bits, self.amd)
        found = self._disassemble(shown)
        if found is None:
            if self._goes_on(shown):
                raise TruncatedError
            raise InvalidEncodingError
        if prefixes.wide and prefixes.mandatory and self._rejected_without_rex_w(prefixes, shown):
            raise InvalidEncodingError
        length = prefixes.end + found.size - len(shown.prefixes)
        if length > MAX_LENGTH:
            raise TooLongError
        return self._instruction(found, prefixes, shown, code[:length])

    def _disassemble(self, shown: corrections.Shown) -> capstone.CsInsn | None:
        return next(self._capstone[shown.bits].disasm(shown.prefixes + shown.body, 0, 1), None)

    def _goes_on(self, shown: corrections.Shown) -> bool:
        """Whether some ModR/M or immediate would make an instruction of the bytes."""
        return any(
            self._disassemble(shown._replace(body=shown.body + bytes([first]) + bytes(MAX_LENGTH)))
            is not None
            for first in (*range(0, 0x40, 8), *range(0xC0, 0x100))
        )

    def _rejected_without_rex_w(self, prefixes: Prefixes, shown: corrections.Shown) -> bool:
        """With REX.W capstone overlooks a 66, F2 or F3 that the opcode does not allow (host)."""
        narrow = shown.prefixes[:-1] + bytes([prefixes.rex & ~8])
        return self._disassemble(shown._replace(prefixes=narrow)) is None

    def _instruction(
        self, found: capstone.CsInsn, prefixes: Prefixes, shown: corrections.Shown, encoding: bytes
    ) -> Instruction:
        bits = self.bits
        short = prefixes.operand != (bits == 16)
        address_size = {64: (8, 4), 32: (4, 2), 16: (2, 4)}[bits][prefixes.address]
        body = encoding[prefixes.end :]
        modrm_at = found.modrm_offset - len(shown.prefixes)
        opcode = corrections.opcode_bytes(body)
        if corrections.is_relative(found):
            # The displacement ends the instruction; capstone gives a target, cut differently in each mode.
            displacement = int.from_bytes(body[len(opcode) :], "little", signed=True)
            operands: list[Operand] = [Immediate(displacement, 8)]
        else:
            operands = [self._operand(each, prefixes, address_size) for each in found.operands]
        draft = corrections.Draft(
            name=self._capstone[bits].insn_name(found.id),
            operands=operands,
            opcode=opcode,
            modrm=body[modrm_at] if found.modrm_offset else None,
            operand_size=8 if prefixes.wide else 2 if short else 4,
            address_size=address_size,
            bits=bits,
            amd=self.amd,
            prefixes=prefixes,
        )
        corrections.correct(draft)
        text = f"{found.mnemonic} {found.op_str}".rstrip()
        entry = TABLE.get(draft.name)
        first = draft.operands[0] if draft.operands else None
        if prefixes.lock and not (entry and entry.lockable and first and first.is_memory):
            raise InvalidEncodingError
        if entry is None:
            if corrections.is_absent(draft.name, body, bits):
                raise InvalidEncodingError
            raise UnknownInstructionError(text, encoding)
        return Instruction(
            name=draft.name,
            text=("lock " if prefixes.lock else "") + text,
            encoding=encoding,
            opcode=draft.opcode,
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

    def _operand(self, operand: x86.X86Op, prefixes: Prefixes, address_size: int) -> Operand:
        if operand.type == x86.X86_OP_REG:
            return REGISTERS.get(operand.reg, _OTHER_REGISTER)
        if operand.type == x86.X86_OP_IMM:
            return Immediate(operand.imm, operand.size or 1)
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

_OTHER_REGISTER: Final = Operand()
"""Registers of instructions that have no semantics here, such as YMM0."""

_SEGMENTS: Final = {
    number: each.index for number, each in REGISTERS.items() if isinstance(each, SegmentRegister)
}
_ADDRESS_REGISTERS: Final = {
    number: each.index for number, each in REGISTERS.items() if isinstance(each, Register) and each.size > 1
} | {x86.X86_REG_RIP: Memory.RIP, x86.X86_REG_EIP: Memory.RIP, x86.X86_REG_RIZ: -1, x86.X86_REG_EIZ: -1}
