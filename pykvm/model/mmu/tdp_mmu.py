"""The TDP MMU: second-stage page tables without shadow pages, rmaps or prefetch (kvm-mmu.md 11.1).

There is one root per address space, shared by the vCPUs.  A fault maps its gfn with the largest leaf that
host, slot and logging allow; logging and write-tracking visit the leaves of a slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.mmu import tdp_huge
from pykvm.model.mmu.direct_fault import DirectFault
from pykvm.model.mmu.outcomes import RetPf
from pykvm.model.mmu.spte import (
    ACCESS_TRACKED,
    AD_WRITE_PROTECT,
    GFN_SHIFT,
    HOST_WRITABLE,
    MMU_PRESENT,
    NX,
    PAGES_PER_LEVEL,
    PS,
    WRITE_BITS,
    A,
    D,
    P,
    U,
    W,
)
from pykvm.model.mmu.tdp_root import LARGEST_LEAF, TdpRoot

if TYPE_CHECKING:
    from pykvm.model.mmu.memslots import Memslot
    from pykvm.model.mmu.vm import Mmu

ROOT_LEVEL: Final = 4
_PAGES: Final = ("", "pages_4k", "pages_2m", "pages_1g")


class TdpMmu:
    """The TDP MMU of a VM (protocol ``Tables``)."""

    def __init__(self, mmu: Mmu) -> None:
        self.mmu = mmu
        profile = mmu.profile
        self.ad_bits = profile.walks_write_tables
        """``kvm_ad_enabled``: the second-stage tables have A and D bits."""
        self._roots: list[TdpRoot | None] = [None] * profile.address_spaces

    # --- roots ---------------------------------------------------------------------------------------

    def root(self, as_id: int = 0) -> TdpRoot:
        """``kvm_tdp_mmu_alloc_root``: the valid root of an address space, made if there is none."""
        root = self._roots[as_id]
        if root is None:
            root = self._roots[as_id] = TdpRoot(as_id, ROOT_LEVEL)
        return root

    def zap_all_fast(self) -> None:
        """Every root becomes invalid and its tables go away; their vCPUs flush when they take a new root, so
        that nothing is requested."""
        roots, self._roots = self._roots, [None] * len(self._roots)
        for root in roots:
            if root is not None:
                self._zap_root(root)

    def _zap_root(self, root: TdpRoot) -> None:
        root.invalid = True
        for level in range(1, LARGEST_LEAF + 1):
            self.count_pages(level, -len(root.leaves[level]))
            root.leaves[level].clear()
        root.mmio.clear()
        for tables in root.tables:
            self.mmu.counters.nx_lpage_splits -= sum(tables.values())
            tables.clear()

    # --- leaves --------------------------------------------------------------------------------------

    def count_pages(self, level: int, by: int) -> None:
        """``kvm_update_page_stats``: pages_4k, pages_2m and pages_1g."""
        counters = self.mmu.counters
        if level == 1:
            counters.pages_4k += by
        else:
            setattr(counters, _PAGES[level], getattr(counters, _PAGES[level]) + by)

    def set_leaf(self, root: TdpRoot, level: int, gfn: int, spte: int) -> None:
        """Write a leaf SPTE where there was none."""
        root.leaves[level][gfn >> 9 * (level - 1)] = spte
        self.count_pages(level, 1)

    def drop_leaf(self, root: TdpRoot, level: int, key: int) -> None:
        """Zap a leaf SPTE."""
        del root.leaves[level][key]
        self.count_pages(level, -1)

    def add_table(self, root: TdpRoot, level: int, gfn: int, *, nx_split: bool = False) -> None:
        """Link a new page table of ``level`` over the gfn."""
        root.tables[level][gfn >> 9 * level] = nx_split
        self.mmu.counters.nx_lpage_splits += nx_split

    def remove_table(self, root: TdpRoot, level: int, key: int) -> None:
        """``handle_removed_pt``: a page table goes with all below it; the flush is the caller's."""
        if level > 1:
            below = root.tables[level - 1]
            for child in [index for index in range(key << 9, key + 1 << 9) if index in below]:
                self.remove_table(root, level - 1, child)
        if level <= LARGEST_LEAF:
            for child in list(root.children(level, key)):
                self.drop_leaf(root, level, child)
        if level == 1 and root.mmio:
            for gfn in [gfn for gfn in root.mmio if gfn >> 9 == key]:
                del root.mmio[gfn]
        self.mmu.counters.nx_lpage_splits -= root.tables[level].pop(key)

    # --- faults --------------------------------------------------------------------------------------

    def map(self, fault: DirectFault) -> RetPf:
        """``kvm_tdp_mmu_map``: build what is missing above the goal level, then the leaf."""
        assert fault.slot is not None
        root = self.root(fault.slot.as_id)
        level = fault.goal_level
        if level > 1 or fault.gfn >> 9 not in root.tables[1]:
            level = self._step_down(root, fault)
        key = fault.gfn >> 9 * (level - 1)
        old = root.leaves[level].get(key, 0)
        if old and not self.mmu.profile.tdp_spurious_marks and fault.allowed_by(old):
            return RetPf.SPURIOUS
        root.mmio.pop(fault.gfn, None)
        spte, protected = self._make_spte(fault, level, old)
        if spte == old:
            result = RetPf.SPURIOUS
        else:
            result = RetPf.FIXED
            if old:
                root.leaves[level][key] = spte
            else:
                if level > 1 and key in root.tables[level - 1]:
                    self.remove_table(root, level - 1, key)
                    self.mmu.flush_remote_tlbs()
                root.leaves[level][key] = spte
                self.count_pages(level, 1)
            if self.mmu.journal is not None:
                self._note_leaf(fault, level, spte)
        if protected and fault.write:
            return RetPf.EMULATE if self.mmu.profile.counts_emulate_before_retry else RetPf.WRITE_PROTECTED
        return result

    def map_mmio(self, as_id: int, gfn: int, generation: int) -> None:
        """Write an MMIO SPTE for a gfn without a slot."""
        root = self.root(as_id)
        if gfn >> 9 not in root.tables[1]:
            self._step_down(root, DirectFault(gfn, 0, None))
        root.mmio[gfn] = generation

    def _step_down(self, root: TdpRoot, fault: DirectFault) -> int:
        """Create the page tables down to the goal level, taking huge leaves apart: the level to map at."""
        gfn = fault.gfn
        for level in range(root.level, 0, -1):
            below = level - 1
            if below == 0 or level == fault.goal_level:
                # disallowed_hugepage_adjust: what the NX mitigation took apart stays apart.
                if below == 0 or not root.tables[below].get(gfn >> 9 * below, False):
                    return level
                fault.goal_level = below
            if gfn >> 9 * below in root.tables[below]:
                continue
            nx_split = fault.huge_page_disallowed and fault.req_level >= level
            huge = root.leaves[level].get(gfn >> 9 * below, 0) if level <= LARGEST_LEAF else 0
            if not huge:
                self.add_table(root, below, gfn, nx_split=nx_split)
            elif self.mmu.profile.tdp_splits_in_place:
                tdp_huge.split(self, root, level, gfn >> 9 * below, nx_split=nx_split)
            else:
                self.drop_leaf(root, level, gfn >> 9 * below)
                self.mmu.flush_remote_tlbs()
                self.add_table(root, below, gfn, nx_split=nx_split)
        raise AssertionError("a walk ends at level 1")

    def _make_spte(self, fault: DirectFault, level: int, old: int) -> tuple[int, bool]:
        """``make_spte`` with all rights: the SPTE, and whether write-tracking kept it from being writable."""
        slot, mmu = fault.slot, self.mmu
        assert slot is not None
        gfn = fault.gfn & -PAGES_PER_LEVEL[level]
        spte = gfn << GFN_SHIFT | P | U | MMU_PRESENT
        if self.ad_bits:
            spte |= A
        if level > 1:
            spte |= PS
            if mmu.profile.nx_huge_pages:
                spte |= NX
        if not fault.map_writable:
            return spte, False
        spte |= HOST_WRITABLE
        if not old & W and mmu.page_track.is_tracked(slot, fault.gfn):
            return spte, True
        spte |= WRITE_BITS | D if self.ad_bits else WRITE_BITS
        if slot.flags & 1:
            mmu.mark_page_dirty(slot, fault.gfn)
        return spte, False

    def _note_leaf(self, fault: DirectFault, level: int, spte: int) -> None:
        assert self.mmu.journal is not None
        state = "writable" if spte & W else "read-only"
        self.mmu.journal.note(f"gfn {fault.gfn:#x} is mapped {state} at level {level}", "kvm-mmu.md 11.1")

    # --- logging and tracking (Tables) ---------------------------------------------------------------

    def _valid_root(self, slot: Memslot) -> TdpRoot | None:
        return self._roots[slot.as_id]

    def write_protect_gfn(self, slot: Memslot, gfn: int, min_level: int) -> bool:
        root = self._valid_root(slot)
        changed = False
        if root is not None:
            for level in range(min_level, LARGEST_LEAF + 1):
                key = gfn >> 9 * (level - 1)
                spte = root.leaves[level].get(key, 0)
                if spte & WRITE_BITS:
                    root.leaves[level][key] = spte & ~WRITE_BITS
                    changed = True
        return changed

    def write_protect_masked(self, slot: Memslot, gfn: int, mask: int) -> None:
        self._clear_masked(slot, gfn, mask, W)

    def clear_dirty_masked(self, slot: Memslot, gfn: int, mask: int) -> None:
        self._clear_masked(slot, gfn, mask, D)

    def _clear_masked(self, slot: Memslot, gfn: int, mask: int, bit: int) -> None:
        """Clear a bit of the 4 KiB leaves that the mask names; W where an entry asks for write protection."""
        root = self._valid_root(slot)
        if root is None:
            return
        small = root.small
        while mask:
            low = mask & -mask
            mask ^= low
            at = gfn + low.bit_length() - 1
            spte = small.get(at, 0)
            if spte:
                small[at] = spte & ~(W if spte & AD_WRITE_PROTECT else bit)

    def write_protect_slot(self, slot: Memslot, min_level: int) -> None:
        self._clear(slot, W, min_level)

    def clear_dirty_slot(self, slot: Memslot) -> None:
        self._clear(slot, D, 1)

    def _clear(self, slot: Memslot, bit: int, min_level: int) -> None:
        root = self._valid_root(slot)
        if root is None:
            return
        for level in range(min_level, LARGEST_LEAF + 1):
            leaves = root.leaves[level]
            for key in root.within(level, slot.base_gfn, slot.base_gfn + slot.npages - 1):
                spte = leaves[key]
                leaves[key] = spte & ~(W if bit == D and spte & AD_WRITE_PROTECT else bit)

    def split_huge(self, slot: Memslot, first: int, last: int) -> None:
        root = self._valid_root(slot)
        if root is None or last < first:
            return
        for level in (3, 2):
            for key in root.within(level, first, last):
                tdp_huge.split(self, root, level, key)

    def recover_huge(self, slot: Memslot) -> bool:
        root = self._valid_root(slot)
        return root is not None and tdp_huge.recover(self, root, slot)

    def zap_range(self, slot: Memslot, first: int, last: int) -> bool:
        root = self._valid_root(slot)
        flush = False
        if root is not None:
            for level in range(1, LARGEST_LEAF + 1):
                for key in root.within(level, first, last):
                    self.drop_leaf(root, level, key)
                    flush = True
        return flush

    def age(self, slot: Memslot, first: int, last: int) -> bool:
        """``kvm_tdp_mmu_age_gfn_range``: whether gfns first to last were accessed; from now on accesses are
        noted again: A is cleared, or without A bits all rights go until the next fault restores them."""
        root = self._valid_root(slot)
        young = False
        for level in range(1, LARGEST_LEAF + 1) if root is not None else ():
            assert root is not None
            leaves = root.leaves[level]
            for key in root.within(level, first, last):
                spte = leaves[key]
                if self.ad_bits:
                    young |= bool(spte & A)
                    leaves[key] = spte & ~A
                elif not spte & ACCESS_TRACKED:
                    young = True
                    leaves[key] = spte & ~(P | W) | ACCESS_TRACKED
        return young
