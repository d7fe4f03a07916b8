"""A processor on a megabyte of memory, for tests of single instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pykvm.machine.exits import MmioWrite
from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import CS, SS
from pykvm.model.cpu.processor import Processor
from pykvm.x86.bits import Cr0, Cr4, Efer
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import Segment

SIZE = 1 << 20
CODE = 0x8000
DATA = 0x9000
TOP_TABLE = 0x1000
_FRAME = 0x1000


class Memory:
    """The bus: RAM from 0, holes above; counts what was written."""

    def __init__(self) -> None:
        self.bytes = bytearray(SIZE)
        self.dirty: set[int] = set()

    def ram(self, gfn: int) -> memoryview | None:
        at = gfn * _FRAME
        return memoryview(self.bytes)[at : at + _FRAME] if at < SIZE else None

    def writable(self, gfn: int) -> memoryview | None:
        self.dirty.add(gfn)
        return self.ram(gfn)

    def write(self, gpa: int, data: bytes) -> list[MmioWrite]:
        if gpa >= SIZE:
            return [MmioWrite(gpa, data)]
        self.dirty.add(gpa // _FRAME)
        self.bytes[gpa : gpa + len(data)] = data
        return []

    def set_entry(self, gpa: int, size: int, value: int) -> None:
        self.write(gpa, value.to_bytes(size, "little"))

    def watch(self, gfn: int) -> None:
        pass


class Chip(Processor):
    """A processor in a mode of one's choice, identity-mapped where it pages."""

    bus: Memory

    def __init__(self, bits: int = 64, cpl: int = 0, cpuid: Sequence[CpuidEntry] | None = None) -> None:
        super().__init__(Memory(), supported_cpuid() if cpuid is None else cpuid)
        flat = Segment(limit=0xFFFFFFFF, selector=8 | cpl, type=0xB, dpl=cpl, g=1)
        if bits == 64:
            # one user-accessible 1 GiB page
            self.put(TOP_TABLE, (TOP_TABLE + _FRAME | 7).to_bytes(8, "little"))
            self.put(TOP_TABLE + _FRAME, (0x87).to_bytes(8, "little"))
            self.cr3 = TOP_TABLE
            self.efer = Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE
            self.cr0 = Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.PG
            self.cr4 = Cr4.PAE | Cr4.OSFXSR | Cr4.OSXMMEXCPT
        elif bits == 32:
            self.cr0 = Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE
            self.cr4 = Cr4.OSFXSR | Cr4.OSXMMEXCPT
        if bits == 16:
            self.segments[CS] = Segment(type=0xB)
        else:
            self.segments = [replace(flat, type=3, db=1, selector=16 | cpl) for _ in range(6)]
            self.segments[CS] = replace(flat, l=int(bits == 64), db=int(bits == 32))
            self.segments[SS] = replace(self.segments[SS])
        self.update_mode()
        self.rip = CODE

    def put(self, address: int, data: bytes) -> None:
        """Fill memory without any trace."""
        self.bus.bytes[address : address + len(data)] = data

    def at(self, address: int, size: int) -> int:
        """A little-endian integer in memory."""
        return int.from_bytes(self.bus.bytes[address : address + size], "little")

    def do(self, code: str | bytes) -> str | None:
        """Execute one instruction; the fault it raised, as text, or None.  RIP returns to its start."""
        encoding = bytes.fromhex(code) if isinstance(code, str) else code
        self.put(CODE, encoding)
        self.rip = CODE
        try:
            insn = self.fetch()
        except Fault as fault:
            return str(fault)
        try:
            self.execute(insn)
        except Fault as fault:
            self.rollback()
            return str(fault)
        self.rip = CODE
        return None
