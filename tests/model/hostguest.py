"""A guest for comparing a host's MMU with its model, step by step: the one of docs/reference/hosts.md 0.

One slot of 64 MiB, mapped one to one by 4 KiB pages with U and W set and A and D clear; descriptor tables, a
TSS and handlers that report their vector.  Each ``step`` puts one snippet at the code page and runs it to
its first exit, then tells what KVM's log and counters say about it.

Frames: 1 code, 2 PML4, 0x100 PDPT, 0x101 PD, 0x102 to 0x121 page tables; 3 GDT, 4 TSS, 5 IDT, 6 handlers,
7 stack, 8 stack of CPL 0; data from 0x2000 on, under page table 0x112.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from pykvm.crosscheck.counters import DETERMINISTIC
from pykvm.errors import PykvmError
from pykvm.machine import Exit, Registers, SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import DescriptorTable, Segment, SpecialRegisters

CODE, PML4, GDT, TSS, IDT, HANDLERS, STACK, STACK0 = 1, 2, 3, 4, 5, 6, 7, 8
PDPT, PD, PT = 0x100, 0x101, 0x102
DATA: Final = 0x2000
PAGES: Final = 0x4000
DONE: Final = b"\xe6\x10"
"""out 0x10, al"""
P, W, U, A, D = 1, 2, 4, 0x20, 0x40
_VECTORS: Final = 32
_CODE0, _DATA0 = 0x00AF9B000000FFFF, 0x00CF93000000FFFF
_DATA3, _CODE3 = 0x00CFF3000000FFFF, 0x00AFFB000000FFFF


class Step(NamedTuple):
    """What a step did: its exit, the ring entries or dirty pages (frames), and the counters that moved."""

    exit: Exit
    marks: tuple[int, ...]
    counters: dict[str, int]


class HostGuest:
    """The guest on a fresh machine; ``ring`` entries, or 0 for the bitmap.

    ``flags``: those of page-table leaves beside the frame; ``upper``: of the entries above them; ``cpuid``:
    what the guest sees, by default all that the machine offers.
    """

    def __init__(
        self,
        machine: Any,
        *,
        cpl: int = 3,
        ring: int = 4096,
        flags: int = P | W | U,
        upper: int = P | W | U,
        slot_flags: SlotFlags = SlotFlags.LOG_DIRTY_PAGES,
        cpuid: Sequence[CpuidEntry] | None = None,
    ) -> None:
        self.machine = machine
        self.cpl = cpl
        self.ring = ring
        if ring:
            machine.enable_dirty_ring(ring)
        self.memory = GuestMemory(PAGES * PAGE_SIZE)
        self.memory.view()[::PAGE_SIZE] = 0  # hosts.md A: untouched memory behaves otherwise
        self._tables(flags, upper)
        self._system()
        self.slot = machine.create_slot(self.memory, 0, flags=slot_flags)
        self.vcpu = machine.create_vcpu()
        self.vcpu.set_cpuid(machine.supported_cpuid if cpuid is None else cpuid)
        self.special = self._special(self.vcpu.get_special_registers())
        self.vcpu.set_special_registers(self.special)
        self._seen = 0
        self._counters = self.counters()

    def _tables(self, flags: int, upper: int) -> None:
        self.memory.write(PML4 * PAGE_SIZE, struct.pack("<Q", PDPT << 12 | upper))
        self.memory.write(PDPT * PAGE_SIZE, struct.pack("<Q", PD << 12 | upper))
        count = PAGES // 512
        self.memory.write(
            PD * PAGE_SIZE, struct.pack(f"<{count}Q", *(PT + n << 12 | upper for n in range(count)))
        )
        leaves = struct.pack(f"<{PAGES}Q", *(page << 12 | flags for page in range(PAGES)))
        self.memory.write(PT * PAGE_SIZE, leaves)

    def _system(self) -> None:
        self.memory.write(GDT * PAGE_SIZE, struct.pack("<5Q", 0, _CODE0, _DATA0, _DATA3, _CODE3))
        body = bytearray(0x100)
        struct.pack_into("<Q", body, 4, (STACK0 + 1) * PAGE_SIZE)
        struct.pack_into("<H", body, 0x66, 0x68)
        self.memory.write(TSS * PAGE_SIZE, bytes(body))
        for vector in range(_VECTORS):
            at = HANDLERS * PAGE_SIZE + 16 * vector
            self.memory.write(at, bytes([0xE6, 0x20 + vector, 0xF4, 0xEB, 0xFB]))
            gate = struct.pack("<HHBBHII", at & 0xFFFF, 8, 0, 0xEE, at >> 16 & 0xFFFF, at >> 32, 0)
            self.memory.write(IDT * PAGE_SIZE + 16 * vector, gate)

    def _special(self, start: SpecialRegisters) -> SpecialRegisters:
        cpl = self.cpl
        code = Segment(0, 0xFFFFFFFF, 0x23 if cpl else 8, 0xB, 1, cpl, 0, 1, 1, 1)
        data = Segment(0, 0xFFFFFFFF, 0x1B if cpl else 0x10, 3, 1, cpl, 1, 1, 0, 1)
        start.cs = code
        start.ds = start.es = start.fs = start.gs = start.ss = data
        start.tr = Segment(TSS << 12, 0xFFF, 0x40, 0xB, 1, 0, 0, 0, 0, 0)
        start.gdt = DescriptorTable(GDT << 12, 0x27)
        start.idt = DescriptorTable(IDT << 12, 0xFFF)
        start.cr0 = 0x80010033
        start.cr3 = PML4 << 12
        start.cr4 = 0x620
        start.efer = 0xD00
        return start

    # --- acting ----------------------------------------------------------------------------------

    def step(self, code: bytes, **registers: int) -> Step:
        """Run a snippet that ends with ``DONE`` to its first exit."""
        self.memory.write(CODE * PAGE_SIZE, code)
        registers.setdefault("rflags", 0x3002 if self.cpl else 2)
        registers.setdefault("rsp", (STACK + 1) * PAGE_SIZE)
        self.vcpu.set_registers(Registers(rip=CODE * PAGE_SIZE, **registers))
        return self.go_on()

    def go_on(self) -> Step:
        """Run to the next exit."""
        exit = self.vcpu.run()
        return Step(exit, self.marks(), self.moved())

    def marks(self) -> tuple[int, ...]:
        """Frames pushed to the ring since the last look; in bitmap mode what GET_DIRTY_LOG gives."""
        if not self.ring:
            return tuple(int(gfn) for gfn in self.machine.get_dirty_log(self.slot))
        entries, self._seen = self.vcpu.peek_ring(self._seen)
        return () if entries is None else tuple(int(offset) for offset in entries.offsets)

    def moved(self) -> dict[str, int]:
        """Deterministic counters that moved since the last look, and by how much."""
        before, self._counters = self._counters, self.counters()
        return {name: value - before[name] for name, value in self._counters.items() if value != before[name]}

    def counters(self) -> dict[str, int]:
        """The deterministic counters of machine and vCPU."""
        return {
            name: source.statistics().value(name)
            for source in (self.machine, self.vcpu)
            for name in source.statistics()
            if name in DETERMINISTIC
        }

    def entry(self, table: int, index: int, value: int) -> None:
        """Write a page-table entry from the host."""
        self.memory.write(table * PAGE_SIZE + 8 * index, value.to_bytes(8, "little"))

    def close(self) -> None:
        self.machine.close()
        self.memory.close()

    def __enter__(self) -> HostGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def host_guest(system: Any, **options: Any) -> Iterator[HostGuest]:
    """A HostGuest on a fresh machine of ``system``."""
    machine = system.create_machine()
    try:
        guest = HostGuest(machine, **options)
    except PykvmError:
        machine.close()
        raise
    with guest:
        yield guest
