"""Userspace's side of a vCPU's dirty ring (kvm-mmu.md 4), with the model's ring in place of shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pykvm.machine.protocols import RingEntries
from pykvm.model.mmu.dirty_ring import DIRTY, RESET, DirtyRing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.model.mmu.dirty_ring import RingEntry


def _as_arrays(vcpu: int, entries: Sequence[RingEntry]) -> RingEntries:
    return RingEntries(
        vcpu,
        np.array([entry.slot for entry in entries], dtype=np.uint32),
        np.array([entry.offset for entry in entries], dtype=np.uint64),
    )


class RingReader:
    """The position of the next entry to take; the ring is KVM's."""

    def __init__(self, ring: DirtyRing, vcpu: int) -> None:
        self.ring = ring
        self.vcpu = vcpu
        self.head = 0
        self.overflowed = False

    def _waiting(self, begin: int) -> list[RingEntry]:
        """Entries in order from ``begin`` on that are dirty and not harvested."""
        ring = self.ring
        found = []
        for index in range(begin, self.head + ring.size):
            entry = ring.entries[index & ring.size - 1]
            if entry.flags & (DIRTY | RESET) != DIRTY:
                break
            found.append(entry)
        return found

    def harvest(self) -> RingEntries | None:
        """Take everything and mark it harvested; None for nothing.  Sets ``overflowed`` where entries were
        overwritten, as far as userspace can see it."""
        entries = self._waiting(self.head)
        if not entries:
            self.overflowed |= any(entry.flags & DIRTY for entry in self.ring.entries.made())
            return None
        taken = _as_arrays(self.vcpu, entries)
        for entry in entries:
            entry.flags = RESET
        self.head += len(entries)
        self.overflowed |= len(entries) == self.ring.size
        return taken

    def peek(self, since: int) -> tuple[RingEntries | None, int]:
        """The entries from the ``since``-th that KVM ever pushed on, without taking them; and how many it
        pushed altogether."""
        begin = max(since, self.head)
        entries = self._waiting(begin)
        return (_as_arrays(self.vcpu, entries) if entries else None), begin + len(entries)

    def give_up(self) -> None:
        """After an overflow: nothing in the ring counts any more, and both sides are in step again, so that
        the guest can go on.  That pages were lost stays true for ever."""
        ring = self.ring
        for entry in ring.entries.made():
            entry.flags = 0
        ring.reset_index = self.head = ring.dirty_index
