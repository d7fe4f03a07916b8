"""What the VM-wide parts of the MMU ask of whatever holds SPTEs: the shadow MMU and the TDP MMU."""

from __future__ import annotations

from typing import Protocol

from pykvm.model.mmu.memslots import Memslot


class Tables(Protocol):
    """Holders of SPTEs.  gfns are the guest's; a returned True asks the caller for a TLB flush."""

    def write_protect_gfn(self, slot: Memslot, gfn: int, min_level: int) -> bool:
        """``kvm_mmu_slot_gfn_write_protect``: take W and MMU_WRITABLE from every leaf of ``min_level`` and
        above that maps the gfn, in the slot's address space."""

    def write_protect_masked(self, slot: Memslot, gfn: int, mask: int) -> None:
        """Take W (not MMU_WRITABLE) from the 4 KiB leaves of gfn + bit for every set bit of ``mask``."""

    def clear_dirty_masked(self, slot: Memslot, gfn: int, mask: int) -> None:
        """Clear D of the 4 KiB leaves (PML); W where an entry asks for write protection instead."""

    def write_protect_slot(self, slot: Memslot, min_level: int) -> None:
        """Logging begins without PML: take W from every leaf of the slot from ``min_level`` on."""

    def clear_dirty_slot(self, slot: Memslot) -> None:
        """Logging begins with PML: clear D of the slot's 4 KiB leaves."""

    def split_huge(self, slot: Memslot, first: int, last: int) -> None:
        """Eager page split of the leaves over gfns first to last (both included); the TDP MMU's only."""

    def recover_huge(self, slot: Memslot) -> bool:
        """Logging ended: make huge mappings possible again (11.5)."""

    def zap_all_fast(self) -> None:
        """``kvm_mmu_zap_all_fast``: a slot went away or moved; every mapping is obsolete."""

    def zap_range(self, slot: Memslot, first: int, last: int) -> bool:
        """An MMU notifier: the host memory behind gfns first to last changed (11.6)."""
