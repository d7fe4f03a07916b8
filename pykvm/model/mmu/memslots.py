"""Memslots as KVM's MMU sees them: lookup, generations, and the metadata of each page (kvm-mmu.md 2).

``Memslots.set_region`` is ``__kvm_set_memory_region``: one call that creates, moves, reflags or deletes, with
KVM's order of checks.  What a change does to mappings and logs is ``SlotObserver``'s, which the MMU is.

Nothing here follows the size of a slot: rmaps, write-track counts and large-page counts are kept for the
pages that have any.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from enum import Enum
from typing import Final, Protocol

from pykvm.errors import (
    KvmError,
    SlotAbsentError,
    SlotAlignmentError,
    SlotChangeError,
    SlotError,
    SlotOverlapError,
)
from pykvm.model.mmu.dirty_bitmap import DirtyBitmap
from pykvm.model.mmu.rmap import Rmap
from pykvm.profiles import Profile

LOG_DIRTY_PAGES: Final = 1
READONLY: Final = 2
INVALID: Final = 1 << 16
"""KVM_MEMSLOT_INVALID: published while the slot is moved or deleted; faults on it are retried."""
USER_SLOTS: Final = 32764
MAX_PAGES: Final = (1 << 31) - 1
PAGE: Final = 4096
_GENERATION_UPDATE: Final = 1 << 63
_OPERATION: Final = "KVM_SET_USER_MEMORY_REGION"


class Change(Enum):
    """``enum kvm_mr_change``."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags"


class Memslot:
    """``struct kvm_memory_slot`` with its architecture's part.

    ``data`` is the memory behind it, ``words`` the same as 64-bit words: an entry of a guest page table is
    ``words[(gfn - base_gfn) * 512 + index]``.  ``userspace_addr`` (a host address, or 0) decides about huge
    pages together with the gfn.
    """

    __slots__ = (
        "as_id",
        "base_gfn",
        "data",
        "dirty_bitmap",
        "disallow_lpage",
        "flags",
        "gfn_write_track",
        "host",
        "id",
        "npages",
        "rmap",
        "userspace_addr",
        "words",
    )

    def __init__(
        self,
        as_id: int,
        slot_id: int,
        base_gfn: int,
        npages: int,
        flags: int,
        userspace_addr: int,
        data: memoryview,
        host: HostPages,
    ) -> None:
        self.as_id = as_id
        self.id = slot_id
        self.base_gfn = base_gfn
        self.npages = npages
        self.flags = flags
        self.userspace_addr = userspace_addr
        self.data = data
        self.words = data.cast("Q")
        self.host = host
        self.dirty_bitmap: DirtyBitmap | None = None
        self.rmap: Rmap | None = None
        """Leaf SPTEs by level and gfn; None while not allocated."""
        self.gfn_write_track: dict[int, int] | None = None
        """Write-track counts above 0; None while not allocated."""
        self.disallow_lpage: dict[tuple[int, int], int] = {}
        """By level (2, 3) and gfn >> shift: how many reasons forbid a large page, beside the slot's shape."""

    @property
    def logs(self) -> bool:
        """Whether LOG_DIRTY_PAGES is set."""
        return bool(self.flags & LOG_DIRTY_PAGES)

    @property
    def ring_id(self) -> int:
        """What ring entries name the slot by: (as_id << 16) | id."""
        return self.as_id << 16 | self.id

    def contains(self, gfn: int) -> bool:
        """Whether the gfn lies in the slot."""
        return self.base_gfn <= gfn < self.base_gfn + self.npages

    def lpage_disallowed(self, gfn: int, level: int) -> bool:
        """Whether a leaf of ``level`` (2 or 3) over gfn is forbidden (``lpage_info``, section 2)."""
        shift = 9 * (level - 1)
        first = gfn >> shift << shift
        if first < self.base_gfn or first + (1 << shift) > self.base_gfn + self.npages:
            return True
        if (self.base_gfn ^ self.userspace_addr // PAGE) & (1 << shift) - 1:
            return True
        return self.disallow_lpage.get((level, gfn >> shift), 0) != 0

    def change_lpage(self, gfn: int, by: int) -> None:
        """``kvm_mmu_gfn_disallow_lpage`` (+1) and ``_allow_lpage`` (-1), for 2 MiB and 1 GiB."""
        for level in (2, 3):
            key = level, gfn >> 9 * (level - 1)
            count = self.disallow_lpage.get(key, 0) + by
            if count:
                self.disallow_lpage[key] = count
            else:
                self.disallow_lpage.pop(key, None)

    def metadata_bytes(self, *, rmap: bool, write_track: bool, ring: bool) -> dict[str, int]:
        """What KVM allocates for the slot, in bytes by array (section 2, last paragraph but one)."""
        two, one = (
            (self.base_gfn + self.npages - 1 >> shift) - (self.base_gfn >> shift) + 1 for shift in (9, 18)
        )
        bitmap = 2 * 8 * -(-self.npages // 64) if self.logs and not ring else 0
        return {
            "rmap": 8 * (self.npages + two + one) if rmap else 0,
            "lpage_info": 4 * (two + one),
            "gfn_write_track": 2 * self.npages if write_track else 0,
            "dirty_bitmap": bitmap,
        }


class HostPages(Protocol):
    """What the host's page tables say about the memory behind a slot (page numbers count within the slot)."""

    def writable(self, page: int, *, write_fault: bool) -> bool | None:
        """Whether KVM's look-up of the host page ends with a writable one; None where there is none to be
        had (PROT_NONE, unmapped).  A write fault first makes it writable where it can be (COW)."""

    def level(self, page: int) -> int:
        """The largest level (1, 2, 3) at which the host maps the page."""


class PinnedPages:
    """Memory that the host has touched, writes to, and maps with 4 KiB pages: what tests arrange."""

    def __init__(self, level: int = 1) -> None:
        self._level = level

    def writable(self, page: int, *, write_fault: bool) -> bool | None:
        return True

    def level(self, page: int) -> int:
        return self._level


class SlotObserver(Protocol):
    """Who is told of changes: the VM's MMU."""

    def generation_changed(self, generation: int) -> None:
        """An update was published: ``kvm_arch_memslots_updated``."""

    def slot_invalidated(self, slot: Memslot, change: Change) -> None:
        """A slot that goes away or moves was published as INVALID: ``kvm_arch_flush_shadow_memslot``."""

    def slot_prepared(self, slot: Memslot, change: Change) -> None:
        """Before a created or moved slot is published: allocate its metadata."""

    def slot_committed(self, slot: Memslot, change: Change, old_flags: int) -> None:
        """After publishing: logging began or ended, the number of pages changed."""


class Memslots:
    """The memslots of a VM: one list per address space, and what publishes changes of them."""

    def __init__(self, profile: Profile, observer: SlotObserver) -> None:
        self._profile = profile
        self._observer = observer
        self._spaces: list[dict[int, Memslot]] = [{} for _ in range(profile.address_spaces)]
        self._found: list[dict[int, Memslot]] = [{} for _ in range(profile.address_spaces)]
        self._bases: list[list[int]] = [[] for _ in range(profile.address_spaces)]
        self._sorted: list[list[Memslot]] = [[] for _ in range(profile.address_spaces)]
        self.generations = list(range(profile.address_spaces))
        """By address space; bit 63 while an update is being published."""
        self.external_user = False
        """An external user of write tracking is registered: slots may not move (>=6.12)."""

    # --- lookup --------------------------------------------------------------------------------------

    def lookup(self, gfn: int, as_id: int = 0) -> Memslot | None:
        """The slot of a gfn, INVALID ones included, as ``gfn_to_memslot``."""
        cache = self._found[as_id]
        slot = cache.get(gfn)
        if slot is not None:
            return slot
        at = bisect_right(self._bases[as_id], gfn) - 1
        if at < 0:
            return None
        slot = self._sorted[as_id][at]
        if gfn >= slot.base_gfn + slot.npages:
            return None
        if len(cache) > 1 << 16:
            cache.clear()
        cache[gfn] = slot
        return slot

    def visible(self, gfn: int, as_id: int = 0) -> Memslot | None:
        """``kvm_is_visible_memslot``: the slot of a gfn unless it is INVALID."""
        slot = self.lookup(gfn, as_id)
        return None if slot is None or slot.flags & INVALID else slot

    def slot(self, slot_id: int, as_id: int = 0) -> Memslot | None:
        """The slot with that id."""
        return self._spaces[as_id].get(slot_id)

    def all(self) -> list[Memslot]:
        """Every slot, by address space and id."""
        return [space[number] for space in self._spaces for number in sorted(space)]

    @property
    def npages(self) -> int:
        """``nr_memslot_pages``: what the default limit of shadow pages follows."""
        return sum(slot.npages for space in self._spaces for slot in space.values())

    # --- changes -------------------------------------------------------------------------------------

    def set_region(
        self,
        slot: int,
        flags: int,
        gpa: int,
        size: int,
        userspace_addr: int,
        data: memoryview | None = None,
        host: HostPages | None = None,
    ) -> Memslot | None:
        """``__kvm_set_memory_region``: ``slot`` is (as_id << 16) | id, gpa and size in bytes; size 0 deletes.

        Returns the slot, None after a deletion.  ``data`` is the memory of a created slot.  Raises KvmError
        with EINVAL or EEXIST in KVM's order of checks (section 2, decision table).
        """
        as_id, number = slot >> 16, slot & 0xFFFF
        self._check_form(as_id, number, flags, gpa, size, userspace_addr)
        space = self._spaces[as_id]
        old = space.get(number)
        base_gfn, npages = gpa // PAGE, size // PAGE
        if size == 0:
            if old is None:
                raise _refusal(SlotAbsentError, "there is no slot of that id to delete.")
            self._delete(space, old)
            return None
        if old is None:
            self._check_overlap(as_id, base_gfn, npages, None)
            self._check_end(base_gfn, npages)
            assert data is not None, "a new slot needs memory"
            new = Memslot(as_id, number, base_gfn, npages, flags, userspace_addr, data, host or PinnedPages())
            self._observer.slot_prepared(new, Change.CREATE)
            space[number] = new
            self._publish(as_id)
            self._observer.slot_committed(new, Change.CREATE, 0)
            return new
        if userspace_addr != old.userspace_addr or npages != old.npages or (flags ^ old.flags) & READONLY:
            raise _refusal(
                SlotChangeError, "memory, size and READONLY of a live slot cannot change; delete it first."
            )
        if base_gfn != old.base_gfn:
            self._check_overlap(as_id, base_gfn, npages, old)
            self._move(old, base_gfn, flags)
        elif flags != old.flags:
            before, old.flags = old.flags, flags
            self._observer.slot_prepared(old, Change.FLAGS_ONLY)
            self._publish(as_id)
            self._observer.slot_committed(old, Change.FLAGS_ONLY, before)
        return old

    def _delete(self, space: dict[int, Memslot], old: Memslot) -> None:
        flags = old.flags
        self._invalidate(old, Change.DELETE)
        del space[old.id]
        self._publish(old.as_id)
        self._observer.slot_committed(old, Change.DELETE, flags)

    def _move(self, old: Memslot, base_gfn: int, flags: int) -> None:
        before = old.flags
        self._invalidate(old, Change.MOVE)
        try:
            if self.external_user and self._profile.refuses_move_when_tracked:
                raise _refusal(SlotChangeError, "a slot cannot move while a write tracker is registered.")
            self._check_end(base_gfn, old.npages)
        except SlotError:
            # Refused by kvm_arch_prepare_memory_region, that is after everything was zapped: the old slot
            # is published again, and nothing else is undone.
            old.flags = before
            self._publish(old.as_id)
            raise
        old.base_gfn = base_gfn
        old.flags = flags
        # The bitmap stays, bit for bit; everything else about the pages is made anew.
        old.disallow_lpage = {}
        self._observer.slot_prepared(old, Change.MOVE)
        self._publish(old.as_id)
        self._observer.slot_committed(old, Change.MOVE, before)

    def _invalidate(self, slot: Memslot, change: Change) -> None:
        slot.flags |= INVALID
        self._publish(slot.as_id)
        self._observer.slot_invalidated(slot, change)

    def _publish(self, as_id: int) -> None:
        """Make the lists seen: the generation moves on by the number of address spaces."""
        spaces = self._profile.address_spaces
        self.generations[as_id] |= _GENERATION_UPDATE
        ordered = sorted(self._spaces[as_id].values(), key=lambda slot: slot.base_gfn)
        self._sorted[as_id] = ordered
        self._bases[as_id] = [slot.base_gfn for slot in ordered]
        self._found[as_id].clear()
        self.generations[as_id] = (self.generations[as_id] & ~_GENERATION_UPDATE) + spaces
        self._observer.generation_changed(self.generations[as_id])

    # --- refusals ------------------------------------------------------------------------------------

    def _check_form(
        self, as_id: int, number: int, flags: int, gpa: int, size: int, userspace_addr: int
    ) -> None:
        if flags & ~(LOG_DIRTY_PAGES | READONLY):
            raise _refusal(SlotError, f"flags {flags:#x} contain one that KVM does not know.")
        if (gpa | size | userspace_addr) % PAGE:
            raise _refusal(
                SlotAlignmentError, "guest address, size and host address must be multiples of 4096."
            )
        if gpa + size >= 1 << 64 or userspace_addr + size > 1 << 47:
            raise _refusal(SlotError, "the range wraps around or is not userspace's.")
        if as_id >= self._profile.address_spaces or number >= USER_SLOTS:
            raise _refusal(
                SlotError,
                f"there are {self._profile.address_spaces} address spaces with {USER_SLOTS} slots each.",
            )
        if size // PAGE > MAX_PAGES:
            raise _refusal(SlotError, "a slot has at most 2^31-1 pages.")

    def _check_end(self, base_gfn: int, npages: int) -> None:
        """The last gfn must be one that the MMU can map (``kvm_mmu_max_gfn``): 52 bits with shadow paging."""
        bits = self._profile.physical_bits if self._profile.tdp and self._profile.tdp_mmu else 52
        if base_gfn + npages - 1 > (1 << bits - 12) - 1:
            raise _refusal(SlotError, f"the slot ends beyond the host's {bits} address bits.")

    def _check_overlap(self, as_id: int, base_gfn: int, npages: int, but: Memslot | None) -> None:
        for other in self._spaces[as_id].values():
            if (
                other is not but
                and base_gfn < other.base_gfn + other.npages
                and other.base_gfn < base_gfn + npages
            ):
                raise _refusal(SlotOverlapError, f"the range overlaps slot {other.id}; move one.")


def _refusal(kind: type[KvmError], why: str) -> KvmError:
    return kind(errno.EEXIST if kind is SlotOverlapError else errno.EINVAL, _OPERATION, why)
