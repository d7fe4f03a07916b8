"""Huge pages of the TDP MMU: taking them apart, and putting them together again (kvm-mmu.md 11.4, 11.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.mmu.spte import ADDRESS, GFN_SHIFT, NX, PAGES_PER_LEVEL, PS
from pykvm.model.mmu.tdp_root import ENTRIES

if TYPE_CHECKING:
    from pykvm.model.mmu.memslots import Memslot
    from pykvm.model.mmu.tdp_mmu import TdpMmu
    from pykvm.model.mmu.tdp_root import TdpRoot


def split(tdp: TdpMmu, root: TdpRoot, level: int, key: int, *, nx_split: bool = False) -> None:
    """``tdp_mmu_split_huge_page``: 512 leaves of the next level with the same rights, W and D included.

    Nothing is flushed: a stale translation allows nothing that the new entries do not.
    """
    huge = root.leaves[level][key]
    below = level - 1
    child = huge & ~(PS if below == 1 else 0)
    if below == 1:
        child &= ~NX  # small pages may be executed, whatever the NX mitigation wants of huge ones
    step = PAGES_PER_LEVEL[below] << GFN_SHIFT
    leaves = root.leaves[below]
    for index in range(ENTRIES):
        leaves[(key << 9) + index] = child + index * step
    tdp.count_pages(below, ENTRIES)
    tdp.drop_leaf(root, level, key)
    tdp.add_table(root, below, key << 9 * below, nx_split=nx_split)
    journal = tdp.mmu.journal
    if journal is not None:
        journal.note(
            f"the huge page of level {level} at gfn {key << 9 * below:#x} is split", "kvm-mmu.md 11.4"
        )


def recover(tdp: TdpMmu, root: TdpRoot, slot: Memslot) -> bool:
    """Logging ended: page tables over ranges that could be huge go away; whether the caller is to flush."""
    last = slot.base_gfn + slot.npages - 1
    changed = False
    for level in (3, 2):
        for key in root.tables_within(level - 1, slot.base_gfn, last):
            if key not in root.tables[level - 1]:
                continue
            gfn = key << 9 * (level - 1)
            if tdp.mmu.shadow.possible_level(slot, gfn) < level:
                continue
            if not tdp.mmu.profile.tdp_recovers_in_place:
                tdp.remove_table(root, level - 1, key)
                tdp.mmu.flush_remote_tlbs()
                continue
            small = _first_leaf(root, level - 1, key)
            if small is None:
                continue
            huge = (small | PS) & ~ADDRESS | gfn << GFN_SHIFT
            if tdp.mmu.profile.nx_huge_pages:
                huge |= NX
            tdp.remove_table(root, level - 1, key)
            tdp.set_leaf(root, level, gfn, huge)
            changed = True
    return changed


def _first_leaf(root: TdpRoot, level: int, key: int) -> int | None:
    """The leaf of the lowest gfn below the page table ``key`` of ``level``."""
    for index in range(key << 9, key + 1 << 9):
        spte = root.leaves[level].get(index)
        if spte is None and level > 1 and index in root.tables[level - 1]:
            spte = _first_leaf(root, level - 1, index)
        if spte is not None:
            return spte
    return None
