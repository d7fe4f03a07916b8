"""Leaf SPTEs of shadow pages: building, setting, taking rights away through rmaps (kvm-mmu.md 8, 10.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.mmu import roles, spte
from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES, Memslot
from pykvm.model.mmu.outcomes import RetPf
from pykvm.model.mmu.shadow_page import NONLEAF, ShadowPage

if TYPE_CHECKING:
    from pykvm.model.mmu.vm import Mmu

_W, _U, _A, _D, _NX, _PS = spte.W, spte.U, spte.A, spte.D, spte.NX, spte.PS
_PRESENT, _HOST, _MMU = spte.MMU_PRESENT, spte.HOST_WRITABLE, spte.MMU_WRITABLE
_WRITABLE: Final = _W | _MMU
_PAGES: Final = ("", "pages_4k", "pages_2m", "pages_1g")


class ShadowSptes:
    """The leaf SPTEs of a VM's shadow pages, with the rmaps that find them again."""

    def __init__(self, mmu: Mmu) -> None:
        self.mmu = mmu
        self._counters = mmu.counters
        self._ad_flush = mmu.profile.flushes_on_ad_clear

    # --- one SPTE ------------------------------------------------------------------------------------

    def make_spte(
        self,
        sp: ShadowPage,
        slot: Memslot,
        access: int,
        gfn: int,
        old: int,
        *,
        prefetch: bool,
        synchronizing: bool,
        host_writable: bool,
    ) -> tuple[int, bool]:
        """``make_spte`` (section 8): the new SPTE, and whether it is write-protected though W was wanted.

        Marks the page dirty where the SPTE ends writable in a slot that logs.
        """
        new = spte.P | _PRESENT | gfn << 12
        if not prefetch:
            new |= _A
        level = sp.level
        if level > 1:
            new |= _PS
            if access & roles.ACC_EXEC and self.mmu.profile.nx_huge_pages:
                access &= ~roles.ACC_EXEC
        if not access & roles.ACC_EXEC:
            new |= _NX
        if access & roles.ACC_USER:
            new |= _U
        protected = False
        if host_writable:
            new |= _HOST
            if access & roles.ACC_WRITE:
                # An old SPTE that was writable had its page's shadow pages made unsync already.  Up to 6.12
                # make_spte left out D on that way, too, so that a read fault of a page that is mapped
                # writable clears D, which is a change and asks for a flush.
                if old & _W:
                    new |= _WRITABLE if self._ad_flush else _WRITABLE | _D
                elif self.mmu.unsync.try_to_unsync(slot, gfn, synchronizing=synchronizing, prefetch=prefetch):
                    new |= _WRITABLE | _D
                else:
                    protected = True
        if new & _W and slot.flags & LOG_DIRTY_PAGES:
            self.mmu.mark_page_dirty(slot, gfn)
        return new, protected

    def set_spte(
        self,
        sp: ShadowPage,
        index: int,
        slot: Memslot,
        access: int,
        gfn: int,
        *,
        write: bool,
        prefetch: bool,
        host_writable: bool,
    ) -> RetPf:
        """``mmu_set_spte``: install a leaf; WRITE_PROTECTED where a write must be emulated."""
        result = RetPf.FIXED
        flush = False
        mapped = False
        old = sp.spt.get(index, 0)
        if old & _PRESENT:
            if index in sp.children:
                self.mmu.shadow.drop_parent(sp.children[index], sp, index)
                flush = True
                old = 0
            elif old & spte.ADDRESS != gfn << 12:
                self.drop_spte(sp, index)
                flush = True
                old = 0
            else:
                mapped = True
        new, protected = self.make_spte(
            sp,
            slot,
            access,
            gfn,
            old,
            prefetch=prefetch,
            synchronizing=False,
            host_writable=host_writable,
        )
        if old == new:
            result = RetPf.SPURIOUS
        else:
            if mapped and spte.needs_flush(old, new, ad_bits=self._ad_flush):
                flush = True
            sp.spt[index] = new
        if protected and write:
            result = RetPf.WRITE_PROTECTED
        if flush:
            self.mmu.flush_remote_tlbs()
        if not sp.direct:
            sp.shadowed_access[index] = access
        if not mapped:
            self._rmap_add(sp, index, slot, gfn)
        if self.mmu.journal is not None and result is not RetPf.SPURIOUS:
            self.mmu.journal.note(f"SPTE {index:#x} of {sp} is {_words(new)}", "kvm-mmu.md 8")
        return result

    def drop_spte(self, sp: ShadowPage, index: int) -> None:
        """``drop_spte``: clear a leaf and take it out of its rmap; an MMIO SPTE is only cleared."""
        old = sp.spt.pop(index)
        if not old & _PRESENT:
            return
        level = sp.level
        counters = self._counters
        if level == 1:
            counters.pages_4k -= 1
        else:
            setattr(counters, _PAGES[level], getattr(counters, _PAGES[level]) - 1)
        gfn = (old & spte.ADDRESS) >> 12
        slot = self.mmu.memslots.lookup(gfn)
        if slot is not None and slot.rmap is not None:
            slot.rmap.remove(level, gfn, (sp, index))

    def _rmap_add(self, sp: ShadowPage, index: int, slot: Memslot, gfn: int) -> None:
        """``__rmap_add``: too many aliases are zapped, the new one included (10.4)."""
        counters = self._counters
        level = sp.level
        if level == 1:
            counters.pages_4k += 1
        else:
            setattr(counters, _PAGES[level], getattr(counters, _PAGES[level]) + 1)
        assert slot.rmap is not None
        before = slot.rmap.add(level, gfn, (sp, index))
        counters.max_mmu_rmap_size = max(counters.max_mmu_rmap_size, before)
        if before > self.mmu.profile.rmap_recycle_threshold:
            self.zap_rmap(slot, level, gfn)
            if self.mmu.journal is not None:
                self.mmu.journal.note(
                    f"all {before + 1} SPTEs of gfn {gfn:#x} are recycled", "kvm-mmu.md 10.4"
                )
            self.mmu.flush_remote_tlbs()

    def zap_rmap(self, slot: Memslot, level: int, gfn: int) -> bool:
        """Clear every leaf of a level that maps the gfn: whether there were any."""
        assert slot.rmap is not None
        entries = slot.rmap.entries(level, gfn)
        for sp, index in tuple(entries):
            self.drop_spte(sp, index)
        return bool(entries)

    # --- Tables: through the rmaps -------------------------------------------------------------------

    def write_protect_gfn(self, slot: Memslot, gfn: int, min_level: int = 1) -> bool:
        """Take W and MMU_WRITABLE from every leaf of ``min_level`` and above over the gfn."""
        if slot.rmap is None:
            return False
        flush = False
        for level in range(min_level, 4):
            for sp, index in slot.rmap.entries(level, gfn):
                old = sp.spt[index]
                if old & _WRITABLE:
                    sp.spt[index] = old & ~_WRITABLE
                    flush = True
        return flush

    def write_protect_masked(self, slot: Memslot, gfn: int, mask: int) -> None:
        """Take W alone from the 4 KiB leaves of the gfns that the mask names."""
        if slot.rmap is None:
            return
        head = slot.rmap.heads[1]
        while mask:
            bit = mask & -mask
            mask ^= bit
            for sp, index in head.get(gfn + bit.bit_length() - 1, ()):
                sp.spt[index] &= ~_W

    def clear_dirty_masked(self, slot: Memslot, gfn: int, mask: int) -> None:
        """With PML, pages of nested guests are write-protected instead of relying on D."""
        self.write_protect_masked(slot, gfn, mask)

    def write_protect_slot(self, slot: Memslot, min_level: int) -> None:
        """Take W from every leaf of the slot of ``min_level`` and above."""
        if slot.rmap is None:
            return
        for level in range(min_level, 4):
            for entries in slot.rmap.heads[level].values():
                for sp, index in entries:
                    sp.spt[index] &= ~_W

    def clear_dirty_slot(self, slot: Memslot) -> None:
        """As ``clear_dirty_masked``, for the whole slot."""
        self.write_protect_slot(slot, 1)

    def split_huge(self, slot: Memslot, first: int, last: int) -> None:
        """Nothing: shadow pages are not split eagerly (11.4)."""

    def recover_huge(self, slot: Memslot) -> bool:
        """Drop small leaves of direct pages that could be larger now (11.5)."""
        if slot.rmap is None:
            return False
        flush = False
        for level in (1, 2):
            for gfn, entries in tuple(slot.rmap.heads[level].items()):
                for sp, index in tuple(entries):
                    if sp.direct and self.mmu.shadow.possible_level(slot, gfn) > sp.level:
                        self.drop_spte(sp, index)
                        flush = True
        return flush

    def zap_range(self, slot: Memslot, first: int, last: int) -> bool:
        """Drop the leaves over gfns first to last: the host's memory changed under them (11.6)."""
        if slot.rmap is None:
            return False
        flush = False
        for level in (1, 2, 3):
            size = spte.PAGES_PER_LEVEL[level]
            for gfn in tuple(slot.rmap.heads[level]):
                if gfn <= last and first < gfn + size:
                    flush |= self.zap_rmap(slot, level, gfn)
        return flush


def _words(value: int) -> str:
    """A leaf in words."""
    if not value & _PRESENT:
        return "absent"
    facts = [f"gfn {(value & spte.ADDRESS) >> 12:#x}", "writable" if value & _W else "read-only"]
    if not value & _W:
        if not value & _HOST:
            facts.append("the host's page is not writable")
        elif not value & _MMU:
            facts.append("MMU-writable clear: tracked or shadowed")
        else:
            facts.append("MMU-writable: protected for logging")
    return ", ".join(facts)


__all__ = ["NONLEAF", "ShadowSptes"]
