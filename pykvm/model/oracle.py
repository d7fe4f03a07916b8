"""What the model knows about an instruction beyond executing it: for comparisons and for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pykvm.machine.exits import MmioWrite
from pykvm.model.cpu import decode
from pykvm.model.cpu.faults import Fault, NeedInput
from pykvm.model.cpu.instruction import Instruction
from pykvm.model.cpu.processor import Processor
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import Registers

_FILLER: Final = 0xEE


class _NoMemory:
    """A bus with nothing on it."""

    def ram(self, gfn: int) -> memoryview | None:
        return None

    def writable(self, gfn: int) -> memoryview | None:
        return None

    def write(self, gpa: int, data: bytes) -> list[MmioWrite]:
        return []

    def set_entry(self, gpa: int, size: int, value: int) -> None:
        pass

    def watch(self, gfn: int) -> None:
        pass


class InstructionOracle:
    """Undefined flags and disassembly of single instructions, for a processor with these CPUID leaves."""

    def __init__(self, cpuid: Sequence[CpuidEntry]) -> None:
        self._cpu = Processor(_NoMemory(), cpuid)
        self._decoders = {bits: decode.Decoder(bits, amd=self._cpu.features.amd) for bits in (16, 32, 64)}

    def undefined_flags(self, bits: int, code: bytes, registers: Registers) -> int:
        """The RFLAGS bits that the SDM leaves undefined after the instruction in that state; 0 if unknown."""
        instruction = self._decode(bits, code)
        if instruction is None:
            return 0
        self._cpu.set_registers(registers)
        try:
            return int(instruction.semantics.undefined_flags(self._cpu, instruction))
        except (Fault, NeedInput):  # it depends on memory, which is not here
            return 0

    def text(self, bits: int, code: bytes) -> str:
        """The instruction in assembler, or why it is none."""
        instruction = self._decode(bits, code)
        return instruction.text if instruction is not None else "no instruction that the model knows"

    def _decode(self, bits: int, code: bytes) -> Instruction | None:
        try:
            return self._decoders[bits].decode(code.ljust(decode.MAX_LENGTH, bytes([_FILLER])))
        except (
            decode.InvalidEncodingError,
            decode.TooLongError,
            decode.TruncatedError,
            decode.UnknownInstructionError,
        ):
            return None
