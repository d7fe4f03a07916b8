"""Slots, logs and tracking of the model without page tables: what the tests of the foundation stand on.

``Tables`` and the vCPUs are stand-ins that only write down what they are asked, so that each test sees what
a slot operation, a log or a tracker asks of the rest, and nothing else.
"""

from __future__ import annotations

from typing import Any, cast

from pykvm.memory import PAGE_SIZE
from pykvm.model.mmu.dirty_ring import DIRTY, RESET, DirtyRing
from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES, Memslot
from pykvm.model.mmu.vm import Mmu
from pykvm.profiles import Profile, profile

HOST = 0x1000_0000_0000
"""A host address that is congruent to gfn 0 for pages of every size."""
BYTES = memoryview(bytearray(1 << 20))
"""Memory behind every slot of these tests: nobody reads or writes it."""


class FakeTables:
    """A holder of SPTEs that holds none: ``calls`` are what it was asked, ``flush`` is what it answers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.flush = True

    def take(self) -> list[tuple[Any, ...]]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def write_protect_gfn(self, slot: Memslot, gfn: int, min_level: int) -> bool:
        self.calls.append(("write_protect_gfn", slot.id, gfn, min_level))
        return self.flush

    def write_protect_masked(self, slot: Memslot, gfn: int, mask: int) -> None:
        self.calls.append(("write_protect_masked", slot.id, gfn, mask))

    def clear_dirty_masked(self, slot: Memslot, gfn: int, mask: int) -> None:
        self.calls.append(("clear_dirty_masked", slot.id, gfn, mask))

    def write_protect_slot(self, slot: Memslot, min_level: int) -> None:
        self.calls.append(("write_protect_slot", slot.id, min_level))

    def clear_dirty_slot(self, slot: Memslot) -> None:
        self.calls.append(("clear_dirty_slot", slot.id))

    def split_huge(self, slot: Memslot, first: int, last: int) -> None:
        self.calls.append(("split_huge", slot.id, first, last))

    def recover_huge(self, slot: Memslot) -> bool:
        self.calls.append(("recover_huge", slot.id))
        return self.flush

    def zap_all_fast(self) -> None:
        self.calls.append(("zap_all_fast",))

    def zap_range(self, slot: Memslot, first: int, last: int) -> bool:
        self.calls.append(("zap_range", slot.id, first, last))
        return self.flush


class FakeVcpu:
    """A vCPU that runs nothing: it has a ring, or none."""

    def __init__(self, vcpu_id: int, ring: DirtyRing | None) -> None:
        self.id = vcpu_id
        self.ring = ring
        self.tlb_flushes = self.pml_flushes = self.mmio_forgotten = 0

    def push_dirty(self, ring_id: int, offset: int) -> None:
        assert self.ring is not None
        self.ring.push(ring_id, offset)

    def request_tlb_flush(self) -> None:
        self.tlb_flushes += 1

    def flush_pml(self) -> None:
        self.pml_flushes += 1

    def forget_mmio(self) -> None:
        self.mmio_forgotten += 1


class Rig:
    """The MMU of a VM on a host of ``kind`` and ``era`` with ``vcpus``, on stand-ins."""

    def __init__(
        self,
        kind: str = "amd-shadow",
        era: str = "6.12",
        *,
        vcpus: int = 1,
        ring_bytes: int = 0,
        with_bitmap: bool = False,
        **changes: Any,
    ) -> None:
        self.profile: Profile = profile(kind, era, **changes)
        self.mmu = Mmu(self.profile)
        self.tables = FakeTables()
        self.mmu.tables = (self.tables,)
        if ring_bytes:
            self.mmu.enable_dirty_ring(ring_bytes)
        if with_bitmap:
            self.mmu.enable_ring_with_bitmap()
        self.vcpus = [self._vcpu(number) for number in range(vcpus)]
        self.mmu.vcpus = cast("Any", self.vcpus)
        self.load(0 if vcpus else None)

    def _vcpu(self, number: int) -> FakeVcpu:
        entries = self.mmu.ring_entries
        ring = DirtyRing(entries, self.profile.reserved_ring_entries) if entries else None
        return FakeVcpu(number, ring)

    def load(self, number: int | None) -> None:
        """Which vCPU this thread has loaded: marks go to its ring."""
        self.mmu.loaded = None if number is None else cast("Any", self.vcpus[number])

    def set(
        self,
        slot: int = 0,
        *,
        gfn: int = 0,
        pages: int = 4,
        flags: int = 0,
        host: int = HOST,
    ) -> Memslot | None:
        """``set_region`` in pages; ``host`` is the userspace address."""
        memory = BYTES[:PAGE_SIZE]
        return self.mmu.memslots.set_region(slot, flags, gfn * PAGE_SIZE, pages * PAGE_SIZE, host, memory)

    def slot(self, slot: int = 0, *, gfn: int = 0, pages: int = 256, flags: int = LOG_DIRTY_PAGES) -> Memslot:
        """A new slot, by default one that logs."""
        made = self.set(slot, gfn=gfn, pages=pages, flags=flags)
        assert made is not None
        self.tables.take()
        return made

    def mark(self, slot: Memslot, *gfns: int) -> None:
        """Mark pages in order."""
        for gfn in gfns:
            self.mmu.mark_page_dirty(slot, gfn)

    def log(self, slot: Memslot) -> list[int]:
        """KVM_GET_DIRTY_LOG as page numbers within the slot."""
        words = self.mmu.dirty_log.get(slot)
        return [64 * at + bit for at, word in enumerate(words) for bit in range(64) if int(word) >> bit & 1]

    @property
    def flushes(self) -> int:
        """remote_tlb_flush_requests."""
        return self.mmu.counters.remote_tlb_flush_requests

    def ring(self, vcpu: int = 0) -> DirtyRing:
        """A vCPU's ring."""
        ring = self.vcpus[vcpu].ring
        assert ring is not None
        return ring

    def pushed(self, vcpu: int = 0) -> list[tuple[int, int]]:
        """(slot, offset) of the entries that were pushed and not harvested, oldest first."""
        ring = self.ring(vcpu)
        found = (ring.entries[at & ring.size - 1] for at in range(ring.reset_index, ring.dirty_index))
        return [(entry.slot, entry.offset) for entry in found if entry.flags == DIRTY]

    def harvest(self, *positions: int, vcpu: int = 0, flags: int = RESET) -> None:
        """Mark entries as harvested: those at ``positions`` of the ring, by default all that were pushed."""
        ring = self.ring(vcpu)
        for at in positions or range(ring.reset_index, ring.dirty_index):
            ring.entries[at & ring.size - 1].flags = flags
