"""The MMU of a VM: what its parts share, and what the VM's ioctls ask of them."""

from __future__ import annotations

import errno
from typing import Final

from pykvm.errors import RingOrderError, RingSizeError
from pykvm.model.mmu.counters import VmCounters
from pykvm.model.mmu.dirty_log import DirtyLog
from pykvm.model.mmu.dirty_ring import ENTRY_BYTES, MAX_ENTRIES, MIN_BYTES, DirtyRing
from pykvm.model.mmu.journal import Journal
from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES, Change, Memslot, Memslots
from pykvm.model.mmu.page_track import PageTrack
from pykvm.model.mmu.rmap import Rmap
from pykvm.model.mmu.shadow_mmu import ShadowMmu
from pykvm.model.mmu.tables import Tables
from pykvm.model.mmu.tdp_mmu import TdpMmu
from pykvm.model.mmu.unsync import Unsync
from pykvm.model.mmu.vcpu import VcpuMmu
from pykvm.profiles import Profile

_RING: Final = "KVM_ENABLE_CAP(DIRTY_LOG_RING)"
_MMIO_GENERATION_BITS: Final = 19
"""One less where SPTEs have a bit for user execution (section 8)."""
SLOT_ZAP_ALL: Final = 1 << 7
"""KVM_X86_QUIRK_SLOT_ZAP_ALL, which KVM_CAP_DISABLE_QUIRKS2 switches off."""
_WITH_BITMAP: Final = "KVM_ENABLE_CAP(DIRTY_LOG_RING_WITH_BITMAP)"


class Mmu:
    """``struct kvm`` as far as memory goes, on a host of the given profile.

    One thread at a time may be inside: the machine around it sees to that.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.counters = VmCounters()
        self.journal: Journal | None = None
        """Set one to have mechanisms note what they do."""
        self.vcpus: list[VcpuMmu] = []
        self.loaded: VcpuMmu | None = None
        """The vCPU that this thread has loaded (any vCPU ioctl): marks go to its ring."""
        self.ring_entries = 0
        self.ring_with_bitmap = False
        self.slot_zap_all = True
        """KVM_X86_QUIRK_SLOT_ZAP_ALL: a slot that goes or moves takes the mappings of all slots along."""
        self.memslots = Memslots(profile, self)
        self.page_track = PageTrack(self)
        self.dirty_log = DirtyLog(self)
        self.unsync = Unsync(self)
        self.shadow = ShadowMmu(self)
        """Shadow pages: of guest tables, and of direct maps where there is no TDP MMU."""
        self.tdp = TdpMmu(self) if profile.tdp and profile.tdp_mmu else None
        self.tables: tuple[Tables, ...] = (self.tdp, self.shadow) if self.tdp is not None else (self.shadow,)

    def create_vcpu(self) -> VcpuMmu:
        """KVM_CREATE_VCPU: with a ring where rings are enabled."""
        ring = DirtyRing(self.ring_entries, self.profile.reserved_ring_entries) if self.ring_entries else None
        vcpu = VcpuMmu(self, len(self.vcpus), ring)
        self.vcpus.append(vcpu)
        return vcpu

    # --- dirty pages ---------------------------------------------------------------------------------

    def mark_page_dirty(self, slot: Memslot, gfn: int) -> None:
        """``mark_page_dirty_in_slot`` (3.2): KVM or the guest wrote to the gfn, or may be about to."""
        vcpu = self.loaded
        if vcpu is None and not self.profile.marks_without_vcpu:
            self.dirty_log.lost += 1
            return
        if not slot.flags & LOG_DIRTY_PAGES:
            return
        if vcpu is not None and vcpu.ring is not None:
            vcpu.push_dirty(slot.ring_id, gfn - slot.base_gfn)
            if self.journal is not None:
                self.journal.note(f"gfn {gfn:#x} is pushed to the ring of vCPU {vcpu.id}", "kvm-mmu.md 4.3")
        elif slot.dirty_bitmap is not None:
            slot.dirty_bitmap.mark(gfn - slot.base_gfn)
            if self.journal is not None:
                self.journal.note(f"gfn {gfn:#x} is marked in the bitmap of slot {slot.id}", "kvm-mmu.md 3.2")
        else:
            self.dirty_log.lost += 1

    def flush_remote_tlbs(self) -> None:
        """``kvm_flush_remote_tlbs``: every vCPU flushes before it next runs guest code."""
        self.counters.remote_tlb_flush_requests += 1
        for vcpu in self.vcpus:
            vcpu.request_tlb_flush()

    def flush_pml(self) -> None:
        """``kvm_arch_sync_dirty_log``: kick every vCPU, so that its PML buffer is read."""
        if self.profile.pml:
            for vcpu in self.vcpus:
                vcpu.flush_pml()

    def write_protect_gfn(self, slot: Memslot, gfn: int, min_level: int = 1) -> bool:
        """``kvm_mmu_slot_gfn_write_protect`` in all tables: whether a flush is due."""
        flush = False
        for tables in self.tables:
            flush |= tables.write_protect_gfn(slot, gfn, min_level)
        return flush

    def enable_dirty_ring(self, size: int) -> None:
        """KVM_CAP_DIRTY_LOG_RING with ``size`` in bytes (4.2).  Raises RingSizeError, RingOrderError."""
        reserved = self.profile.reserved_ring_entries
        if size == 0 or size & (size - 1):
            raise RingSizeError(errno.EINVAL, _RING, f"{size} bytes are not a power of two.")
        if size < reserved * ENTRY_BYTES or size < MIN_BYTES:
            raise RingSizeError(errno.EINVAL, _RING, f"{size} bytes are too few for this host.")
        if size > MAX_ENTRIES * ENTRY_BYTES:
            raise RingSizeError(errno.E2BIG, _RING, f"{size} bytes are more than 1 MiB.")
        if self.ring_entries or self.vcpus:
            raise RingOrderError(errno.EINVAL, _RING, "rings are enabled once, before the first vCPU.")
        self.ring_entries = size // ENTRY_BYTES

    def enable_ring_with_bitmap(self) -> None:
        """KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP (4.8): what is marked without a vCPU goes to a bitmap.

        Raises RingOrderError (EINVAL) on a host that has no such marks, without rings, once there is a slot.
        """
        if not self.profile.ring_with_bitmap:
            raise RingOrderError(
                errno.EINVAL, _WITH_BITMAP, "on this host each guest write has a vCPU; use the ring alone."
            )
        if not self.ring_entries:
            raise RingOrderError(errno.EINVAL, _WITH_BITMAP, "enable the rings first.")
        if self.memslots.all():
            raise RingOrderError(errno.EINVAL, _WITH_BITMAP, "enable it before the first memslot.")
        self.ring_with_bitmap = True

    # --- memslots (SlotObserver) ---------------------------------------------------------------------

    def slot_prepared(self, slot: Memslot, change: Change) -> None:
        if change is not Change.FLAGS_ONLY:
            slot.rmap = Rmap() if self.shadow.uses_rmaps else None
            self.page_track.create_memslot(slot)
        if not slot.logs:
            slot.dirty_bitmap = None
        elif slot.dirty_bitmap is None:
            self.dirty_log.allocate(slot)

    def generation_changed(self, generation: int) -> None:
        """``kvm_mmu_invalidate_mmio_sptes``: MMIO SPTEs carry so many bits of the generation that an old one
        could be taken for a new one after a round: then everything is zapped (section 2)."""
        bits = _MMIO_GENERATION_BITS - self.profile.separate_read_access
        if not generation & (1 << bits) - 1 & -self.profile.address_spaces:
            for tables in self.tables:
                tables.zap_all_fast()

    def slot_invalidated(self, slot: Memslot, change: Change) -> None:
        for vcpu in self.vcpus:
            vcpu.forget_mmio()
        # [6.1] KVM's own node is a notifier like the others, and the last one; later its zap comes first.
        if self.profile.own_track_node:
            self.page_track.notify_remove(slot)
        if self.slot_zap_all:
            for tables in self.tables:
                tables.zap_all_fast()
        else:
            last = slot.base_gfn + slot.npages - 1
            flush = [tables.zap_range(slot, slot.base_gfn, last) for tables in self.tables]
            self.shadow.zap_memslot_pages(slot, flush=any(flush))
        if not self.profile.own_track_node:
            self.page_track.notify_remove(slot)

    def slot_committed(self, slot: Memslot, change: Change, old_flags: int) -> None:
        for vcpu in self.vcpus:
            vcpu.forget_mmio()
        if change in (Change.CREATE, Change.DELETE):
            self.shadow.memory_resized()
        if change is Change.FLAGS_ONLY and (slot.flags ^ old_flags) & LOG_DIRTY_PAGES:
            if slot.logs:
                self.dirty_log.begin(slot)
            else:
                self.dirty_log.end(slot)
