"""Boot states: registers and descriptor tables for a guest's first instruction in every mode.

The tables are built in guest memory where offset and guest-physical address are the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from pykvm.errors import UsageError
from pykvm.machine import DescriptorTable, Registers, Segment, SpecialRegisters, Vcpu
from pykvm.memory import GuestMemory
from pykvm.x86.bits import PAGE_SIZE, Cr0, Cr4, Efer, Rflags


class BootMode(Enum):
    """The mode that a vCPU starts in."""

    REAL = "real"
    PROTECTED16 = "protected, 16-bit"
    PROTECTED32 = "protected, 32-bit"
    PAGED32 = "protected, 32-bit paging"
    PAE = "protected, PAE paging"
    LONG = "long, 4-level paging"
    LA57 = "long, 5-level paging"


_LONG: Final = (BootMode.LONG, BootMode.LA57)
_PAGED: Final = (BootMode.PAGED32, BootMode.PAE, *_LONG)


class Arena:
    """Hands out guest pages in ascending order from [start, end); all addresses are gpas in bytes."""

    def __init__(self, start: int, end: int) -> None:
        if start % PAGE_SIZE or start > end:
            raise UsageError(f"[{start:#x}, {end:#x}) is not a page-aligned range.")
        self.next = start
        self.end = end

    def take(self, pages: int = 1) -> int:
        """The gpa of that many consecutive pages.  Raises UsageError when there are no more."""
        gpa = self.next
        if gpa + pages * PAGE_SIZE > self.end:
            raise UsageError("The guest memory is too small for the guest's tables and stacks; give it more.")
        self.next += pages * PAGE_SIZE
        return gpa


# Selectors of the GDT that ``SystemTables`` builds; the ring 3 ones carry RPL 3.
CODE64, DATA, CODE32, CODE16 = 0x08, 0x10, 0x28, 0x38
CODE64_USER, DATA_USER, CODE32_USER, CODE16_USER = 0x1B, 0x23, 0x33, 0x43
_FIRST_TSS: Final = 0x50

_TSS_BYTES: Final = 104
_TSS_PAGES: Final = 3  # 104 bytes, a bit per port, and the byte of ones that must follow
_TSS_LIMIT: Final = _TSS_BYTES + 65536 // 8


def _segment(selector: int, type_: int, *, dpl: int = 0, long: int = 0, db: int = 0) -> Segment:
    return Segment(
        base=0, limit=0xFFFFFFFF, selector=selector, type=type_, dpl=dpl, s=1, l=long, db=db, g=1, present=1
    )


def _flat_segments() -> dict[int, Segment]:
    table = {}
    for dpl, code64, data, code32, code16 in (
        (0, CODE64, DATA, CODE32, CODE16),
        (3, CODE64_USER, DATA_USER, CODE32_USER, CODE16_USER),
    ):
        table[code64] = _segment(code64, 0xB, dpl=dpl, long=1)
        table[data] = _segment(data, 0x3, dpl=dpl, db=1)
        table[code32] = _segment(code32, 0xB, dpl=dpl, db=1)
        table[code16] = _segment(code16, 0xB, dpl=dpl)
    return table


def descriptor(segment: Segment) -> bytes:
    """The eight bytes of a segment descriptor (SDM vol. 3, 3.4.5)."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    base = segment.base
    return struct.pack(
        "<HHBBBB",
        limit & 0xFFFF,
        base & 0xFFFF,
        base >> 16 & 0xFF,
        access,
        limit >> 16 & 0xF | flags << 4,
        base >> 24 & 0xFF,
    )


def gate(handler: int, selector: int, *, wide: bool, ist: int = 0, dpl: int = 0) -> bytes:
    """An interrupt gate: 16 bytes if ``wide`` (long mode), else 8 (SDM vol. 3, 6.11 and 6.14.1)."""
    access = 0x8E | dpl << 5
    low = struct.pack("<HHBBH", handler & 0xFFFF, selector, ist, access, handler >> 16 & 0xFFFF)
    return low + struct.pack("<II", handler >> 32, 0) if wide else low


@dataclass(frozen=True, slots=True)
class SystemTables:
    """GDT, IDT and one TSS per vCPU in guest memory; ``idt`` has limit 0 where there are no handlers.

    Every port is allowed at CPL 3: the TSS carries an I/O bitmap of zeros (some hosts look at nothing else).
    """

    gdt: DescriptorTable
    idt: DescriptorTable
    tss: tuple[Segment, ...]

    @classmethod
    def build(
        cls,
        memory: GuestMemory,
        take: Callable[[int], int],
        *,
        wide: bool,
        stacks: Sequence[int],
        handlers: Sequence[int] = (),
    ) -> SystemTables:
        """Write the tables into pages from ``take`` (page count to gpa).

        ``wide``: long-mode formats.  ``stacks``: for each vCPU the first stack address for handlers, as RSP0
        and IST 1 (every gate uses IST 1 in long mode).  ``handlers``: linear addresses for vectors 0, 1, …
        """
        gdt = take(1)
        entry = 16 if wide else 8
        if _FIRST_TSS + len(stacks) * entry > PAGE_SIZE:
            raise UsageError(
                f"{len(stacks)} vCPUs do not fit one GDT; use at most {(PAGE_SIZE - _FIRST_TSS) // entry}."
            )
        for selector, segment in _flat_segments().items():
            memory.write(gdt + (selector & ~7), descriptor(segment))
        tss = []
        for number, stack in enumerate(stacks):
            at = take(_TSS_PAGES)
            memory.write(at, cls._tss(stack, wide))
            memory.write(at + _TSS_LIMIT, b"\xff")
            segment = Segment(base=at, limit=_TSS_LIMIT, selector=_FIRST_TSS + number * entry, type=0xB, s=0)
            memory.write(
                gdt + segment.selector,
                descriptor(segment) + (struct.pack("<II", at >> 32, 0) if wide else b""),
            )
            tss.append(segment)
        idt = DescriptorTable(0, 0)
        if handlers:
            code = CODE64 if wide else CODE32
            gates = b"".join(gate(handler, code, wide=wide, ist=1 if wide else 0) for handler in handlers)
            idt = DescriptorTable(take(1), len(gates) - 1)
            memory.write(idt.base, gates)
        return cls(DescriptorTable(gdt, _FIRST_TSS + len(stacks) * entry - 1), idt, tuple(tss))

    @staticmethod
    def _tss(stack: int, wide: bool) -> bytes:
        if wide:  # SDM vol. 3, figure 7-11: RSP0 at 4, IST1 at 36, I/O map base at 102
            return struct.pack("<IQ24xQ58xH", 0, stack, stack, _TSS_BYTES)
        return struct.pack("<IIH92xH", 0, stack, DATA, _TSS_BYTES)  # figure 7-2: ESP0, SS0, I/O map base


@dataclass(frozen=True, slots=True)
class BootState:
    """The registers of a vCPU before its first instruction."""

    registers: Registers
    special: SpecialRegisters

    def apply(self, vcpu: Vcpu) -> None:
        """Load them; the local APIC's base stays what the machine gave the vCPU."""
        self.special.apic_base = vcpu.get_special_registers().apic_base
        vcpu.set_special_registers(self.special)
        vcpu.set_registers(self.registers)


def real_mode(entry: int, *, stack: int = 0x7C00, segment: int | None = None) -> BootState:
    """Real mode at linear address ``entry`` below 1 MiB; CS is ``segment``, by default that of its 64 KiB."""
    base = (entry >> 4 & 0xF000 if segment is None else segment) << 4
    if not 0 <= entry - base <= 0xFFFF or not 0 <= stack <= 0xFFFF:
        raise UsageError(f"Real mode cannot start at {entry:#x} with CS base {base:#x} and SP {stack:#x}.")
    special = SpecialRegisters(cr0=Cr0.ET)
    special.cs = Segment(base=base, selector=base >> 4, type=0xB)
    special.idt = DescriptorTable(0, 0x3FF)
    return BootState(Registers(rip=entry - base, rsp=stack), special)


def boot_state(
    mode: BootMode,
    *,
    entry: int,
    stack: int,
    cpl: int = 0,
    cr3: int = 0,
    tables: SystemTables | None = None,
    vcpu: int = 0,
) -> BootState:
    """The state for ``entry`` (linear) in ``mode`` at CPL 0 or 3, with flat segments and interrupts off.

    Paged modes need ``cr3``.  ``tables`` gives GDT, IDT and the TSS of vCPU number ``vcpu``; without them
    the guest can neither take an exception nor, at CPL 3, use a port.  At CPL 3 RFLAGS.IOPL is 3.  Raises
    UsageError for arguments that do not fit each other.
    """
    if mode is BootMode.REAL:
        if cpl:
            raise UsageError("Real mode has no privilege levels; use cpl 0.")
        return real_mode(entry, stack=stack)
    if cpl not in {0, 3}:
        raise UsageError(f"CPL {cpl} is not supported; use 0 or 3.")
    if (mode in _PAGED) != bool(cr3):
        raise UsageError(f"Mode '{mode.value}' {'needs' if mode in _PAGED else 'has no'} page tables (cr3).")
    flat = _flat_segments()
    if mode in _LONG:
        code = flat[CODE64_USER if cpl else CODE64]
    elif mode is BootMode.PROTECTED16:
        code = flat[CODE16_USER if cpl else CODE16]
    else:
        code = flat[CODE32_USER if cpl else CODE32]
    data = flat[DATA_USER if cpl else DATA]
    special = SpecialRegisters(cs=code, ds=data, es=data, fs=data, gs=data, ss=data)
    special.cr0, special.cr3, special.cr4, special.efer = _control(mode, cr3)
    special.ldt = Segment(type=2, s=0, unusable=1, present=0, limit=0)
    special.gdt = DescriptorTable(0, 0)
    special.idt = DescriptorTable(0, 0)
    if tables is not None:
        special.gdt, special.idt, special.tr = tables.gdt, tables.idt, tables.tss[vcpu]
    rflags = Rflags.FIXED | (Rflags.IOPL3 if cpl else 0)
    return BootState(Registers(rip=entry, rsp=stack, rflags=rflags), special)


def _control(mode: BootMode, cr3: int) -> tuple[int, int, int, int]:
    """CR0, CR3, CR4 and EFER."""
    cr0 = Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | (Cr0.PG if mode in _PAGED else 0)
    cr4 = Cr4.OSFXSR | Cr4.OSXMMEXCPT
    efer = Efer(0)
    if mode is BootMode.PAGED32:
        cr4 |= Cr4.PSE
    elif mode in _PAGED:
        cr4 |= Cr4.PAE
        efer |= Efer.NXE
    if mode in _LONG:
        efer |= Efer.LME | Efer.LMA
    if mode is BootMode.LA57:
        cr4 |= Cr4.LA57
    return cr0, cr3, cr4, efer


def change_level(special: SpecialRegisters, cpl: int) -> None:
    """Make ``special``, of a vCPU in 64-bit code, code and stack segments of ``cpl`` (0 or 3) with the
    selectors that SystemTables has descriptors for; the data segments stay."""
    flat = _flat_segments()
    special.cs = flat[CODE64_USER if cpl else CODE64]
    special.ss = flat[DATA_USER if cpl else DATA]
