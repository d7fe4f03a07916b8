"""The guest of the probes: one vCPU, one slot of 64 pages, one snippet a run.

Frames: 1 code, 2 PML4, 3 PDPT, 4 PD, 5 the page table that maps all of it one to one, 6 TSS (all zero: its
I/O bitmap allows every port), 7 GDT and IDT (empty: any exception is a triple fault), 8 stack, 9 the page
table of a window at 2 MiB, 16 on data.  What a probe edits is the window: its table becomes unsynchronised
without the one that maps the code.

A is set in every entry, D in those of data and of tables, so that nothing but the probed behaviour writes.
"""

from __future__ import annotations

import struct
import threading
from types import TracebackType
from typing import Final, Self

from pykvm.machine import Exit, IoOut, Kicked, Machine, Registers, Slot, SlotFlags, System, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.bits import Cr0, Cr4, Efer, Pte, Rflags
from pykvm.x86.registers import DescriptorTable, Segment, SpecialRegisters

CODE, PML4, PDPT, PD, PT, TSS, GDT, STACK, WINDOW_PT, DATA = 1, 2, 3, 4, 5, 6, 7, 8, 9, 16
PAGES: Final = 64
WINDOW: Final = 0x20_0000
HOLE: Final = 0x4000
"""A gfn without a slot."""
PORT: Final = 0x10
DONE: Final = bytes([0xE6, PORT])
"""out 0x10, al"""
_NOP: Final = b"\x90"
"""First in every snippet: KVM on AMD takes a guest that goes on at the address of the OUT that it left with
for one that has yet to be moved behind it (hosts.md C.3)."""
LOAD: Final = b"\x48\x8b\x07"
"""mov rax, [rdi]"""
STORE: Final = b"\x48\x89\x07"
"""mov [rdi], rax"""
TABLE: Final = int(Pte.P | Pte.RW | Pte.US | Pte.A)
LEAF: Final = TABLE | int(Pte.D)
_SECONDS: Final = 5.0


class ProbeError(Exception):
    """The guest did something else than the probe expected, so that it shows nothing."""


class ProbeGuest:
    """A fresh VM with the guest.  ``flags``: the slot's.  ``ring``: entries of a dirty ring, or 0.

    ``vm`` may be one that was prepared; else the system makes it.  A context manager.
    """

    def __init__(self, system: System, *, flags: SlotFlags = SlotFlags.NONE, ring: int = 0) -> None:
        self.memory = GuestMemory(PAGES * PAGE_SIZE, name="pykvm-probe")
        self.vm: Machine = system.create_machine()
        try:
            if ring:
                self.vm.enable_dirty_ring(ring)
            # Written once: the host has a page of its own everywhere (hosts.md A, untouched memory).
            self.memory.view()[::PAGE_SIZE] = 0
            self._build()
            self.slot: Slot = self.vm.create_slot(self.memory, 0, flags=flags)
            self.vcpu: Vcpu = self.vm.create_vcpu()
            self.vcpu.set_cpuid(self.vm.supported_cpuid)
            self._cpl: int | None = None
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        for table, entry in ((PML4, PDPT), (PDPT, PD), (PD, PT)):
            self.set_entry(table, 0, entry << 12 | TABLE)
        self.set_entry(PD, 1, WINDOW_PT << 12 | TABLE)
        for page in range(PAGES):
            written = page >= DATA or page in (PD, WINDOW_PT, STACK)
            self.set_entry(PT, page, page << 12 | (LEAF if written else TABLE))

    # --- its memory ----------------------------------------------------------------------------------

    def set_entry(self, table: int, index: int, value: int) -> None:
        """Write an entry of a guest table from outside, which KVM does not see: before it was ever used."""
        self.memory.write(table * PAGE_SIZE + 8 * index, struct.pack("<Q", value))

    def entry(self, table: int, index: int) -> int:
        """An entry of a guest table."""
        return int(struct.unpack("<Q", self.memory.read(table * PAGE_SIZE + 8 * index, 8))[0])

    def window(self, index: int, gfn: int, flags: int = LEAF) -> int:
        """Map ``gfn`` at page ``index`` of the window, from outside; the linear address."""
        self.set_entry(WINDOW_PT, index, gfn << 12 | flags)
        return WINDOW + index * PAGE_SIZE

    # --- running -------------------------------------------------------------------------------------

    def run(self, code: bytes, *, cpl: int = 3, **registers: int) -> Exit:
        """Run ``code`` until the first exit, whatever it is, at the privilege level; stopped after 5 s."""
        if cpl != self._cpl:
            self.vcpu.set_special_registers(self._special(cpl))
            self._cpl = cpl
        self.memory.write(CODE * PAGE_SIZE, _NOP + code)
        registers.setdefault("rflags", int(Rflags.FIXED) | (int(Rflags.IOPL3) if cpl else 0))
        self.vcpu.set_registers(Registers(rip=CODE * PAGE_SIZE, rsp=STACK * PAGE_SIZE + 0x800, **registers))
        return self.resume()

    def resume(self) -> Exit:
        """Go on until the next exit."""
        watchdog = threading.Timer(_SECONDS, self.vcpu.kick)
        watchdog.daemon = True
        watchdog.start()
        try:
            return self.vcpu.run()
        finally:
            watchdog.cancel()

    def do(self, code: bytes, *, cpl: int = 3, **registers: int) -> None:
        """Run ``code`` and then the exit that says it is done.  Raises ProbeError for anything else."""
        reason = self.run(code + DONE, cpl=cpl, **registers)
        if not isinstance(reason, IoOut) or reason.port != PORT:
            what = (
                f"did not end within {_SECONDS:g} s" if isinstance(reason, Kicked) else f"ended with {reason}"
            )
            raise ProbeError(f"the guest {what}")

    def load(self, address: int) -> None:
        """Read 8 bytes at CPL 3."""
        self.do(LOAD, rdi=address)

    def store(self, address: int, value: int = 0x55) -> None:
        """Write 8 bytes at CPL 3."""
        self.do(STORE, rdi=address, rax=value)

    def change(self, **values: int) -> None:
        """Set control registers by KVM_SET_SREGS."""
        special = self.vcpu.get_special_registers()
        for name, value in values.items():
            setattr(special, name, value)
        self.vcpu.set_special_registers(special)

    def resync(self) -> None:
        """Toggle CR4.PGE and run: KVM synchronises what is unsynchronised (hosts.md B.1)."""
        self.change(cr4=self.vcpu.get_special_registers().cr4 ^ Cr4.PGE)
        self.do(b"")

    def _special(self, cpl: int) -> SpecialRegisters:
        special = self.vcpu.get_special_registers()
        special.cs = Segment(0, 0xFFFFFFFF, 0x33 if cpl else 8, 0xB, 1, cpl, 0, 1, 1, 1)
        data = Segment(0, 0xFFFFFFFF, 0x2B if cpl else 0x10, 3, 1, cpl, 1, 1, 0, 1)
        special.ds = special.es = special.fs = special.gs = special.ss = data
        special.tr = Segment(TSS * PAGE_SIZE, 0x67, 0x40, 0xB, 1, 0, 0, 0, 0, 0)
        special.gdt = DescriptorTable(GDT * PAGE_SIZE, 0xFF)
        special.idt = DescriptorTable(0, 0)
        special.cr0 = int(Cr0.PG | Cr0.WP | Cr0.NE | Cr0.ET | Cr0.MP | Cr0.PE)
        special.cr3 = PML4 * PAGE_SIZE
        special.cr4 = int(Cr4.PAE | Cr4.OSFXSR | Cr4.OSXMMEXCPT)
        special.efer = int(Efer.LME | Efer.LMA | Efer.NXE)
        return special

    # --- what is seen --------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """The single-valued statistics of VM and vCPU, by name."""
        found: dict[str, int] = {}
        for statistics in (self.vm.statistics(), self.vcpu.statistics()):
            found |= {name: item.value for name, item in statistics.items() if len(item.values) == 1}
        return found

    def dirty(self) -> set[int]:
        """Collect the bitmap: the gfns that were reported, which are armed again."""
        return {int(gfn) for gfn in self.vm.get_dirty_log(self.slot)}

    def pushed(self) -> list[int]:
        """Collect the ring: the offsets in the order they were pushed, which are armed again."""
        return [int(offset) for batch in self.vm.collect_rings().entries for offset in batch.offsets]

    def close(self) -> None:
        """Close VM and memory."""
        self.vm.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Moved:
    """How far counters moved within a with statement: ``moved["pf_taken"]``."""

    def __init__(self, guest: ProbeGuest) -> None:
        self._guest = guest
        self._before: dict[str, int] = {}
        self._after: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._before = self._guest.counters()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._after = self._guest.counters()

    def __getitem__(self, name: str) -> int:
        return self._after.get(name, 0) - self._before.get(name, 0)
