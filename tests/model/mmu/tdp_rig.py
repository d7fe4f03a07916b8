"""A guest on nested page tables, asked one access at a time, without instructions around it.

Frames are those of docs/reference/hosts.md (hexadecimal): 1 code, 2 PML4, 100 PDPT, 101 PD, 102 on page
tables; 112 maps 2000 to 21ff.  Every access is made by user code in long mode.
"""

from __future__ import annotations

from typing import Any, Final

from pykvm.model.mmu.journal import Journal
from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES, HostPages, Memslot, PinnedPages
from pykvm.model.mmu.vcpu import ControlChange, VcpuMmu
from pykvm.model.mmu.vm import Mmu
from pykvm.model.paging import Access, Control
from pykvm.profiles import profile

CODE, PML4, PDPT, PD, PT, DATA_PT, DATA = 1, 2, 0x100, 0x101, 0x102, 0x112, 0x2000
PAGES: Final = 0x4000
USERSPACE: Final = 0x7F00_0000_0000
FRESH, PRESET = 0x07, 0x67
"""Flags of guest entries: P, R/W, U/S; with A and D."""
WRITE, READ, FETCH = (int(kind | Access.USER) for kind in (Access.WRITE, Access.READ, Access.FETCH))
LONG_MODE: Final = Control(0x80010033, PML4 << 12, 0x620, 0xD00)
UNPAGED: Final = Control(0x11, 0, 0, 0)


class TdpRig:
    """One VM of the profile "kind era" with one slot at gfn 0, and one vCPU with a ring of 4096 entries.

    ``host_level``: how large the host maps everything.  ``flags``: the slot's.  ``leaf``: flags of the
    guest's entries at all levels.  ``ring`` False: bitmap.
    """

    def __init__(
        self,
        name: str,
        *,
        flags: int = LOG_DIRTY_PAGES,
        leaf: int = FRESH,
        host_level: int = 1,
        host: HostPages | None = None,
        ring: bool = True,
        pages: int = PAGES,
        control: Control = LONG_MODE,
        **changes: Any,
    ) -> None:
        kind, era = name.split()
        self.mmu = Mmu(profile(kind, era, **changes))
        if ring:
            self.mmu.enable_dirty_ring(65536)
        self.memory = bytearray(pages * 4096)
        slot = self.mmu.memslots.set_region(
            0, flags, 0, pages * 4096, USERSPACE, memoryview(self.memory), host or PinnedPages(host_level)
        )
        assert slot is not None
        self.slot: Memslot = slot
        self.put(PML4, 0, PDPT << 12 | leaf)
        self.put(PDPT, 0, PD << 12 | leaf)
        for index in range(32):
            self.put(PD, index, PT + index << 12 | leaf)
        for gfn in range(0x4000):
            self.put(PT, gfn, gfn << 12 | leaf)
        self.vcpu: VcpuMmu = self.mmu.create_vcpu()
        self.mmu.loaded = self.vcpu
        self.vcpu.set_control(control, ControlChange.HOST)
        self.vcpu.enter()
        self._pushed = 0

    def put(self, gfn: int, index: int, value: int) -> None:
        """Store a table entry; index may run on into the following tables."""
        self.slot.words[gfn * 512 + index] = value

    def entry(self, gfn: int, index: int) -> int:
        """A table entry."""
        return self.slot.words[gfn * 512 + index]

    # --- what the guest does -------------------------------------------------------------------------

    def access(self, gfn: int, kind: int = WRITE, *, fetch: bool = True) -> dict[str, int]:
        """One instruction from the code page with one access to the first byte of a page (mapped one to
        one), in a KVM_RUN of its own: the statistics that moved."""
        before = self.counters()
        assert self.vcpu.enter()
        if fetch:
            self.vcpu.translate(CODE << 12, FETCH)
        assert self.vcpu.translate(gfn << 12, kind) == gfn << 12
        self.vcpu.flush_pml()  # the exit that ends the run
        return moved(before, self.counters())

    def store(self, gfn: int) -> dict[str, int]:
        """``access`` for a write."""
        return self.access(gfn)

    def load(self, gfn: int) -> dict[str, int]:
        """``access`` for a read."""
        return self.access(gfn, READ)

    # --- what the host does --------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """All statistics but tlb_flush."""
        found = self.mmu.counters.as_dict() | self.vcpu.counters.as_dict()
        del found["tlb_flush"]
        return found

    def pushed(self) -> list[int]:
        """Ring entries since the last call."""
        ring = self.vcpu.ring
        assert ring is not None
        entries = [ring.entries[i & ring.size - 1].offset for i in range(self._pushed, ring.dirty_index)]
        self._pushed = ring.dirty_index
        return entries

    def harvest(self) -> int:
        """Mark every pushed entry harvested, and reset."""
        ring = self.vcpu.ring
        assert ring is not None
        for index in range(ring.reset_index, ring.dirty_index):
            ring.entries[index & ring.size - 1].flags = 3
        self._pushed = ring.dirty_index
        return self.mmu.dirty_log.reset_rings()

    def set_flags(self, flags: int) -> dict[str, int]:
        """Change the slot's flags: the statistics that moved."""
        before = self.counters()
        self.mmu.memslots.set_region(0, flags, 0, self.slot.npages * 4096, USERSPACE)
        return moved(before, self.counters())

    def spte(self, gfn: int) -> tuple[int, int]:
        """The second-stage SPTE that maps a gfn, and its level; (0, 0) where there is none."""
        assert self.mmu.tdp is not None
        return self.mmu.tdp.root().leaf(gfn)

    def listen(self) -> Journal:
        """Have the MMU note what it does."""
        self.mmu.journal = Journal()
        return self.mmu.journal


def moved(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """The statistics that differ, and by how much."""
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def faults(count: int, **more: int) -> dict[str, int]:
    """What ``count`` faults that KVM fixed move."""
    return {"pf_taken": count, "pf_fixed": count, **more}
