"""The dirty ring of one vCPU (``virt/kvm/dirty_ring.c``, kvm-mmu.md 4).

Entries are shared with userspace: KVM writes slot, offset and then the flag; userspace marks an entry
harvested; a reset gives it back.  Nothing keeps KVM from overwriting an entry that nobody harvested but the
check for a full ring before guest code runs, which is made too late when a single exit pushes many entries
(hosts.md D.7).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, overload

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


class Entries(Sequence[RingEntry]):
    """The memory of a ring: entries that nobody looked at yet are not made, since rings may be large."""

    __slots__ = ("_made",)

    def __init__(self, size: int) -> None:
        self._made: list[RingEntry | None] = [None] * size

    @overload
    def __getitem__(self, index: int) -> RingEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[RingEntry]: ...

    def __getitem__(self, index: int | slice) -> RingEntry | list[RingEntry]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self._made)))]
        entry = self._made[index]
        if entry is None:
            entry = self._made[index] = RingEntry()
        return entry

    def __len__(self) -> int:
        return len(self._made)

    def made(self) -> Iterator[RingEntry]:
        """Those that were ever looked at; the others are zero."""
        return (entry for entry in self._made if entry is not None)


class DirtyRing:
    """``struct kvm_dirty_ring``: ``size`` entries (a power of two), full at ``soft_limit``."""

    __slots__ = ("dirty_index", "entries", "overwritten", "reset_index", "size", "soft_limit")

    def __init__(self, size: int, reserved: int) -> None:
        self.size = size
        self.soft_limit = size - reserved
        self.entries = Entries(size)
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
