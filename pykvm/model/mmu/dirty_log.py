"""Collecting dirty pages and arming them again: GET, CLEAR, RESET, logging on and off (kvm-mmu.md 3, 4)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pykvm.errors import ClearRangeError, DirtyRingModeError, KvmError, LoggingDisabledError
from pykvm.model.mmu.dirty_bitmap import WORD, DirtyBitmap, Words
from pykvm.model.mmu.dirty_ring import RESET, DirtyRing
from pykvm.model.mmu.memslots import READONLY, Memslot

if TYPE_CHECKING:
    from pykvm.model.mmu.vm import Mmu

_GET: Final = "KVM_GET_DIRTY_LOG"
_CLEAR: Final = "KVM_CLEAR_DIRTY_LOG"
_RESET: Final = "KVM_RESET_DIRTY_RINGS"
_SIGN, _U64 = 1 << 63, (1 << 64) - 1


class DirtyLog:
    """The dirty logging of a VM."""

    def __init__(self, mmu: Mmu) -> None:
        self._mmu = mmu
        self.manual = False
        """KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: GET only reads."""
        self.initially_set = False
        """KVM_DIRTY_LOG_INITIALLY_SET: new bitmaps start as ones, and nothing is protected at first."""
        self.lost = 0
        """Marks that reached no log: made without a vCPU where the profile drops them, or in ring mode."""

    # --- marks ---------------------------------------------------------------------------------------

    @property
    def uses_bitmap(self) -> bool:
        """``kvm_use_dirty_bitmap``: no ring, or a ring with a bitmap beside it (4.8)."""
        return not self._mmu.ring_entries or self._mmu.ring_with_bitmap

    def allocate(self, slot: Memslot) -> None:
        """The bitmap of a slot that begins to log."""
        if self.uses_bitmap:
            slot.dirty_bitmap = DirtyBitmap(slot.npages, initially_set=self.manual and self.initially_set)

    # --- GET and CLEAR -------------------------------------------------------------------------------

    def _bitmap(self, slot: Memslot | None, operation: str) -> tuple[Memslot, DirtyBitmap]:
        if slot is None or slot.dirty_bitmap is None:
            raise LoggingDisabledError(
                errno.ENOENT, operation, "the slot is gone or does not log; set LOG_DIRTY_PAGES first."
            )
        return slot, slot.dirty_bitmap

    def _require_bitmaps(self, operation: str) -> None:
        if not self.uses_bitmap:
            raise DirtyRingModeError(
                errno.ENXIO, operation, "this VM uses dirty rings, which replace the bitmap."
            )

    def get(self, slot: Memslot | None) -> Words:
        """KVM_GET_DIRTY_LOG: the words; unless manual, they are zero afterwards and their pages armed.

        Raises DirtyRingModeError (ENXIO) before anything else, LoggingDisabledError (ENOENT).
        """
        self._require_bitmaps(_GET)
        slot, bitmap = self._bitmap(slot, _GET)
        self._mmu.flush_pml()
        words = bitmap.words()
        if self.manual:
            return words
        flush = False
        for index in list(bitmap.nonzero()):
            self._rearm(slot, WORD * index, bitmap.exchange(index))
            flush = True
        if flush:
            self._note(f"KVM_GET_DIRTY_LOG of slot {slot.id} re-armed its pages", "kvm-mmu.md 3.2")
            self._mmu.flush_remote_tlbs()
        return words

    def clear(self, slot: Memslot | None, first_page: int, num_pages: int, words: Words) -> None:
        """KVM_CLEAR_DIRTY_LOG: bit 0 of ``words`` is ``first_page``; arms what was set and is cleared.

        Raises DirtyRingModeError, ClearRangeError and LoggingDisabledError in KVM's order.
        """
        self._require_bitmaps(_CLEAR)
        if first_page & 63:
            raise _range_error()
        slot, bitmap = self._bitmap(slot, _CLEAR)
        left = slot.npages - first_page
        if left < 0 or num_pages > left or (num_pages & 63 and num_pages != left):
            raise _range_error()
        self._mmu.flush_pml()
        flush = False
        for at in range(-(-num_pages // WORD)):
            cleared = bitmap.clear(first_page // WORD + at, int(words[at]))
            if cleared:
                self._rearm(slot, first_page + WORD * at, cleared)
                flush = True
        if flush:
            self._note(f"KVM_CLEAR_DIRTY_LOG of slot {slot.id} armed what it cleared", "kvm-mmu.md 3.2")
            self._mmu.flush_remote_tlbs()

    def _rearm(self, slot: Memslot, offset: int, mask: int) -> None:
        """``kvm_arch_mmu_enable_log_dirty_pt_masked``: from now on writes to these pages are seen again."""
        mmu = self._mmu
        gfn = slot.base_gfn + offset
        if self.manual and self.initially_set:
            first = gfn + (mask & -mask).bit_length() - 1
            last = gfn + mask.bit_length() - 1
            if mmu.profile.eager_page_split:
                end = last - 1 if mmu.profile.masked_split_misses_last else last
                for tables in mmu.tables:
                    tables.split_huge(slot, first, end)
            for tables in mmu.tables:
                tables.write_protect_gfn(slot, first, 2)
                # KVM compares the addresses rounded up, so that it passes over a huge page of which the range
                # has but the first gfn: writes to that page are lost (found on a real host, 3.2).
                if first + 511 >> 9 != last + 511 >> 9:
                    tables.write_protect_gfn(slot, last, 2)
        for tables in mmu.tables:
            if mmu.profile.pml:
                tables.clear_dirty_masked(slot, gfn, mask)
            else:
                tables.write_protect_masked(slot, gfn, mask)

    # --- rings ---------------------------------------------------------------------------------------

    def reset_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: give back and arm what userspace marked as harvested: how many entries.

        Raises KvmError (EINVAL) without rings.
        """
        mmu = self._mmu
        if not mmu.ring_entries:
            raise DirtyRingModeError(errno.EINVAL, _RESET, "this VM has no dirty rings; enable them first.")
        count = sum(self._reset(vcpu.ring) for vcpu in mmu.vcpus if vcpu.ring is not None)
        if count:
            self._note(f"KVM_RESET_DIRTY_RINGS gave back {count} entries", "kvm-mmu.md 4.5")
            mmu.flush_remote_tlbs()
        return count

    def _reset(self, ring: DirtyRing) -> int:
        """``kvm_dirty_ring_reset``: neighbouring offsets of a slot are armed together."""
        count = 0
        current: tuple[int, int] | None = None
        mask = 0
        while True:
            entry = ring.entries[ring.reset_index & ring.size - 1]
            if not entry.flags & RESET:
                break
            slot, offset = entry.slot, entry.offset
            entry.flags = 0
            ring.reset_index += 1
            count += 1
            if current is not None and current[0] == slot:
                delta = (offset - current[1] + _SIGN & _U64) - _SIGN  # as 64-bit numbers, so it may wrap
                if 0 <= delta < WORD:
                    mask |= 1 << delta
                    continue
                if -WORD < delta < 0 and mask.bit_length() - delta <= WORD:
                    current = slot, offset
                    mask = mask << -delta | 1
                    continue
            if current is not None:
                self._arm_batch(*current, mask)
            current, mask = (slot, offset), 1
        if current is not None:
            self._arm_batch(*current, mask)
        return count

    def _arm_batch(self, ring_id: int, offset: int, mask: int) -> None:
        """``kvm_reset_dirty_gfn``: what names no page of a slot is passed over.

        So is a batch that wraps around behind 2^64: by KVM since commit 577a8d3bae05 (Linux 7.1); before, it
        passed the check, and KVM reached in front of its own arrays.  Never try that on a real host.
        """
        memslots = self._mmu.memslots
        as_id, number = ring_id >> 16, ring_id & 0xFFFF
        if as_id >= self._mmu.profile.address_spaces:
            return
        slot = memslots.slot(number, as_id)
        if slot is None or offset + mask.bit_length() - 1 >= slot.npages:
            return
        self._rearm(slot, offset, mask)

    # --- logging on and off --------------------------------------------------------------------------

    def begin(self, slot: Memslot) -> None:
        """Logging was switched on for a live slot (``kvm_mmu_slot_apply_flags``)."""
        if slot.flags & READONLY or (self.manual and self.initially_set):
            return
        mmu = self._mmu
        for tables in mmu.tables:
            if mmu.profile.eager_page_split:
                tables.split_huge(slot, slot.base_gfn, slot.base_gfn + slot.npages - 1)
            if mmu.profile.pml:
                tables.clear_dirty_slot(slot)
                tables.write_protect_slot(slot, 2)
            else:
                tables.write_protect_slot(slot, 1)
        self._note(f"logging of slot {slot.id} began: its pages are armed", "kvm-mmu.md 3.2")
        mmu.flush_remote_tlbs()

    def end(self, slot: Memslot) -> None:
        """Logging was switched off: the bitmap is gone already, mappings may grow again."""
        if slot.flags & READONLY:
            return
        flush = [tables.recover_huge(slot) for tables in self._mmu.tables]
        if any(flush):
            self._mmu.flush_remote_tlbs()

    def _note(self, what: str, rule: str) -> None:
        if self._mmu.journal is not None:
            self._mmu.journal.note(what, rule)


def _range_error() -> KvmError:
    return ClearRangeError(
        errno.EINVAL,
        _CLEAR,
        "first_page must be a multiple of 64, and the page count, too, unless the range ends with the slot.",
    )
