"""Page write-tracking: writes to a gfn are intercepted for ever, independent of logging (kvm-mmu.md 9).

A 16-bit count per gfn says how many want it: every upper-level shadow page of the gfn, and external users.
``track_write`` reaches its receivers for every emulated write to RAM, tracked or not: they filter.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, Protocol

from pykvm.errors import KvmError
from pykvm.model.mmu.memslots import Memslot
from pykvm.profiles import WriteTrackAllocation

if TYPE_CHECKING:
    from pykvm.model.mmu.vm import Mmu

MAX_COUNT: Final = 0xFFFF
_RULE: Final = "kvm-mmu.md 9"


class TrackNode(Protocol):
    """``struct kvm_page_track_notifier_node``."""

    def track_write(self, gpa: int, new: bytes) -> None:
        """An emulated write changed guest memory: the bytes at gpa are ``new`` now, within one page."""

    def track_remove_region(self, gfn: int, pages: int) -> None:
        """A slot goes away or moves, and with it the counts of its pages: forget them."""


class PageTrack:
    """The write-tracking of a VM."""

    def __init__(self, mmu: Mmu) -> None:
        self._mmu = mmu
        self._nodes: list[TrackNode] = []
        self.shadow_root_allocated = False
        self.external_write_tracking = False
        """One-way flags: once set, every slot has its counts."""
        self.ignored = 0
        """Changes that would have left 0 to 65535: KVM warns and ignores them."""

    @property
    def enabled(self) -> bool:
        """``kvm_page_track_write_tracking_enabled``: whether slots have counts."""
        profile = self._mmu.profile
        if not profile.tdp or self.shadow_root_allocated:
            return True
        if profile.write_track_allocation is WriteTrackAllocation.ALWAYS:
            return profile.external_write_tracking
        return self.external_write_tracking

    def create_memslot(self, slot: Memslot) -> None:
        """``kvm_page_track_create_memslot``: counts for a new or moved slot, all zero."""
        slot.gfn_write_track = {} if self.enabled else None

    def allocate_all(self) -> None:
        """Counts for all slots that have none yet: the first shadow root, or the first external user."""
        for slot in self._mmu.memslots.all():
            if slot.gfn_write_track is None:
                slot.gfn_write_track = {}

    # --- counts --------------------------------------------------------------------------------------

    def add(self, slot: Memslot, gfn: int) -> None:
        """``__kvm_write_track_add_gfn``: one more reason; every mapping of the gfn loses W and
        MMU_WRITABLE, and translations are flushed before this returns."""
        self._update(slot, gfn, 1)
        slot.change_lpage(gfn, 1)
        if self._mmu.write_protect_gfn(slot, gfn):
            self._mmu.flush_remote_tlbs()

    def remove(self, slot: Memslot, gfn: int) -> None:
        """``__kvm_write_track_remove_gfn``: mappings become writable at their next fault."""
        self._update(slot, gfn, -1)
        slot.change_lpage(gfn, -1)

    def _update(self, slot: Memslot, gfn: int, by: int) -> None:
        """``update_gfn_write_track``: what would leave the 16 bits is ignored here, not by the callers."""
        counts = slot.gfn_write_track
        count = self.count(slot, gfn) + by
        if counts is None or not 0 <= count <= MAX_COUNT:
            self.ignored += 1
        elif count:
            counts[gfn] = count
        else:
            del counts[gfn]

    def count(self, slot: Memslot, gfn: int) -> int:
        """How many want writes to the gfn intercepted."""
        return slot.gfn_write_track.get(gfn, 0) if slot.gfn_write_track else 0

    def is_tracked(self, slot: Memslot | None, gfn: int) -> bool:
        """``kvm_gfn_is_write_tracked`` of the gfn in its slot's address space."""
        if slot is None or not slot.gfn_write_track:
            return self._elsewhere(slot, gfn)
        return gfn in slot.gfn_write_track or self._elsewhere(slot, gfn)

    def _elsewhere(self, slot: Memslot | None, gfn: int) -> bool:
        """The other address space's word, where the profile asks for it."""
        mmu = self._mmu
        if slot is None or not mmu.profile.track_query_both_spaces or mmu.profile.address_spaces == 1:
            return False
        other = mmu.memslots.lookup(gfn, 1 - slot.as_id)
        return other is not None and bool(other.gfn_write_track) and self.count(other, gfn) > 0

    # --- external users ------------------------------------------------------------------------------

    def add_gfn(self, gfn: int) -> None:
        """``kvm_write_track_add_gfn``: an external user tracks a gfn.  KvmError (EINVAL) without a slot."""
        self.add(self._slot(gfn, "kvm_write_track_add_gfn"), gfn)

    def remove_gfn(self, gfn: int) -> None:
        """``kvm_write_track_remove_gfn``, the counterpart; KvmError (EINVAL) without a slot."""
        self.remove(self._slot(gfn, "kvm_write_track_remove_gfn"), gfn)

    def _slot(self, gfn: int, operation: str) -> Memslot:
        slot = self._mmu.memslots.lookup(gfn)
        if slot is None:
            raise KvmError(errno.EINVAL, operation, f"gfn {gfn:#x} has no memslot.")
        return slot

    def register(self, node: TrackNode) -> None:
        """``kvm_page_track_register_notifier``: the latest is called first."""
        if not self.enabled:
            self.external_write_tracking = True
            self.allocate_all()
        self.external_write_tracking = True
        self._nodes.insert(0, node)
        self._mmu.memslots.external_user = True

    def unregister(self, node: TrackNode) -> None:
        """``kvm_page_track_unregister_notifier``: counts that the user added stay until it removes them."""
        self._nodes.remove(node)
        self._mmu.memslots.external_user = bool(self._nodes)

    def notify_write(self, gpa: int, new: bytes) -> None:
        """Tell the external users of an emulated write, before KVM's own MMU looks at it."""
        for node in tuple(self._nodes):
            node.track_write(gpa, new)

    def notify_remove(self, slot: Memslot) -> None:
        """Tell them that a slot's counts are gone."""
        for node in tuple(self._nodes):
            node.track_remove_region(slot.base_gfn, slot.npages)
