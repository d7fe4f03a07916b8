"""Descriptors in memory: segments, system segments and gates (SDM vol. 3, 3.4.5, 3.5 and 5.8.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from pykvm.model.cpu.faults import Fault
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor

Reject = Callable[[int], Fault]
"""From a selector's error code to the fault that refuses it: Fault.gp, Fault.ts, Fault.np or Fault.ss."""

ACCESSED: Final = 1
WRITABLE: Final = 2
READABLE: Final = 2
CONFORMING: Final = 4
CODE: Final = 8
"""Bits of a code or data segment's type (SDM vol. 3, table 3-1)."""

EXT: Final = 1
"""Error-code bit 0: the event that was being delivered is external to the program (SDM vol. 3, 6.13)."""


class System(IntEnum):
    """Types of system descriptors (SDM vol. 3, table 3-2); in IA-32e mode the 16-bit ones are reserved."""

    TSS16 = 1
    LDT = 2
    TSS16_BUSY = 3
    CALL16 = 4
    TASK = 5
    INTERRUPT16 = 6
    TRAP16 = 7
    TSS32 = 9
    TSS32_BUSY = 0xB
    CALL32 = 0xC
    INTERRUPT32 = 0xE
    TRAP32 = 0xF


class Gate(NamedTuple):
    """A call, task, interrupt or trap gate; ``parameters`` is a call gate's count, or IST in an IDT."""

    selector: int
    offset: int
    type: int
    dpl: int
    present: int
    parameters: int


def error_code(selector: int) -> int:
    """A selector as error code: without RPL (SDM vol. 3, 6.13)."""
    return selector & 0xFFFC


def with_ext(reject: Reject, ext: int) -> Reject:
    """The same refusal with the EXT bit in its error code."""
    return lambda error: reject(error | ext)


def is_null(selector: int) -> bool:
    """Whether it selects nothing: index 0 in the GDT."""
    return selector & 0xFFFC == 0


def null_segment(selector: int, dpl: int = 0) -> Segment:
    """What a null selector leaves in a segment register; ``dpl`` matters in SS, which holds the CPL."""
    return Segment(limit=0, selector=selector, type=0, present=0, dpl=dpl, s=0, unusable=1)


def real_segment(cpu: Processor, number: int, selector: int) -> Segment:
    """A segment register after a load in real-address or virtual-8086 mode.

    Real mode changes selector and base only: limit and attributes stay (SDM vol. 3, 21.1.1 and 10.9.2), but
    those of a null selector, which nothing defines, become those after reset.  Virtual-8086 mode makes every
    segment 64 KiB, writable, DPL 3 (SDM vol. 3, 21.2.1 and 27.3.1.2).
    """
    if cpu.vm86:
        return Segment(base=selector << 4, selector=selector, type=3, dpl=3)
    old = cpu.segments[number]
    if old.unusable:
        return Segment(base=selector << 4, selector=selector)
    return replace(old, base=selector << 4, selector=selector)


def segment_of(selector: int, raw: int) -> Segment:
    """A segment descriptor's 8 bytes as a segment register holds them."""
    limit = raw & 0xFFFF | raw >> 32 & 0xF0000
    granular = raw >> 55 & 1
    return Segment(
        base=raw >> 16 & 0xFFFFFF | raw >> 32 & 0xFF000000,
        limit=limit << 12 | 0xFFF if granular else limit,
        selector=selector,
        type=raw >> 40 & 0xF,
        s=raw >> 44 & 1,
        dpl=raw >> 45 & 3,
        present=raw >> 47 & 1,
        avl=raw >> 52 & 1,
        l=raw >> 53 & 1,
        db=raw >> 54 & 1,
        g=granular,
    )


def gate_of(raw: int) -> Gate:
    """A gate descriptor's 8 bytes, or 16 where ``raw`` has an upper half with offset bits 63:32."""
    return Gate(
        selector=raw >> 16 & 0xFFFF,
        offset=raw & 0xFFFF | raw >> 32 & 0xFFFF0000 | (raw >> 64 & 0xFFFFFFFF) << 32,
        type=raw >> 40 & 0xF,
        dpl=raw >> 45 & 3,
        present=raw >> 47 & 1,
        parameters=raw >> 32 & 0x1F,
    )


def descriptor_address(cpu: Processor, selector: int, size: int = 8) -> int | None:
    """Linear address of the ``size`` bytes that a selector names in GDT or LDT; None beyond the limit."""
    offset = selector & 0xFFF8
    if selector & 4:
        base, limit = cpu.ldt.base, -1 if cpu.ldt.unusable else cpu.ldt.limit
    else:
        base, limit = cpu.gdt.base, cpu.gdt.limit
    return base + offset if offset + size - 1 <= limit else None


def read_descriptor(cpu: Processor, selector: int, reject: Reject = Fault.gp, size: int = 8) -> int:
    """The bytes of a descriptor as an integer; ``reject(selector)`` where the table ends before it."""
    address = descriptor_address(cpu, selector, size)
    if address is None:
        raise reject(error_code(selector))
    return cpu.load_system(address, size)


def read_segment(cpu: Processor, selector: int, reject: Reject = Fault.gp) -> Segment:
    """The segment descriptor that a selector names."""
    return segment_of(selector, read_descriptor(cpu, selector, reject))


def set_type(cpu: Processor, segment: Segment, type_: int) -> Segment:
    """Write a type field back into the descriptor table, unless it stands there already.

    Where that faults CR2 depends on the processor; here the whole descriptor is written, as KVM does.
    """
    if segment.type == type_:
        return segment
    address = descriptor_address(cpu, segment.selector)
    assert address is not None
    access = type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    rest = cpu.load_system(address, 8) & ~(0xFF << 40)
    cpu.store_system(address, 8, rest | access << 40)
    return replace(segment, type=type_)


def mark_accessed(cpu: Processor, segment: Segment) -> Segment:
    """Set the accessed bit of a code or data segment (SDM vol. 3, 3.4.5.1)."""
    return set_type(cpu, segment, segment.type | ACCESSED)


def is_code(segment: Segment) -> bool:
    """A code segment."""
    return bool(segment.s and segment.type & CODE)


def is_conforming(segment: Segment) -> bool:
    """A conforming code segment."""
    return is_code(segment) and bool(segment.type & CONFORMING)


def is_writable_data(segment: Segment) -> bool:
    """What SS must be."""
    return bool(segment.s and not segment.type & CODE and segment.type & WRITABLE)
