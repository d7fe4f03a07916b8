"""Dirty logs of slots that are several: KVM's, put together, and the writes that KVM left to us."""

from __future__ import annotations

import errno
from abc import ABC
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from pykvm.errors import ClearRangeError, ClosedError, DirtyRingModeError, LoggingDisabledError, UsageError
from pykvm.machine import Gfns, RingEntries, RingHarvest, Slot, SlotFrames, Vcpu
from pykvm.track.carved_memory import NOWHERE, CarvedMemory, RingBatch
from pykvm.track.carved_slot import CarvedSlot
from pykvm.track.carved_vcpu import CarvedVcpu
from pykvm.track.manual import DEFAULT_CHUNK, clear_ranges

_WORD = 64


class CarvedLog(CarvedMemory, ABC):
    """The part of a carved machine that deals with dirty logs."""

    # --- bitmaps -----------------------------------------------------------------------------------------

    def get_dirty_bitmap(self, slot: Slot) -> npt.NDArray[np.uint64]:
        """See pykvm.machine.Machine.get_dirty_bitmap."""
        with self._lock:
            own = self._own(slot)
            pages = self.get_dirty_log(slot) - np.uint64(own.base_gfn)
            words = np.zeros((own.npages + _WORD - 1) // _WORD, dtype=np.uint64)
            np.bitwise_or.at(words, pages // _WORD, np.uint64(1) << pages % np.uint64(_WORD))
            return words

    def get_dirty_log(self, slot: Slot) -> Gfns:
        """See pykvm.machine.Machine.get_dirty_log."""
        with self._lock:
            own = self._own(slot)
            if own.whole is not None and not own.dirty:
                return self.real.get_dirty_log(own.whole)
            self._require_log(own, "KVM_GET_DIRTY_LOG")
            for piece, real in own.pieces.items():
                if not piece.readonly:
                    self.fetch(own, piece, real)  # kept at once, should the next one fail
            pages = own.dirty.pages()
            if not self.manual:
                own.dirty.clear()
            return pages + np.uint64(own.base_gfn)

    def clear_dirty_log(self, slot: Slot, first_page: int, pages: int, words: npt.NDArray[np.uint64]) -> None:
        """See pykvm.machine.Machine.clear_dirty_log; the pieces need not begin at multiples of 64."""
        with self._lock:
            own = self._own(slot)
            if own.whole is not None and not own.dirty:
                self.real.clear_dirty_log(own.whole, first_page, pages, words)
                return
            gfns = self._named(own, first_page, pages, words)
            self._require_log(own, "KVM_CLEAR_DIRTY_LOG")
            own.dirty.discard(gfns - np.uint64(own.base_gfn))
            for piece, real in own.pieces.items():
                start = own.base_gfn + piece.first
                inside = gfns[(gfns >= start) & (gfns < start + piece.pages)]
                if len(inside) and not piece.readonly:
                    for first, count, bits in clear_ranges(real, inside, DEFAULT_CHUNK):
                        self.real.clear_dirty_log(real, first, count, bits)

    @staticmethod
    def _named(slot: CarvedSlot, first: int, pages: int, words: npt.NDArray[np.uint64]) -> Gfns:
        """The gfns of the set bits.  Raises what KVM_CLEAR_DIRTY_LOG does for the range (api.rst 4.117)."""
        if not (0 <= first < 1 << 64 and 0 <= pages < 1 << 32):
            raise UsageError("first_page or pages is negative or too large.")
        left = slot.npages - first
        if first % _WORD or left < 0 or pages > left or (pages % _WORD and pages != left):
            raise ClearRangeError(
                errno.EINVAL,
                "KVM_CLEAR_DIRTY_LOG",
                "first_page must be a multiple of 64, and so must the page count unless the range ends with "
                f"the slot's {slot.npages} pages.",
            )
        words = np.ascontiguousarray(words, dtype=np.uint64)
        if len(words) < (pages + _WORD - 1) // _WORD:
            raise UsageError(f"{pages} pages need {(pages + 63) // 64} words of bitmap, not {len(words)}.")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:pages]
        return np.flatnonzero(bits).astype(np.uint64) + np.uint64(slot.base_gfn + first)

    def _own(self, slot: Slot) -> CarvedSlot:
        if isinstance(slot, CarvedSlot):
            if slot.owner is self:
                return slot
            if slot.owner is None:
                raise ClosedError(f"Slot {slot.id} was deleted; create a new one.")
        raise UsageError("The slot belongs to another machine.")

    def _require_log(self, slot: CarvedSlot, operation: str) -> None:
        if self.real.ring_entries:
            raise DirtyRingModeError(
                errno.ENXIO,
                operation,
                "this VM uses dirty rings, which replace the bitmap; use collect_rings instead.",
            )
        if not slot.logs:
            raise LoggingDisabledError(
                errno.ENOENT,
                operation,
                "the slot is gone or does not log; set SlotFlags.LOG_DIRTY_PAGES first.",
            )

    def enable_manual_protect(self, initially_set: bool = False) -> None:
        """See pykvm.machine.Machine.enable_manual_protect."""
        with self._lock:
            self.real.enable_manual_protect(initially_set)
            self.manual = True
            self.initially_set = initially_set

    # --- rings -------------------------------------------------------------------------------------------

    @property
    def ring_entries(self) -> int:
        return self.real.ring_entries

    def enable_dirty_ring(self, entries: int) -> None:
        """See pykvm.machine.Machine.enable_dirty_ring."""
        self.real.enable_dirty_ring(entries)

    def collect_rings(self, vcpus: Iterable[Vcpu] | None = None) -> RingHarvest:
        """See pykvm.machine.Machine.collect_rings.

        Entries that were taken when a slot was split stand first, then those of the rings, then writes to
        tracked pages: each of the three in the order of each vCPU, but not all together.
        """
        with self._lock:
            chosen = None if vcpus is None else list(vcpus)
            harvested = self.harvest(chosen)
            batches = [(entries, self._present(frames)) for entries, frames in self._harvested] + harvested
            self._harvested = []
            wanted = None if chosen is None else {vcpu.id for vcpu in chosen}
            for number, marks in self._marks.items():
                if marks and (wanted is None or number in wanted):
                    batches += self._as_entries(number, marks)
                    marks.clear()
            return RingHarvest(batches)

    def _present(self, frames: Mapping[int, SlotFrames]) -> dict[int, SlotFrames]:
        """Without the slots that were deleted or moved since."""
        now = {slot.id: slot.frames for slot in self._slots.values()}
        return {number: each for number, each in frames.items() if now.get(number) is each}

    def harvest(self, vcpus: Iterable[Vcpu] | None = None) -> list[RingBatch]:
        chosen = None
        if vcpus is not None:
            chosen = [vcpu.real if isinstance(vcpu, CarvedVcpu) else vcpu for vcpu in vcpus]
        batches = self.real.collect_rings(chosen).batches
        return [self._translated(*batch) for batch in batches]

    def _translated(self, entries: RingEntries, frames: Mapping[int, SlotFrames]) -> RingBatch:
        """Under the ids and offsets of the slots that everybody sees."""
        ids, offsets = entries.slots.copy(), entries.offsets.copy()
        known = {
            real.id: (slot, piece) for slot in self._slots.values() for piece, real in slot.pieces.items()
        }
        for number in np.unique(entries.slots).tolist():
            here = entries.slots == number
            if number not in known or number not in frames:
                ids[here] = NOWHERE
                continue
            slot, piece = known[number]
            beyond = here & (entries.offsets >= frames[number].pages)
            ids[here] = slot.id
            ids[beyond] = NOWHERE
            offsets[here] += np.uint64(piece.first)
        now = {slot.id: slot.frames for slot in self._slots.values()}
        return RingEntries(entries.vcpu, ids, offsets), now

    def _as_entries(self, vcpu: int, marks: Iterable[tuple[CarvedSlot, int]]) -> list[RingBatch]:
        alive = [(slot, page) for slot, page in marks if slot.alive]
        if not alive:
            return []
        ids = np.array([slot.id for slot, _ in alive], dtype=np.uint32)
        offsets = np.array([page for _, page in alive], dtype=np.uint64)
        return [(RingEntries(vcpu, ids, offsets), {slot.id: slot.frames for slot, _ in alive})]
