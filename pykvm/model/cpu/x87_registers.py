"""The x87 register stack and its image in memory (SDM vol. 1, 8.1 and 10.5.1).

Of the tag word only "empty" (3) is kept apart from the rest (0): processors work out the other values from
the registers when they store it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor
    from pykvm.model.cpu.state import X87

EMPTY: Final = 3
INVALID, DENORMAL, DIVIDE, OVERFLOW, UNDERFLOW, PRECISION = (1 << bit for bit in range(6))
STACK_FAULT: Final = 1 << 6
SUMMARY: Final = 1 << 7
C0, C1, C2, C3 = 1 << 8, 1 << 9, 1 << 10, 1 << 14
BUSY: Final = 1 << 15
EXCEPTIONS: Final = 0x3F
INDEFINITE: Final = 0xFFFF << 64 | 0xC << 60
"""The default quiet NaN (SDM vol. 1, table 4-3)."""
_CONTROL_WRITABLE: Final = 0x1F3F
_CONTROL_ONES: Final = 0x40
_SPECIAL, _ZERO, _VALID = 2, 1, 0
_REGISTER_MASK: Final = (1 << 80) - 1
HEADER_BYTES: Final = 24
REGISTERS_BYTES: Final = 128


def top(x87: X87) -> int:
    """TOP: the physical register that is ST(0)."""
    return x87.status >> 11 & 7


def set_top(x87: X87, value: int) -> None:
    x87.status = x87.status & ~0x3800 | (value & 7) << 11


def is_empty(x87: X87, index: int) -> bool:
    """Whether ST(index) is empty."""
    return x87.tags >> 2 * (top(x87) + index & 7) & 3 == EMPTY


def set_empty(x87: X87, index: int, empty: bool = True) -> None:
    shift = 2 * (top(x87) + index & 7)
    x87.tags = x87.tags & ~(3 << shift) | (EMPTY << shift if empty else 0)


def get(x87: X87, index: int) -> int:
    """The 80 bits of ST(index)."""
    return x87.registers[top(x87) + index & 7]


def put(x87: X87, index: int, value: int) -> None:
    """Fill ST(index)."""
    x87.registers[top(x87) + index & 7] = value
    set_empty(x87, index, False)


def set_control(x87: X87, value: int) -> None:
    """Load the control word: reserved bits read as zero, bit 6 as one."""
    x87.control = value & _CONTROL_WRITABLE | _CONTROL_ONES
    summarize(x87)


def set_status(x87: X87, value: int) -> None:
    """Load the status word; ES and B follow from flags and masks."""
    x87.status = value & 0x7F7F
    summarize(x87)


def summarize(x87: X87) -> None:
    """ES and its copy B: an unmasked exception is flagged (SDM vol. 1, 8.1.3.3)."""
    pending = x87.status & ~x87.control & EXCEPTIONS
    x87.status = x87.status & ~(SUMMARY | BUSY) | (SUMMARY | BUSY if pending else 0)


def initialize(x87: X87) -> None:
    """FNINIT: the registers' contents stay."""
    x87.control, x87.status, x87.tags = 0x37F, 0, 0xFFFF
    x87.opcode = x87.instruction_pointer = x87.data_pointer = 0


# --- tag words --------------------------------------------------------------------------------------------


def _tag(value: int) -> int:
    """The tag of a register that is not empty (SDM vol. 1, 8.1.7)."""
    exponent, significand = value >> 64 & 0x7FFF, value & 0xFFFFFFFFFFFFFFFF
    if exponent == 0:
        return _SPECIAL if significand else _ZERO
    return _VALID if exponent != 0x7FFF and significand >> 63 else _SPECIAL


def full_tags(x87: X87) -> int:
    """The tag word as FNSTENV stores it."""
    word = 0
    for number, value in enumerate(x87.registers):
        empty = x87.tags >> 2 * number & 3 == EMPTY
        word |= (EMPTY if empty else _tag(value)) << 2 * number
    return word


def set_full_tags(x87: X87, word: int) -> None:
    """Take from a tag word which registers are empty."""
    x87.tags = sum(EMPTY << 2 * n for n in range(8) if word >> 2 * n & 3 == EMPTY)


def abridged_tags(x87: X87) -> int:
    """A set bit for each register that is not empty (SDM vol. 1, 10.5.1.1)."""
    return sum(1 << n for n in range(8) if x87.tags >> 2 * n & 3 != EMPTY)


def set_abridged_tags(x87: X87, bits: int) -> None:
    x87.tags = sum(EMPTY << 2 * n for n in range(8) if not bits >> n & 1)


# --- the image of FXSAVE and XSAVE ------------------------------------------------------------------------


def header(cpu: Processor, wide: bool) -> bytes:
    """Bytes 0 to 23 of the area; ``wide`` pointers have 64 bits, others 32 and a selector that is zero here.

    AMD's processors store the pointers only with a pending exception (APM vol. 2, 11.4.4).
    """
    x87 = cpu.x87
    width = 8 if wide else 4
    opcode, instruction, data = x87.opcode, x87.instruction_pointer, x87.data_pointer
    if cpu.features.amd and not x87.status & SUMMARY:
        opcode = instruction = data = 0
    image = bytearray(HEADER_BYTES)
    image[0:2] = x87.control.to_bytes(2, "little")
    image[2:4] = x87.status.to_bytes(2, "little")
    image[4] = abridged_tags(x87)
    image[6:8] = opcode.to_bytes(2, "little")
    image[8 : 8 + width] = (instruction & (1 << 8 * width) - 1).to_bytes(width, "little")
    image[16 : 16 + width] = (data & (1 << 8 * width) - 1).to_bytes(width, "little")
    return bytes(image)


def load_header(cpu: Processor, image: bytes, wide: bool) -> None:
    """The inverse of ``header``."""
    x87 = cpu.x87
    width = 8 if wide else 4
    x87.status = 0
    set_control(x87, int.from_bytes(image[0:2], "little"))
    set_status(x87, int.from_bytes(image[2:4], "little"))
    set_abridged_tags(x87, image[4])
    x87.opcode = int.from_bytes(image[6:8], "little") & 0x7FF
    x87.instruction_pointer = int.from_bytes(image[8 : 8 + width], "little")
    x87.data_pointer = int.from_bytes(image[16 : 16 + width], "little")


def registers(x87: X87) -> bytes:
    """Bytes 32 to 159 of the area: ST(0) to ST(7) in 16 bytes each."""
    return b"".join(get(x87, index).to_bytes(16, "little") for index in range(8))


def load_registers(x87: X87, image: bytes) -> None:
    """The inverse; after ``load_header``, which knows TOP."""
    for index in range(8):
        value = int.from_bytes(image[16 * index : 16 * index + 16], "little") & _REGISTER_MASK
        x87.registers[top(x87) + index & 7] = value
