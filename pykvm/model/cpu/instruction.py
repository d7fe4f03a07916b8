"""A decoded instruction and its operands, each of which reads and writes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.flags import MASK

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor
    from pykvm.model.cpu.semantics import Semantics

ES, CS, SS, DS, FS, GS = range(6)
"""Segment registers by their number in an instruction (SDM vol. 2, table 3-1)."""
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)
"""General registers by their number in an instruction."""

_M64: Final = MASK[8]


class Operand:
    """Something an instruction reads or writes; ``size`` in bytes.  Values are unsigned."""

    __slots__ = ("size",)
    is_memory = False
    is_register = False
    size: int

    def read(self, cpu: Processor) -> int:
        raise NotImplementedError

    def read_for_update(self, cpu: Processor) -> int:
        """Read what will be written by the same instruction: memory must be writable already."""
        return self.read(cpu)

    def write(self, cpu: Processor, value: int) -> None:
        """``value`` must fit; a 32-bit register's upper half becomes zero (SDM vol. 1, 3.4.1.1)."""
        raise NotImplementedError


class Register(Operand):
    """A general register of 8, 4 or 2 bytes, or the low byte of one."""

    __slots__ = ("index", "mask")
    is_register = True

    def __init__(self, index: int, size: int) -> None:
        self.index = index
        self.size = size
        self.mask = MASK[size]

    def read(self, cpu: Processor) -> int:
        return cpu.regs[self.index] & self.mask

    def write(self, cpu: Processor, value: int) -> None:
        if self.size >= 4:
            cpu.regs[self.index] = value
        else:
            cpu.regs[self.index] = cpu.regs[self.index] & ~self.mask | value


class HighByte(Operand):
    """AH, CH, DH or BH; ``index`` is that of the register they are part of."""

    __slots__ = ("index",)
    is_register = True

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 1

    def read(self, cpu: Processor) -> int:
        return cpu.regs[self.index] >> 8 & 0xFF

    def write(self, cpu: Processor, value: int) -> None:
        cpu.regs[self.index] = cpu.regs[self.index] & ~0xFF00 | value << 8


class Immediate(Operand):
    """A constant, sign-extended to its size where the instruction says so.

    Of near branches it is the displacement, sign-extended to 8 bytes.
    """

    __slots__ = ("value",)

    def __init__(self, value: int, size: int) -> None:
        self.value = value & MASK[size]
        self.size = size

    def read(self, cpu: Processor) -> int:
        return self.value


class Memory(Operand):
    """``[base + index * scale + displacement]`` in ``segment``; ``mask`` is that of the address size.

    ``base`` and ``index`` are register numbers or -1; a base of 16 is the next instruction's address (RIP).
    """

    __slots__ = ("base", "displacement", "index", "mask", "scale", "segment")
    is_memory = True
    RIP: Final = 16

    def __init__(
        self, base: int, index: int, scale: int, displacement: int, segment: int, mask: int, size: int
    ) -> None:
        self.base = base
        self.index = index
        self.scale = scale
        self.displacement = displacement
        self.segment = segment
        self.mask = mask
        self.size = size

    def offset(self, cpu: Processor) -> int:
        """The effective address: the offset in the segment."""
        address = self.displacement
        if self.base >= 0:
            address += cpu.regs[self.base] if self.base != self.RIP else cpu.next_rip
        if self.index >= 0:
            address += cpu.regs[self.index] * self.scale
        return address & self.mask

    def moved(self, distance: int) -> Memory:
        """The same ``distance`` bytes further on: bit strings."""
        return Memory(
            self.base,
            self.index,
            self.scale,
            self.displacement + distance,
            self.segment,
            self.mask,
            self.size,
        )

    def read(self, cpu: Processor) -> int:
        return cpu.load(self.segment, self.offset(cpu), self.size)

    def read_for_update(self, cpu: Processor) -> int:
        return cpu.load_for_update(self.segment, self.offset(cpu), self.size)

    def write(self, cpu: Processor, value: int) -> None:
        cpu.store(self.segment, self.offset(cpu), self.size, value)


class SegmentRegister(Operand):
    """A segment register; reads its selector, and is loaded by segments.load_segment."""

    __slots__ = ("index",)
    is_register = True

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 2

    def read(self, cpu: Processor) -> int:
        return cpu.segments[self.index].selector


class NumberedRegister(Operand):
    """Control or debug registers, which have rules of their own: system.py reads and writes them."""

    __slots__ = ("index",)
    is_register = True

    def __init__(self, index: int, size: int = 8) -> None:
        self.index = index
        self.size = size


class ControlRegister(NumberedRegister):
    """CR0 to CR15."""


class DebugRegister(NumberedRegister):
    """DR0 to DR15."""


class StackRegister(NumberedRegister):
    """ST(0) to ST(7): relative to the top."""


class Xmm(NumberedRegister):
    """A 16-byte SSE register as an integer.  A narrower write is the semantic function's business."""

    __slots__ = ()

    def read(self, cpu: Processor) -> int:
        return cpu.xmm[self.index]

    def write(self, cpu: Processor, value: int) -> None:
        cpu.xmm[self.index] = value


class Mmx(NumberedRegister):
    """An MMX register: the significand of a physical x87 register (SDM vol. 1, 9.2)."""

    __slots__ = ()

    def read(self, cpu: Processor) -> int:
        return cpu.x87.registers[self.index] & _M64

    def write(self, cpu: Processor, value: int) -> None:
        cpu.x87.registers[self.index] = 0xFFFF << 64 | value


@dataclass(slots=True, eq=False)
class Instruction:
    """One decoded instruction.  Nothing in it depends on where it stands but the targets of branches.

    ``name`` is the semantics' name; ``opcode`` the opcode bytes without prefixes (``0f 38 f0``);
    ``operand_size`` (2, 4, 8) and ``address_size`` in bytes as the prefixes and the mode make them;
    ``rep`` is 0, 0xF2 or 0xF3 where it is not part of the opcode; ``segment`` the effective override or None;
    ``modrm`` None where the encoding has none; ``rex`` the REX byte in force or 0.
    """

    name: str
    text: str
    encoding: bytes
    opcode: bytes
    operands: tuple[Operand, ...]
    operand_size: int
    address_size: int
    modrm: int | None
    rex: int
    rep: int
    lock: bool
    segment: int | None
    semantics: Semantics

    @property
    def length(self) -> int:
        """In bytes, prefixes included."""
        return len(self.encoding)

    @property
    def address_mask(self) -> int:
        """Offsets wrap at the address size."""
        return MASK[self.address_size]

    def segment_or(self, default: int) -> int:
        """The override, or else the default segment of an implicit memory operand."""
        return default if self.segment is None else self.segment
