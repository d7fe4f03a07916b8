"""State components of XSAVE: which there are and where they lie (SDM vol. 1, 13.1 to 13.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.x86.cpuid import find

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor

X87: Final = 1 << 0
SSE: Final = 1 << 1
PKRU: Final = 1 << 9
IMPLEMENTED: Final = X87 | SSE | PKRU
"""The components this processor has; CPUID may offer fewer."""
LEGACY_AND_HEADER: Final = 576
PKRU_NUMBER: Final = 9
MXCSR_DEFAULT: Final = 0x1F80
MXCSR_MM: Final = 1 << 17
"""AMD's misaligned mode (APM vol. 1, 4.2.2): operands, but not moves, need no alignment."""
_MXCSR_MASK: Final = 0xFFFF


def mxcsr_mask(cpu: Processor) -> int:
    """The bits of MXCSR that may be set (SDM vol. 1, 11.6.6)."""
    return _MXCSR_MASK | (MXCSR_MM if cpu.features.misalignsse else 0)


def supported_xcr0(cpu: Processor) -> int:
    """The bits XSETBV takes: leaf 0xD, EDX:EAX, as far as they are implemented."""
    leaf = find(cpu.cpuid, 0xD)
    return (leaf.edx << 32 | leaf.eax) & IMPLEMENTED if leaf else 0


def placement(cpu: Processor, number: int) -> tuple[int, int]:
    """Offset in the standard format and size of an extended component (leaf 0xD, its subleaf)."""
    leaf = find(cpu.cpuid, 0xD, number)
    return (leaf.ebx, leaf.eax) if leaf else (0, 0)


def _extended(cpu: Processor, mask: int) -> list[int]:
    return [number for number in range(2, 63) if mask >> number & 1]


def standard_size(cpu: Processor, mask: int) -> int:
    """Bytes of a standard area for these components."""
    ends = [sum(placement(cpu, number)) for number in _extended(cpu, mask)]
    return max([LEGACY_AND_HEADER, *ends])


def compacted_offset(cpu: Processor, mask: int, number: int) -> int:
    """Where an extended component lies in the compacted area of ``mask`` (SDM vol. 1, 13.4.3)."""
    offset = LEGACY_AND_HEADER
    for each in _extended(cpu, mask):
        leaf = find(cpu.cpuid, 0xD, each)
        if leaf and leaf.ecx & 2:
            offset = offset + 63 & -64
        if each == number:
            break
        offset += placement(cpu, each)[1]
    return offset


def compacted_size(cpu: Processor, mask: int) -> int:
    """Bytes of a compacted area for these components."""
    numbers = _extended(cpu, mask)
    if not numbers:
        return LEGACY_AND_HEADER
    return compacted_offset(cpu, mask, numbers[-1]) + placement(cpu, numbers[-1])[1]


def in_use(cpu: Processor) -> int:
    """XINUSE: the components that are not in their initial state (SDM vol. 1, 13.6).

    Processors may report more; MXCSR does not count.
    """
    x87 = cpu.x87
    initial = (
        x87.control == 0x37F and x87.tags == 0xFFFF and not x87.status and not any(x87.registers)
        and not x87.opcode and not x87.instruction_pointer and not x87.data_pointer
    )  # fmt: skip
    return (0 if initial else X87) | (SSE if any(cpu.xmm) else 0) | (PKRU if cpu.pkru else 0)
