"""A machine of the model on a host: slots, dirty logs and statistics are those of KVM's MMU there."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from pykvm.errors import CapabilityError, KvmError, RingOverflowError, SlotAbsentError, UsageError
from pykvm.machine.protocols import RingEntries, RingHarvest, Slot, SlotFlags, SlotFrames, Vcpu
from pykvm.machine.statistics import Statistics
from pykvm.machine.tracking import MAX_TRACK_COUNT
from pykvm.memory import PAGE_SIZE
from pykvm.model.machine import ModelMachine
from pykvm.model.mmu.dirty_ring import ENTRY_BYTES
from pykvm.model.mmu.memslots import PinnedPages
from pykvm.model.mmu.shadow_mmu import MIN_PAGES
from pykvm.model.mmu.vm import SLOT_ZAP_ALL, Mmu
from pykvm.model.profiled.vcpu import ProfiledVcpu
from pykvm.model.statistics import machine_statistics

if TYPE_CHECKING:
    from pykvm.machine.dirty import Gfns
    from pykvm.machine.tracking import TrackNode
    from pykvm.memory import GuestMemory
    from pykvm.model.mmu.memslots import Memslot
    from pykvm.model.slots import ModelSlot
    from pykvm.model.vcpu import ModelVcpu
    from pykvm.profiles import Profile
    from pykvm.x86.cpuid import CpuidEntry

_LEVELS = {PAGE_SIZE: 1, 2 << 20: 2, 1 << 30: 3}
"""The level at which a host maps pages, by their size."""
_Batch = tuple[RingEntries, Mapping[int, SlotFrames]]


class ProfiledMachine(ModelMachine):
    """A machine on a host of ``profile``; see pykvm.machine.Machine.  ``mmu`` is KVM's MMU of it.

    What its log, rings and statistics say is what a real KVM of the profile would say, repeats and all.  It
    tracks writes by page (pykvm.machine.tracking.PageTracking).
    """

    # KVM's MMU refuses what its address bits cannot reach, when a move has zapped everything already.
    highest_end = 1 << 64

    def __init__(self, supported_cpuid: Sequence[CpuidEntry], seed: int, profile: Profile) -> None:
        self.mmu = Mmu(profile)
        self.profile = profile
        self._batches: list[_Batch] = []
        self._trackers: list[TrackNode] = []
        super().__init__(supported_cpuid, seed, translate=False)

    def _make_vcpu(self, vcpu_id: int) -> ModelVcpu:
        return ProfiledVcpu(self, vcpu_id)

    # --- slots ---------------------------------------------------------------------------------------

    def _memslot(self, slot: ModelSlot) -> Memslot | None:
        return self.mmu.memslots.slot(slot.id) if slot.alive else None

    def _set_region(self, slot: ModelSlot, gpa: int, size: int, flags: SlotFlags) -> None:
        self.mmu.memslots.set_region(
            slot.id,
            int(flags),
            gpa,
            size,
            slot.userspace_addr,
            slot.bytes if size else None,
            host=PinnedPages(_LEVELS.get(slot.memory.page_size, 1)),
        )

    def slot_created(self, slot: ModelSlot) -> None:
        self._keep_entries()
        self._set_region(slot, slot.gpa, slot.size, slot.flags)
        slot.memory.notify_discards(self._pages_dropped)

    def _pages_dropped(self, memory: GuestMemory, offset: int, length: int) -> None:
        """An MMU notifier: the host took pages of a memory away."""
        with self.schedule.visit():
            flush = False
            for slot in self._slots.values():
                first = max(offset - slot.memory_offset, 0) // PAGE_SIZE
                last = min(offset + length - slot.memory_offset, slot.size) // PAGE_SIZE - 1
                memslot = self._memslot(slot)
                if slot.memory is memory and first <= last and memslot is not None:
                    base = memslot.base_gfn
                    for tables in self.mmu.tables:
                        flush |= tables.zap_range(memslot, base + first, base + last)
            if flush:
                self.mmu.flush_remote_tlbs()

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES: at most so many shadow pages, from 64 on.

        Raises UsageError for no unsigned 32-bit number, KvmError (EINVAL) below 64.
        """
        if not 0 <= pages < 1 << 32:
            raise UsageError(f"{pages} shadow pages: use an unsigned 32-bit number.")
        if pages < MIN_PAGES:
            raise KvmError(errno.EINVAL, "KVM_SET_NR_MMU_PAGES", "KVM wants at least 64 shadow pages.")
        with self.schedule.visit():
            self.mmu.shadow.change_limit(pages)
            self.mmu.shadow.requested = True

    def disable_quirks(self, quirks: int) -> None:
        """KVM_CAP_DISABLE_QUIRKS2 as far as memory goes: SLOT_ZAP_ALL alone, which 6.12 and later know.

        Raises CapabilityError for any other.
        """
        if quirks & ~SLOT_ZAP_ALL:
            raise CapabilityError(f"The model has no quirk {quirks & ~SLOT_ZAP_ALL:#x}; only SLOT_ZAP_ALL.")
        with self.schedule.visit():
            self.mmu.slot_zap_all = not quirks

    def slot_changed(self, slot: ModelSlot, gpa: int, flags: SlotFlags) -> None:
        self._keep_entries()
        self._set_region(slot, gpa, slot.size, flags)

    def slot_deleted(self, slot: ModelSlot) -> None:
        self._keep_entries()
        self._set_region(slot, slot.gpa, 0, slot.flags)

    def _log(self, slot: ModelSlot, flags: SlotFlags) -> None:
        """The memslot has the log."""

    def memory_changed(self) -> None:
        """The MMU was told."""

    # --- dirty bitmaps -------------------------------------------------------------------------------

    def enable_manual_protect(self, initially_set: bool = False) -> None:
        with self.schedule.visit():
            self.require_open()
            self.mmu.dirty_log.manual = True
            self.mmu.dirty_log.initially_set = initially_set

    def get_dirty_bitmap(self, slot: Slot) -> npt.NDArray[np.uint64]:
        own = self._own(slot)
        with self.schedule.visit():
            self.require_open()
            return self.mmu.dirty_log.get(self._memslot(own))

    def get_dirty_log(self, slot: Slot) -> Gfns:
        own = self._own(slot)
        words = self.get_dirty_bitmap(slot)
        where = np.flatnonzero(words)
        bits = np.unpackbits(words[where].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        word, bit = np.nonzero(bits)
        return (where[word] * 64 + bit).astype(np.uint64) + np.uint64(own.frames.base_gfn)

    def clear_dirty_log(self, slot: Slot, first_page: int, pages: int, words: npt.NDArray[np.uint64]) -> None:
        own = self._own(slot)
        if not (0 <= first_page < 1 << 64 and 0 <= pages < 1 << 32):
            raise UsageError("first_page or pages is negative or too large.")
        words = np.ascontiguousarray(words, dtype=np.uint64)
        if len(words) < (pages + 63) // 64:
            raise UsageError(f"{pages} pages need {(pages + 63) // 64} words of bitmap, not {len(words)}.")
        with self.schedule.visit():
            self.require_open()
            self.mmu.dirty_log.clear(self._memslot(own), first_page, pages, words)

    # --- dirty rings ---------------------------------------------------------------------------------

    def enable_dirty_ring(self, entries: int) -> None:
        with self.schedule.visit():
            self.require_open()
            self.mmu.enable_dirty_ring(entries * ENTRY_BYTES if entries > 0 else 0)
            self.ring_entries = entries

    def collect_rings(self, vcpus: Iterable[Vcpu] | None = None) -> RingHarvest:
        with self.schedule.visit():
            self._require_rings()
            self.require_open()
            wanted = None if vcpus is None else {vcpu.id for vcpu in self._own_vcpus(vcpus)}
            self._harvest(wanted)
            self._raise_overflow()
            if self._batches:
                self.mmu.dirty_log.reset_rings()
            batches, self._batches = self._batches, []
            now = self._frames_now()
            return RingHarvest(
                [
                    (entries, {number: at for number, at in slots.items() if now.get(number) is at})
                    for entries, slots in batches
                ]
            )

    def _frames_now(self) -> dict[int, SlotFrames]:
        return {slot.id: slot.frames for slot in self._slots.values()}

    def _harvest(self, wanted: set[int] | None) -> None:
        """Take what there is from the rings; a later reset gives it back."""
        slots = self._frames_now()
        for vcpu in self._profiled_vcpus():
            reader = vcpu.ring_reader
            if reader is None or reader.overflowed or (wanted is not None and vcpu.id not in wanted):
                continue
            entries = reader.harvest()
            if entries is not None:
                self._batches.append((entries, slots))

    def _raise_overflow(self) -> None:
        lost = [vcpu for vcpu in self._profiled_vcpus() if vcpu.ring_reader and vcpu.ring_reader.overflowed]
        if not lost:
            return
        self._batches = []
        self.mmu.dirty_log.reset_rings()
        for vcpu in lost:
            if vcpu.ring_reader is not None:
                vcpu.ring_reader.give_up()
        raise RingOverflowError(
            f"The dirty ring of vCPU {lost[0].id} ({self.ring_entries} entries) overflowed and pages are "
            "missing from the log: this host runs more guest code between two checks than the ring can hold. "
            "Use the bitmap, a guest at CPL 3, or a larger ring; the VM's log cannot be trusted any more."
        )

    def _keep_entries(self) -> None:
        """Slots change: the entries so far still mean them as they are."""
        if self.ring_entries:
            self._harvest(None)

    def _profiled_vcpus(self) -> list[ProfiledVcpu]:
        return cast("list[ProfiledVcpu]", self._vcpus)

    # --- page tracking -------------------------------------------------------------------------------

    def _tracked_slot(self, gfn: int) -> Memslot:
        slot = self.mmu.memslots.lookup(gfn)
        if slot is None:
            raise SlotAbsentError(
                errno.EINVAL, "kvm_write_track_add_gfn", f"gfn {gfn:#x} has no memslot; create one first."
            )
        return slot

    def track_add_gfn(self, gfn: int) -> None:
        """``kvm_write_track_add_gfn``; see pykvm.machine.tracking.PageTracking."""
        with self._changing():
            slot = self._tracked_slot(gfn)
            if self.mmu.page_track.count(slot, gfn) >= MAX_TRACK_COUNT:
                raise UsageError(f"Page {gfn:#x} is tracked {MAX_TRACK_COUNT} times already.")
            self.mmu.page_track.add_gfn(gfn)

    def track_remove_gfn(self, gfn: int) -> None:
        """``kvm_write_track_remove_gfn``."""
        with self._changing():
            slot = self._tracked_slot(gfn)
            if not self.mmu.page_track.count(slot, gfn):
                raise UsageError(f"Page {gfn:#x} is not tracked.")
            self.mmu.page_track.remove_gfn(gfn)

    def register_track_notifier(self, node: TrackNode) -> None:
        """``kvm_page_track_register_notifier``."""
        with self._changing():
            if node in self._trackers:
                raise UsageError("The notifier is registered already.")
            self.mmu.page_track.register(node)
            self._trackers.append(node)

    def unregister_track_notifier(self, node: TrackNode) -> None:
        """``kvm_page_track_unregister_notifier``."""
        with self._changing():
            if node not in self._trackers:
                raise UsageError("The notifier is not registered.")
            self._trackers.remove(node)
            self.mmu.page_track.unregister(node)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self.schedule.visit():
            self.require_open()
            yield

    # --- the rest ------------------------------------------------------------------------------------

    def counters(self) -> Mapping[str, int]:
        """The single-valued statistics by name."""
        found = self.mmu.counters.as_dict()
        if not self.profile.has_shadow_pages_statistic:
            del found["mmu_shadow_pages"]
        return found

    def statistics(self) -> Statistics:
        self.require_open()
        return machine_statistics(self.counters())
