"""The dirty ring of one vCPU (``virt/kvm/dirty_ring.c``, kvm-mmu.md 4).

Entries are shared with userspace: KVM writes slot, offset and then the flag; userspace marks an entry
harvested; a reset gives it back.  Nothing keeps KVM from overwriting an entry that nobody harvested but the
check for a full ring before guest code runs, which is made too late when a single exit pushes many entries
(hosts.md D.7).
"""

from __future__ import annotations

from typing import Final

DIRTY: Final = 1
"""KVM_DIRTY_GFN_F_DIRTY."""
RESET: Final = 2
"""KVM_DIRTY_GFN_F_RESET: userspace has harvested the entry."""
MIN_BYTES: Final = 4096
MAX_ENTRIES: Final = 65536
ENTRY_BYTES: Final = 16


class RingEntry:
    """``struct kvm_dirty_gfn``."""

    __slots__ = ("flags", "offset", "slot")

    def __init__(self) -> None:
        self.flags = 0
        self.slot = 0
        self.offset = 0


class DirtyRing:
    """``struct kvm_dirty_ring``: ``size`` entries (a power of two), full at ``soft_limit``."""

    __slots__ = ("dirty_index", "entries", "overwritten", "reset_index", "size", "soft_limit")

    def __init__(self, size: int, reserved: int) -> None:
        self.size = size
        self.soft_limit = size - reserved
        self.entries = [RingEntry() for _ in range(size)]
        self.dirty_index = 0
        self.reset_index = 0
        self.overwritten = 0
        """Entries that were pushed over unharvested ones: their pages are lost."""

    @property
    def used(self) -> int:
        """Entries pushed and not reset."""
        return self.dirty_index - self.reset_index

    @property
    def soft_full(self) -> bool:
        """At the soft limit or above: the vCPU must leave for userspace."""
        return self.dirty_index - self.reset_index >= self.soft_limit

    def push(self, slot: int, offset: int) -> None:
        """Note a page; there is no deduplication.  ``slot`` is (as_id << 16) | id."""
        index = self.dirty_index
        entry = self.entries[index & self.size - 1]
        if index - self.reset_index >= self.size:
            self.overwritten += 1  # KVM warns once per boot and goes on
        entry.slot = slot
        entry.offset = offset
        entry.flags = DIRTY
        self.dirty_index = index + 1
