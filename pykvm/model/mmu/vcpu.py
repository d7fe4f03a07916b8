"""The MMU of a vCPU: what the processor around it calls.

A processor runs guest code in one of two ways, and asks accordingly:

* natively: ``translate`` for each access, as hardware does with its TLB and the tables that KVM made.  It may
  end in EmulateInstruction: then the whole instruction is carried out the second way;
* in KVM's emulator: ``decoded`` once an instruction, ``emulator_translate`` for each access, and
  ``emulator_write`` for each store, at once and in program order.

``rip`` is to be set before each instruction that runs natively.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pykvm.model.mmu import spte
from pykvm.model.mmu.control_change import ControlChange, apply_change, invpcid
from pykvm.model.mmu.counters import VcpuCounters
from pykvm.model.mmu.dirty_ring import DirtyRing
from pykvm.model.mmu.guest_walk import walk
from pykvm.model.mmu.memslots import READONLY
from pykvm.model.mmu.mmio import mmio_gfn
from pykvm.model.mmu.outcomes import (
    EmulateInstruction,
    GuestPageFault,
    LeaveGuest,
    Refault,
    StuckGuestError,
)
from pykvm.model.mmu.page_fault import page_fault, retry_failed, unprotect_and_retry
from pykvm.model.mmu.requests import Requests
from pykvm.model.mmu.roles import RootRole, root_role
from pykvm.model.mmu.roots import Root, Roots
from pykvm.model.mmu.shadow_page import ShadowPage
from pykvm.model.mmu.tdp_access import TdpAccess
from pykvm.model.mmu.track_write import track_write
from pykvm.model.paging import Access, Control
from pykvm.profiles import Paging
from pykvm.x86.bits import Cr0, Cr4, PageFault

if TYPE_CHECKING:
    from pykvm.model.mmu.vm import Mmu

_WRITE, _FETCH, _USER, _IMPLICIT = (
    int(kind) for kind in (Access.WRITE, Access.FETCH, Access.USER, Access.IMPLICIT)
)
_KIND: Final = _WRITE | _FETCH | _USER
_PF_P, _PF_W, _PF_U, _PF_F, _PF_RSVD = (
    int(bit) for bit in (PageFault.P, PageFault.WR, PageFault.US, PageFault.ID, PageFault.RSVD)
)
_SMEP, _SMAP = int(Cr4.SMEP), int(Cr4.SMAP)
_TLB_PAGES: Final = 1 << 14
_ENDLESS: Final = 1000
"""Faults in a row at one address after which the model takes the guest for stuck."""


class VcpuMmu:
    """``struct kvm_vcpu`` as far as memory goes."""

    def __init__(self, mmu: Mmu, vcpu_id: int, ring: DirtyRing | None) -> None:
        self.mmu = mmu
        self.id = vcpu_id
        self.ring = ring
        self.counters = VcpuCounters()
        self.control = Control(0, 0, 0, 0)
        self.root: RootRole = root_role(self.control, mmu.profile)
        self.roots = Roots(self)
        self.load_as_id = 0
        """The address space that guest code sees: 1 in SMM."""
        self.tdp = TdpAccess(self) if mmu.profile.tdp else None
        self.restarts = False
        """Accesses that fault are not repeated by themselves: whoever asks starts its instruction again."""
        self.rip = 0
        """RIP of the instruction that runs natively."""
        self.last_retry: tuple[int, int] | None = None
        """RIP and address of the last unprotect and retry."""
        self._tlb: tuple[dict[int, int], ...] = tuple({} for _ in range(_KIND + 1))
        self.flushes = 0
        """How often translations were dropped from ``cached``: what was derived from them holds no more."""
        self._copying = mmu.profile.copies_root_entries
        self._copies: dict[ShadowPage, set[int]] = {}
        """Where the profile copies roots: which of their entries this vCPU has."""
        self._mmio: tuple[int, int] | None = None
        """Page of the last MMIO access, and its gfn."""
        self.requests = Requests()
        self.requests.flush = mmu.profile.paging is Paging.EPT  # VMX asks when a vCPU comes to a processor
        self.requests.flush_guest = mmu.profile.flushes_first_root

    @property
    def direct(self) -> bool:
        """Whether faults come with guest-physical addresses: TDP, or shadow paging of an unpaged guest."""
        return self.mmu.profile.tdp or not self.root.levels

    # --- control registers ---------------------------------------------------------------------------

    def set_control(self, control: Control, change: ControlChange) -> None:
        """The control registers are these now (kvm-mmu.md 13.5)."""
        old, self.control = self.control, control
        apply_change(self, old, change)

    # --- entering the guest --------------------------------------------------------------------------

    def enter(self) -> bool:
        """Before guest code runs (every KVM_RUN, and after every exit that KVM handled): serve requests and
        load the root.  False: the dirty ring is full, KVM_RUN returns KVM_EXIT_DIRTY_RING_FULL instead.
        Raises TripleFault.
        """
        while self._serve():
            # Loading the root may itself ask for a flush: KVM looks at requests once more before it enters.
            if not self.requested:
                return True
        return False

    @property
    def requested(self) -> bool:
        """Whether a request waits for the next entry (``kvm_request_pending``)."""
        return self.requests.pending

    @property
    def rooted(self) -> bool:
        """Whether a root is loaded; without one even a host that emulates in batches enters anew."""
        return self.mmu.tdp is not None or self.roots.current is not None

    def _serve(self) -> bool:
        """One pass of ``vcpu_enter_guest`` over the requests; False where the dirty ring is full."""
        if self.ring is not None and self._full():
            return False
        counters = self.counters
        if self.requests.free_obsolete:
            self.requests.free_obsolete = False
            self.roots.free_obsolete()
        if self.requests.sync:
            self.requests.sync = False
            if self.tdp is None:
                self.roots.sync()
        if self.requests.flush:
            self.requests.flush = self.requests.flush_current = False
            counters.tlb_flush += 1
            self.flush_tlb()
            self._copies.clear()
        if self.requests.flush_current:
            self.requests.flush_current = False
            counters.tlb_flush += 1
            self.flush_tlb()
        if self.requests.flush_guest:
            self.requests.flush_guest = False
            counters.tlb_flush += 1
            self.flush_tlb()
            if self.tdp is None:
                self.roots.sync()
                self.roots.free_unsync_previous()
        if self.mmu.tdp is None and self.roots.current is None:
            self.roots.load()
            self.roots.sync()
            self.flush_tlb()
        elif self.tdp is not None:
            self.tdp.flush()
        return True

    def _full(self) -> bool:
        ring = self.ring
        assert ring is not None
        if not self.mmu.profile.ring_full_by_request:
            return ring.soft_full
        if self.requests.ring_full:
            self.requests.ring_full = ring.soft_full  # the request renews itself while the ring is full
        return self.requests.ring_full

    def reenter(self) -> None:
        """KVM handled an exit: back into the guest.  Raises LeaveGuest where userspace must see something."""
        if not self.enter():
            raise LeaveGuest

    # --- native accesses -----------------------------------------------------------------------------

    def translate(self, linear: int, access: int) -> int:
        """The guest-physical address of a linear one, for native code; ``access``: pykvm.model.paging.Access.

        The access lies within a page.  Takes the faults that KVM fixes without anybody noticing.  Raises
        GuestPageFault and EmulateInstruction, LeaveGuest where the ring is full after a fault, and Refault
        after any other if ``restarts``.
        """
        page = self._tlb[access & _KIND].get(linear >> 12)
        if page is not None:
            return page | linear & 0xFFF
        if access & _IMPLICIT:
            return self.translate(linear, access & ~(_IMPLICIT | _USER))
        if self.tdp is not None:
            return self.tdp.translate(linear, access)
        for _ in range(_ENDLESS):
            error = self._look_up(linear, access)
            if error is None:
                return self._tlb[access & _KIND][linear >> 12] | linear & 0xFFF
            try:
                page_fault(self, linear, error)
            except EmulateInstruction:
                self._learn(linear)
                raise
            self._learn(linear)
            self.reenter()
            if self.restarts:
                raise Refault
        raise StuckGuestError(f"The guest's access to {linear:#x} faults for ever: KVM_RUN would not return.")

    def _learn(self, linear: int) -> None:
        """After a fault that KVM resolved: this vCPU's copy of the root is in step."""
        sp = self.top_page(linear)
        if sp in self._copies:
            self._copies[sp] = set(sp.children)

    def cached(self, access: int) -> dict[int, int]:
        """Shadow paging's TLB for a kind of access, from linear page to guest-physical page address; it
        stays the same object."""
        return self._tlb[access & _KIND]

    def _look_up(self, linear: int, access: int) -> int | None:
        """The processor's walk of the shadow tables: fills the TLB, or gives the error code of its fault."""
        error = 0
        if access & _WRITE:
            error = _PF_W
        if access & _FETCH:
            error |= _PF_F
        if access & _USER:
            error |= _PF_U
        sp = self.top_page(linear)
        if sp is None:
            return error
        if self._copying:
            # Native code runs on a copy of the root, made when it first does.
            if sp not in self._copies:
                self._copies[sp] = set(sp.children)
            if linear >> 3 + 9 * sp.level & 511 not in self._copies[sp]:
                return error
        while True:
            index = linear >> 3 + 9 * sp.level & 511
            child = sp.children.get(index)
            if child is None:
                break
            sp = child
        entry = sp.spt.get(index, 0)
        if not entry & spte.MMU_PRESENT:
            return error | (_PF_P | _PF_RSVD if entry & spte.P else 0)
        if not self._permits(entry, access):
            return error | _PF_P
        used = entry | spte.A | (spte.D if access & _WRITE else 0)
        if used != entry:
            sp.spt[index] = used
        tlb = self._tlb[access & _KIND]
        if len(tlb) >= _TLB_PAGES:
            tlb.clear()
            self.flushes += 1
        mask = (1 << 3 + 9 * sp.level) - 1
        tlb[linear >> 12] = entry & spte.ADDRESS & ~mask | linear & mask & ~0xFFF
        return None

    def _permits(self, entry: int, access: int) -> bool:
        """Hardware's word on a leaf; CR0.WP is set while a guest runs on shadow tables."""
        if access & _WRITE and not entry & spte.W:
            return False
        if access & _FETCH and entry & spte.NX:
            return False
        if access & _USER:
            return bool(entry & spte.U)
        if not entry & spte.U:
            return True
        if access & _FETCH:
            return not self.control.cr4 & _SMEP
        return not self.control.cr4 & _SMAP or self.control.ac

    def top_page(self, linear: int) -> ShadowPage | None:
        """The shadow page where the translation of an address starts; None for an absent root."""
        root = self.roots.current
        if root is None:
            return None
        if len(root.pages) == 1:
            return root.pages[0]
        return root.pages[linear >> 30 & 3]

    def clear_flood_counters(self, linear: int) -> None:
        """``shadow_page_table_clear_flood``: the pages that translate the address are in use as tables."""
        sp = self.top_page(linear)
        while sp is not None:
            sp.write_flooding_count = 0
            sp = sp.children.get(linear >> 3 + 9 * sp.level & 511)

    # --- KVM's emulator ------------------------------------------------------------------------------

    def decoded(self) -> None:
        """The emulator decoded an instruction, successfully or not (insn_emulation)."""
        self.counters.insn_emulation += 1

    def emulator_translate(self, linear: int, access: int, *, probing: bool = False) -> int:
        """As KVM's emulator: a software walk that sets A and D and marks the tables.

        Raises GuestPageFault, as injected unless ``probing``: then it may come to nothing.
        """
        if not self.control.cr0 & Cr0.PG:
            return linear & 0xFFFFFFFF
        if self._mmio is not None and not access & ~_USER and self.is_mmio(linear):
            # ``vcpu_mmio_gva_to_gpa``: the page that just faulted as MMIO is not looked up again.
            return self._mmio[1] << 12 | linear & 0xFFF
        try:
            return walk(self, linear, access).gpa
        except GuestPageFault as found:
            if not probing:
                self.inject_page_fault(found)
            raise

    def emulator_write(self, gpa: int, data: bytes, *, locked: bool = False, tracked: bool = True) -> bool:
        """A store of the emulator within one page: memory, dirty mark, track_write.  False: not RAM.

        ``locked``: a locked or exchanging operation, which marks before it looks; nobody can tell here.
        ``tracked`` False: the write_std path (FXSAVE, SGDT, descriptors): no track_write hears of it (12.4).
        """
        mmu = self.mmu
        gfn = gpa >> 12
        slot = mmu.memslots.visible(gfn)
        if slot is None or slot.flags & READONLY:
            return False
        at = gpa - (slot.base_gfn << 12)
        slot.data[at : at + len(data)] = data
        mmu.mark_page_dirty(slot, gfn)
        if tracked:
            mmu.page_track.notify_write(gpa, data)
            track_write(self, gpa, len(data))
        return True

    def retry(self, emulate: EmulateInstruction, rip: int, *, page_table_opcode: bool) -> bool:
        """Whether KVM unprotected the gfn and resumes the guest instead of emulating (12.3, 12.7)."""
        self.rip = rip
        if self.mmu.profile.retries_always:
            last, self.last_retry = self.last_retry, None
            if not emulate.allow_retry or page_table_opcode or last == (rip, emulate.address):
                return False
            unprotect_and_retry(self, emulate.address)
            self.last_retry = rip, emulate.address
            return True
        if not emulate.allow_retry or page_table_opcode:
            return False
        return unprotect_and_retry(self, emulate.address)

    def emulation_failed(self, emulate: EmulateInstruction | None, rip: int) -> bool:
        """The emulator lacks the instruction: whether an unprotected page lets the guest retry; else
        insn_emulation_fail counts and the caller injects #UD or exits (12.3)."""
        if self.retry_after_failure(emulate, rip):
            return True
        self.counters.insn_emulation_fail += 1
        return False

    def retry_after_failure(self, emulate: EmulateInstruction | None, rip: int) -> bool:
        """``kvm_unprotect_and_retry_on_failure``: also where the instruction could not even be fetched."""
        self.rip = rip
        if emulate is None or not emulate.allow_retry:
            return False
        return retry_failed(self, emulate.address, own_table=emulate.write_pf_to_sp)

    def inject_page_fault(self, delivered: GuestPageFault) -> None:
        """``kvm_inject_emulated_page_fault``: count it; an SPTE that still forbids what the tables allow by
        now is looked at again."""
        self.counters.pf_guest += 1
        if self.tdp is None and delivered.error & _PF_P and not delivered.error & _PF_RSVD:
            self.invalidate(delivered.address, [self.roots.current])

    def invlpg(self, linear: int) -> None:
        """INVLPG (10.5), which is intercepted and counted only without nested paging."""
        if self.tdp is not None:
            self.tdp.flush()
            return
        self.counters.invlpg += 1
        self.invalidate(linear, [self.roots.current, *self.roots.previous])

    def invpcid(self, kind: int, pcid: int, linear: int) -> None:
        """INVPCID (13.5), which is intercepted and counted only without nested paging."""
        if self.tdp is not None:
            self.tdp.flush()
        else:
            invpcid(self, kind, pcid, linear)

    def invalidate(self, linear: int, roots: Sequence[Root | None]) -> None:
        """``kvm_mmu_invalidate_addr``: the SPTE of an unsync page is brought in step below these roots."""
        page = linear >> 12
        if self.is_mmio(linear):
            self.forget_mmio()
        self.flushes += 1
        for tlb in self._tlb:
            tlb.pop(page, None)
        if not self.root.levels:
            return
        for root in roots:
            if root is None:
                continue
            sp = root.pages[0] if len(root.pages) == 1 else root.pages[linear >> 30 & 3]
            while sp is not None:
                index = linear >> 3 + 9 * sp.level & 511
                if sp.unsync:
                    self._sync_spte(sp, index)
                if not sp.unsync_child_bitmap:
                    break
                sp = sp.children.get(index)

    def _sync_spte(self, sp: ShadowPage, index: int) -> None:
        mmu = self.mmu
        if mmu.profile.invlpg_refetches:
            # [6.1] drops the SPTE, if there is one, and makes it from the table as it is now.
            mmu.unsync.refetch(self, sp, index)
            return
        changed = mmu.unsync.sync_spte(self, sp, index)
        if changed is None:
            mmu.shadow.zap_entry(sp, index)
        if changed or changed is None:
            mmu.flush_remote_tlbs()

    def translate_for_host(self, linear: int) -> int | None:
        """KVM_TRANSLATE: a supervisor read that sets A bits and marks tables; None without a mapping."""
        if not self.control.cr0 & Cr0.PG:
            return linear & 0xFFFFFFFF
        try:
            return walk(self, linear, 0).gpa
        except GuestPageFault:
            return None

    # --- MMIO ----------------------------------------------------------------------------------------

    def remember_mmio(self, address: int, gfn: int) -> None:
        """``vcpu_cache_mmio_info``."""
        self._mmio = address >> 12, gfn

    def is_mmio(self, address: int) -> bool:
        """Whether the address is the remembered MMIO page."""
        return self._mmio is not None and self._mmio[0] == address >> 12

    def handle_mmio(self, address: int) -> bool:
        """``handle_mmio_page_fault``: a reserved-bit fault that means MMIO; False for a stale generation."""
        if self.is_mmio(address):
            return True
        if self.tdp is not None and self.mmu.tdp is not None:
            return self.tdp.handle_mmio(address)
        gfn = mmio_gfn(self, address)
        if gfn is not None:
            self.remember_mmio(address, gfn)
        return gfn is not None

    def forget_mmio(self) -> None:
        """Slots or translations changed: the remembered MMIO address is void."""
        self._mmio = None

    # --- what the VM tells it ------------------------------------------------------------------------

    def push_dirty(self, ring_id: int, offset: int) -> None:
        """A mark goes to this vCPU's ring (4.3)."""
        ring = self.ring
        assert ring is not None
        ring.push(ring_id, offset)
        if ring.soft_full:
            self.requests.ring_full = True

    def request_tlb_flush(self) -> None:
        """KVM_REQ_TLB_FLUSH: served at the next entry, before any guest code."""
        self.requests.flush = True
        self.flush_tlb()

    def request_free_obsolete_roots(self) -> None:
        """KVM_REQ_MMU_FREE_OBSOLETE_ROOTS."""
        self.requests.free_obsolete = True
        self.flush_tlb()

    def flush_tlb(self) -> None:
        """Drop all cached translations."""
        self.flushes += 1
        for tlb in self._tlb:
            tlb.clear()
        if self.tdp is not None:
            self.tdp.flush()

    def flush_pml(self) -> None:
        """An exit of this vCPU reads its PML buffer (11.3), and what it marks is this vCPU's, whoever forced
        the exit (``kvm_arch_sync_dirty_log`` kicks vCPUs that others run)."""
        if self.tdp is None or self.tdp.pml is None:
            return
        mmu = self.mmu
        before, mmu.loaded = mmu.loaded, self
        try:
            self.tdp.pml.flush()
        finally:
            mmu.loaded = before


__all__ = ["ControlChange", "StuckGuestError", "VcpuMmu"]
