"""Unsync shadow pages: leaf tables that the guest writes natively until it flushes (kvm-mmu.md 10.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pykvm.model.mmu import roles, spte
from pykvm.model.mmu.guest_walk import forbids_entry, read_entry
from pykvm.model.mmu.memslots import Memslot
from pykvm.model.mmu.prefetch import prefetch_leaf
from pykvm.model.mmu.shadow_page import ShadowPage
from pykvm.model.paging_format import ADDRESS, format_of
from pykvm.x86.bits import Pte

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu
    from pykvm.model.mmu.vm import Mmu

_BATCH: Final = 16
"""KVM_PAGE_ARRAY_NR: pages of an unsync subtree, inner ones included, that are gathered at once."""
_P, _A = int(Pte.P), int(Pte.A)
_RULE: Final = "kvm-mmu.md 10.5"


class _Found(NamedTuple):
    """An unsync leaf table, and the SPTEs above it up to where the search began, from the top."""

    sp: ShadowPage
    path: tuple[tuple[ShadowPage, int], ...]


class Unsync:
    """Which leaf tables are out of step, and how they get into it again."""

    def __init__(self, mmu: Mmu) -> None:
        self._mmu = mmu

    # --- getting out of step -------------------------------------------------------------------------

    def try_to_unsync(self, slot: Memslot, gfn: int, *, synchronizing: bool, prefetch: bool) -> bool:
        """``mmu_try_to_unsync_pages``: whether the gfn may be mapped writable.

        Its leaf tables become unsync; not while another page is being synchronised, nor for a prefetch, and
        never for a tracked gfn.
        """
        mmu = self._mmu
        if mmu.page_track.is_tracked(slot, gfn):
            return False
        pages = mmu.shadow.by_gfn.get(gfn)
        if not pages:
            return True
        for sp in tuple(pages):
            if sp.direct or mmu.shadow.is_obsolete(sp):
                continue
            if synchronizing:
                return False
            if sp.unsync:
                continue
            if prefetch:
                return False
            mmu.counters.mmu_unsync += 1
            sp.unsync = True
            if mmu.journal is not None:
                mmu.journal.note(f"{sp} becomes unsync: the guest may write to its table", _RULE)
            self.mark_parents(sp)
        return True

    def mark_parents(self, sp: ShadowPage) -> None:
        """``kvm_mmu_mark_parents_unsync``."""
        for parent, index in sp.parents:
            self.mark(parent, index)

    def mark(self, parent: ShadowPage, index: int) -> None:
        """``mark_unsync``: note it in the parent; upwards only when the parent had nothing unsync yet."""
        bitmap = parent.unsync_child_bitmap
        if index in bitmap:
            return
        had = bool(bitmap)
        bitmap.add(index)
        if not had:
            self.mark_parents(parent)

    def unlink(self, sp: ShadowPage) -> None:
        """``kvm_unlink_unsync_page``: it is in step again, or goes away."""
        sp.unsync = False
        self._mmu.counters.mmu_unsync -= 1

    # --- finding -------------------------------------------------------------------------------------

    def gather(self, root: ShadowPage) -> list[_Found]:
        """``mmu_unsync_walk``: unsync leaf tables below, at most a batch; clears stale bits on the way."""
        if not root.unsync_child_bitmap:
            return []
        found: list[_Found] = []
        self._gather(root, (), found, [1])
        return found

    def _gather(
        self,
        sp: ShadowPage,
        path: tuple[tuple[ShadowPage, int], ...],
        found: list[_Found],
        count: list[int],
    ) -> int:
        """Leaf tables found below ``sp``, or -1 when the batch is full."""
        leaves = 0
        for index in sorted(sp.unsync_child_bitmap):
            child = sp.children.get(index)
            if child is None:
                sp.unsync_child_bitmap.discard(index)
                continue
            here = (*path, (sp, index))
            if child.unsync_child_bitmap:
                count[0] += 1
                if count[0] >= _BATCH:
                    return -1
                below = self._gather(child, here, found, count)
                if below < 0:
                    return -1
                if below == 0:
                    sp.unsync_child_bitmap.discard(index)
                leaves += below
            elif child.unsync:
                leaves += 1
                if all(each.sp is not child for each in found):
                    found.append(_Found(child, here))
                    count[0] += 1
                    if count[0] >= _BATCH:
                        return -1
            else:
                sp.unsync_child_bitmap.discard(index)
        return leaves

    def clear_path(self, path: tuple[tuple[ShadowPage, int], ...]) -> None:
        """``mmu_pages_clear_parents``: the bits that led to a page, as far up as nothing else is unsync."""
        for parent, index in reversed(path):
            parent.unsync_child_bitmap.discard(index)
            if parent.unsync_child_bitmap:
                break

    # --- getting into step ---------------------------------------------------------------------------

    def sync_children(self, vcpu: VcpuMmu, root: ShadowPage) -> None:
        """``mmu_sync_children``: bring everything below in step with the guest's tables."""
        mmu = self._mmu
        flush = False
        zapped: list[ShadowPage] = []
        while found := self.gather(root):
            protected = False
            for each in found:
                slot = mmu.memslots.lookup(each.sp.gfn)
                if slot is not None:
                    protected |= mmu.write_protect_gfn(slot, each.sp.gfn)
            if protected:
                mmu.shadow.flush_or_commit(zapped, flush=True)
                flush = False
            for each in found:
                self.unlink(each.sp)
                changed = self.sync_page(vcpu, each.sp)
                if changed is None:
                    mmu.shadow.prepare_zap(each.sp, zapped)
                else:
                    flush |= changed
                self.clear_path(each.path)
        mmu.shadow.flush_or_commit(zapped, flush=flush)

    def sync_page(self, vcpu: VcpuMmu, sp: ShadowPage) -> bool | None:
        """``__kvm_sync_page``: whether a flush is due; None if the page cannot be synchronised."""
        mmu = self._mmu
        if sp.direct or (sp.role ^ vcpu.root.role) & ~roles.SYNC_IGNORES:
            return None
        if mmu.journal is not None:
            mmu.journal.note(f"{sp} is synchronised with the guest's table", _RULE)
        flush = False
        for index in sorted(sp.spt):
            changed = self.sync_spte(vcpu, sp, index)
            if changed is None:
                return None
            flush |= changed
        return flush

    def sync_spte(self, vcpu: VcpuMmu, sp: ShadowPage, index: int) -> bool | None:
        """``FNAME(sync_spte)``: whether a flush is due; None if the guest's table cannot be read."""
        mmu = self._mmu
        old = sp.spt.get(index, 0)
        if not old:
            return False
        form = format_of(vcpu.control)
        slot = mmu.memslots.visible(sp.gfn)
        if slot is None:
            return None
        offset = (sp.role >> roles.QUADRANT_SHIFT & 3) * 512 if form.entry == 4 else 0
        gpte = read_entry(slot, sp.gfn, index + offset, form.entry)
        if invalid_for_prefetch(vcpu, gpte):
            mmu.shadow.drop_spte(sp, index)
            return True
        gfn = (gpte & (ADDRESS if form.entry == 8 else 0xFFFFF000)) >> 12
        access = sp.access & gpte_access(gpte)
        if not gpte & Pte.D:
            access &= ~roles.ACC_WRITE
        if old & spte.MMIO and not old & spte.MMU_PRESENT:
            # ``sync_mmio_spte``: cleared for another gfn, else written anew, with the generation of now.
            if old & spte.ADDRESS & ~spte.MMIO != gfn << 12:
                del sp.spt[index]
            else:
                sp.mmio_generation[index] = mmu.memslots.generations[0]
            return False
        if old & spte.ADDRESS != gfn << 12:
            mmu.shadow.drop_spte(sp, index)
            return True
        if not mmu.profile.sync_rebuilds_all and sp.shadowed_access.get(index) == access:
            return False
        sp.shadowed_access[index] = access
        target = mmu.memslots.lookup(gfn)
        if target is None:
            mmu.shadow.drop_spte(sp, index)
            return True
        new, _ = mmu.shadow.make_spte(
            sp,
            target,
            access,
            gfn,
            old,
            prefetch=True,
            synchronizing=True,
            host_writable=bool(old & spte.HOST_WRITABLE),
        )
        if not mmu.profile.flushes_on_ad_clear:
            new |= spte.A  # not for the sake of prefetching alone does A stay clear (section 8)
        sp.spt[index] = new
        return spte.needs_flush(old, new, ad_bits=mmu.profile.flushes_on_ad_clear)

    def refetch(self, vcpu: VcpuMmu, sp: ShadowPage, index: int) -> None:
        """[6.1] INVLPG on an unsync page: the SPTE goes, and the table's entry of now is prefetched, in slots
        that log as well, where a writable one marks its page (measured on a 6.1 host)."""
        mmu = self._mmu
        if mmu.shadow.zap_entry(sp, index):
            mmu.flush_remote_tlbs()
        form = format_of(vcpu.control)
        slot = mmu.memslots.visible(sp.gfn)
        if slot is None:
            return
        offset = (sp.role >> roles.QUADRANT_SHIFT & 3) * 512 if form.entry == 4 else 0
        gpte = read_entry(slot, sp.gfn, index + offset, form.entry)
        if invalid_for_prefetch(vcpu, gpte):
            return
        gfn = (gpte & (ADDRESS if form.entry == 8 else 0xFFFFF000)) >> 12
        access = sp.access & gpte_access(gpte)
        if not gpte & Pte.D:
            access &= ~roles.ACC_WRITE
        prefetch_leaf(vcpu, sp, index, gfn, access, logs_too=True)


def gpte_access(gpte: int) -> int:
    """ACC bits of a 4 KiB entry alone (``FNAME(gpte_access)``)."""
    return (gpte & (roles.ACC_WRITE | roles.ACC_USER)) | (not gpte >> 63 & 1)


def invalid_for_prefetch(vcpu: VcpuMmu, gpte: int) -> bool:
    """``FNAME(prefetch_invalid_gpte)``: an entry that no SPTE may be made from without an access."""
    return not gpte & _P or not gpte & _A or forbids_entry(vcpu.control, gpte)


__all__ = ["Unsync", "gpte_access", "invalid_for_prefetch"]
