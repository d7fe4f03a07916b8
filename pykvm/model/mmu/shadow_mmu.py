"""The life of shadow pages: found or made, linked, zapped, recycled (kvm-mmu.md 10.3, 7.5)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pykvm.errors import KvmError
from pykvm.model.mmu import roles, spte
from pykvm.model.mmu.memslots import Memslot
from pykvm.model.mmu.rmap import Rmap
from pykvm.model.mmu.shadow_page import NONLEAF, ShadowPage
from pykvm.model.mmu.shadow_sptes import ShadowSptes

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu
    from pykvm.model.mmu.vm import Mmu

MIN_PAGES: Final = 64
"""KVM_MIN_ALLOC_MMU_PAGES."""
_MIN_FREE: Final = 5
_REFILL: Final = 25
_PERMILLE: Final = 20
_GOLDEN: Final = 0x61C8864680B583EB
_HASH_BITS: Final = 12
_FLOODED: Final = 3
_RULE: Final = "kvm-mmu.md 10.3"


class ShadowMmu(ShadowSptes):
    """All shadow pages of a VM."""

    def __init__(self, mmu: Mmu) -> None:
        super().__init__(mmu)
        self.uses_rmaps = not (mmu.profile.tdp and mmu.profile.tdp_mmu)
        """Whether slots have rmaps: always without the TDP MMU, else from the first shadow root on."""
        self._buckets: dict[int, list[ShadowPage]] = {}
        self.by_gfn: dict[int, list[ShadowPage]] = {}
        """Indirect shadow pages of each gfn, newest first."""
        self.active: dict[ShadowPage, None] = {}
        """``active_mmu_pages``, oldest first."""
        self.indirect_pages = 0
        """``indirect_shadow_pages``: whether any guest table is shadowed."""
        self.used = 0
        """``n_used_mmu_pages``."""
        self.limit = MIN_PAGES
        """``n_max_mmu_pages``."""
        self.requested = False
        """KVM_SET_NR_MMU_PAGES was used: the limit follows the slots no more."""
        self.generation = 0

    # --- looking up and making -----------------------------------------------------------------------

    def get_page(self, vcpu: VcpuMmu, gfn: int, role: int) -> ShadowPage:
        """``kvm_mmu_get_shadow_page``: the page of that gfn and role, made if need be."""
        zapped: list[ShadowPage] = []
        sp = self._find(vcpu, gfn, role, zapped)
        if zapped:
            self.commit(zapped)
        return self._make(gfn, role) if sp is None else sp

    def _find(self, vcpu: VcpuMmu, gfn: int, role: int, zapped: list[ShadowPage]) -> ShadowPage | None:
        mmu = self.mmu
        collisions = 0
        found = None
        for sp in tuple(self._buckets.get(_bucket(gfn), ())):
            if sp.invalid or sp.generation != self.generation:
                continue
            if sp.gfn != gfn:
                collisions += 1
                continue
            if sp.role != role:
                # A gfn that is used for an upper level from now on is tracked: it cannot stay unsync.
                if role & roles.LEVEL > 1 and sp.unsync:
                    self.prepare_zap(sp, zapped)
                continue
            if sp.direct:
                found = sp
                break
            if sp.unsync:
                # Its contents must be right before it is linked; it stays unsync, so no write protection.
                changed = mmu.unsync.sync_page(vcpu, sp)
                if changed is None:
                    self.prepare_zap(sp, zapped)
                    break
                if changed:
                    mmu.flush_remote_tlbs()
            sp.write_flooding_count = 0
            found = sp
            break
        if found is None:
            mmu.counters.mmu_cache_miss += 1
        if collisions > mmu.counters.max_mmu_page_hash_collisions:
            mmu.counters.max_mmu_page_hash_collisions = collisions
        return found

    def _make(self, gfn: int, role: int) -> ShadowPage:
        mmu = self.mmu
        sp = ShadowPage(gfn, role, self.generation)
        self._buckets.setdefault(_bucket(gfn), []).insert(0, sp)
        self.active[sp] = None
        self.used += 1
        mmu.counters.mmu_shadow_pages += 1
        if mmu.journal is not None:
            mmu.journal.note(f"{sp} is made", _RULE)
        if not sp.direct:
            self.by_gfn.setdefault(gfn, []).insert(0, sp)
            self._account(sp)
        return sp

    def _account(self, sp: ShadowPage) -> None:
        """``account_shadowed``: from now on the guest's writes to its table are seen."""
        mmu = self.mmu
        self.indirect_pages += 1
        slot = mmu.memslots.lookup(sp.gfn)
        if slot is None:
            return
        if sp.level > 1:
            mmu.page_track.add(slot, sp.gfn)
            return
        slot.change_lpage(sp.gfn, 1)
        if mmu.write_protect_gfn(slot, sp.gfn):
            mmu.flush_remote_tlbs()

    def _unaccount(self, sp: ShadowPage) -> None:
        """``unaccount_shadowed``."""
        mmu = self.mmu
        self.indirect_pages -= 1
        slot = mmu.memslots.lookup(sp.gfn)
        if slot is None:
            return
        if sp.level > 1:
            mmu.page_track.remove(slot, sp.gfn)
        else:
            slot.change_lpage(sp.gfn, -1)

    def child(
        self, vcpu: VcpuMmu, parent: ShadowPage, index: int, gfn: int, access: int, *, direct: bool
    ) -> ShadowPage | None:
        """``kvm_mmu_get_child_sp``: the table to link below an entry; None where one is linked already."""
        if index in parent.children:
            return None
        return self.get_page(vcpu, gfn, roles.child_role(parent.role, access, index, direct=direct))

    def link(self, parent: ShadowPage, index: int, child: ShadowPage) -> None:
        """``link_shadow_page``: a large leaf in the way is dropped first."""
        if parent.spt.get(index, 0) & spte.MMU_PRESENT:
            self.drop_spte(parent, index)
            self.mmu.flush_remote_tlbs()
        parent.spt[index] = NONLEAF
        parent.children[index] = child
        child.parents[parent, index] = None
        if child.unsync or child.unsync_child_bitmap:
            self.mmu.unsync.mark(parent, index)

    def drop_parent(self, child: ShadowPage, parent: ShadowPage, index: int) -> None:
        """``drop_parent_pte``: unlink a child, which stays in the hash."""
        del child.parents[parent, index]
        del parent.children[index]
        del parent.spt[index]

    def account_nx_huge_page(self, sp: ShadowPage, *, possible: bool) -> None:
        """``account_nx_huge_page``: the direct page was made for an executing access under the mitigation;
        ``possible`` if a huge page could have taken its place."""
        sp.nx_huge_page_disallowed = True
        if possible and not sp.nx_split:
            sp.nx_split = True
            self.mmu.counters.nx_lpage_splits += 1

    def possible_level(self, slot: Memslot, gfn: int) -> int:
        """The largest leaf that slot and host allow at a gfn."""
        host = slot.host.level(gfn - slot.base_gfn)
        most = min(host, 3 if self.mmu.profile.pages_1g else 2)
        while most > 1 and slot.lpage_disallowed(gfn, most):
            most -= 1
        return most

    # --- zapping -------------------------------------------------------------------------------------

    def is_obsolete(self, sp: ShadowPage) -> bool:
        """``is_obsolete_sp``."""
        return sp.invalid or sp.generation != self.generation

    def zap_entry(self, sp: ShadowPage, index: int) -> bool:
        """``mmu_page_zap_pte``: clear one SPTE, unlinking what is below: whether it was present."""
        child = sp.children.get(index)
        if child is not None:
            self.drop_parent(child, sp, index)
            return True
        old = sp.spt.get(index, 0)
        if not old:
            return False
        self.drop_spte(sp, index)
        return bool(old & spte.MMU_PRESENT)

    def prepare_zap(self, sp: ShadowPage, zapped: list[ShadowPage]) -> int:
        """``__kvm_mmu_prepare_zap_page``: how many pages it takes along, itself included.

        Pages go to ``zapped``, to be committed; a page that is a vCPU's root only becomes invalid.
        """
        mmu = self.mmu
        mmu.counters.mmu_shadow_zapped += 1
        if mmu.journal is not None:
            mmu.journal.note(f"{sp} is zapped", _RULE)
        count = self._zap_unsync_children(sp, zapped) if mmu.profile.zaps_unsync_children else 0
        for index in tuple(sp.spt):
            self.zap_entry(sp, index)
        for parent, index in tuple(sp.parents):
            self.drop_parent(sp, parent, index)
        if not sp.invalid and not sp.direct:
            self._unaccount(sp)
        if sp.unsync:
            mmu.unsync.unlink(sp)
        if sp.root_count:
            self.active.pop(sp, None)
            if not self.is_obsolete(sp):
                self.request_free_obsolete_roots()
        else:
            count += 1
            self.active.pop(sp, None)
            zapped.append(sp)
            self.used -= 1
        if sp.nx_split:
            sp.nx_split = False
            mmu.counters.nx_lpage_splits -= 1
        sp.invalid = True
        return count

    def _zap_unsync_children(self, sp: ShadowPage, zapped: list[ShadowPage]) -> int:
        if sp.level == 1:
            return 0
        count = 0
        while found := self.mmu.unsync.gather(sp):
            for each in found:
                self.prepare_zap(each.sp, zapped)
                self.mmu.unsync.clear_path(each.path)
                count += 1
        return count

    def request_free_obsolete_roots(self) -> None:
        """KVM_REQ_MMU_FREE_OBSOLETE_ROOTS on every vCPU."""
        for vcpu in self.mmu.vcpus:
            vcpu.request_free_obsolete_roots()

    def commit(self, zapped: list[ShadowPage]) -> None:
        """``kvm_mmu_commit_zap_page``: one flush for all, then they are gone."""
        if not zapped:
            return
        self.mmu.flush_remote_tlbs()
        for sp in zapped:
            self._forget(sp)
        zapped.clear()

    def flush_or_commit(self, zapped: list[ShadowPage], *, flush: bool) -> None:
        """``kvm_mmu_remote_flush_or_zap``."""
        if zapped:
            self.commit(zapped)
        elif flush:
            self.mmu.flush_remote_tlbs()

    def _forget(self, sp: ShadowPage) -> None:
        """The page is freed."""
        self.mmu.counters.mmu_shadow_pages -= 1
        bucket = self._buckets[_bucket(sp.gfn)]
        bucket.remove(sp)
        if not bucket:
            del self._buckets[_bucket(sp.gfn)]
        if not sp.direct:
            pages = self.by_gfn[sp.gfn]
            pages.remove(sp)
            if not pages:
                del self.by_gfn[sp.gfn]

    def release_root(self, sp: ShadowPage, zapped: list[ShadowPage]) -> None:
        """``mmu_free_root_page``: one cached root fewer; an invalid page goes with the last."""
        sp.root_count -= 1
        if not sp.root_count and sp.invalid:
            self.prepare_zap(sp, zapped)

    def zap_all_fast(self) -> None:
        """``kvm_mmu_zap_all_fast``: every page is obsolete at once and goes one after another."""
        self.generation ^= 1
        self.request_free_obsolete_roots()
        zapped: list[ShadowPage] = []
        for sp in tuple(self.active):
            if not sp.invalid:
                self.prepare_zap(sp, zapped)
        self.commit(zapped)

    def zap_memslot_pages(self, slot: Memslot, *, flush: bool) -> None:
        """``kvm_mmu_zap_memslot_pages_and_flush``: the shadow pages of the slot's tables, whose counts go
        with it; instead of ``zap_all_fast`` without the quirk SLOT_ZAP_ALL (section 2)."""
        zapped: list[ShadowPage] = []
        for gfn in sorted(gfn for gfn in self.by_gfn if slot.contains(gfn)):
            for sp in tuple(self.by_gfn[gfn]):
                if not self.is_obsolete(sp):
                    self.prepare_zap(sp, zapped)
        self.flush_or_commit(zapped, flush=flush)

    def unprotect_gfn(self, gfn: int) -> bool:
        """``kvm_mmu_unprotect_page``: zap every shadow page of a gfn, so that it may be written natively.

        Whether one was zapped for good: a vCPU's root only becomes invalid and does not count.
        """
        zapped: list[ShadowPage] = []
        for sp in tuple(self.by_gfn.get(gfn, ())):
            if not self.is_obsolete(sp):
                self.prepare_zap(sp, zapped)
        found = bool(zapped)
        self.commit(zapped)
        return found

    # --- the budget ----------------------------------------------------------------------------------

    def memory_resized(self) -> None:
        """Slots came or went: the default limit is a fiftieth of their pages (7.5)."""
        if not self.requested:
            self.change_limit(max(self.mmu.memslots.npages * _PERMILLE // 1000, MIN_PAGES))

    def change_limit(self, limit: int) -> None:
        """``kvm_mmu_change_mmu_pages``: a smaller limit zaps the oldest pages at once."""
        if self.used > limit:
            self._zap_oldest(self.used - limit)
            limit = self.used
        self.limit = limit

    def make_available(self) -> None:
        """``make_mmu_pages_available``: room for a fault's pages.

        Raises KvmError (ENOSPC), with which KVM_RUN fails, where only active roots are left.
        """
        free = self.limit - self.used
        if free >= _MIN_FREE:
            return
        self._zap_oldest(_REFILL - max(free, 0))
        if self.limit <= self.used:
            raise KvmError(
                errno.ENOSPC,
                "KVM_RUN",
                f"all {self.limit} shadow pages are roots in use; allow more with KVM_SET_NR_MMU_PAGES.",
            )

    def _zap_oldest(self, wanted: int) -> int:
        """``kvm_mmu_zap_oldest_mmu_pages``: active roots are passed over."""
        zapped: list[ShadowPage] = []
        total = 0
        progress = True
        while progress and total < wanted:
            progress = False
            for sp in tuple(self.active):
                if sp.root_count or sp not in self.active:
                    continue
                total += self.prepare_zap(sp, zapped)
                progress = True
                if total >= wanted:
                    break
        self.commit(zapped)
        self.mmu.counters.mmu_recycled += total
        return total

    # --- rmaps of a host with the TDP MMU ------------------------------------------------------------

    def first_shadow_root(self) -> None:
        """``mmu_first_shadow_root_alloc``: from now on slots have rmaps and write-track counts."""
        if self.mmu.page_track.shadow_root_allocated:
            return
        self.mmu.page_track.shadow_root_allocated = True
        self.uses_rmaps = True
        for slot in self.mmu.memslots.all():
            if slot.rmap is None:
                slot.rmap = Rmap()
        self.mmu.page_track.allocate_all()


def flooded(sp: ShadowPage) -> bool:
    """``detect_write_flooding``: the third write without a walk through the page; leaf tables are exempt."""
    if sp.level == 1:
        return False
    sp.write_flooding_count += 1
    return sp.write_flooding_count >= _FLOODED


def _bucket(gfn: int) -> int:
    """``hash_64(gfn, KVM_MMU_HASH_SHIFT)``."""
    return (gfn * _GOLDEN & 0xFFFFFFFFFFFFFFFF) >> 64 - _HASH_BITS
