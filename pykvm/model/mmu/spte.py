"""Shadow page-table entries: their bits and what each combination means (kvm-mmu.md 8).

The layout is that of shadow paging and NPT for every kind of second-stage table: the model keeps facts, and
EPT differs in how it encodes them only.  An entry's address field holds the gfn that it maps rather than a
host frame, which the model does not have.

Three facts decide about writes, and they must not be confused:

* HOST_WRITABLE: the host's own mapping may be written.  Without it nothing below matters.
* MMU_WRITABLE: KVM's MMU may make the entry writable without asking anybody.  Cleared when the gfn is
  tracked (a shadowed table, an external user): only an emulated write may pass.
* W: the processor may write now.  Cleared for logging while MMU_WRITABLE stays set: the next write faults,
  is logged, and W is set again at once (by fast page fault where there is one).
"""

from __future__ import annotations

from typing import Final

P: Final = 1 << 0
W: Final = 1 << 1
U: Final = 1 << 2
A: Final = 1 << 5
D: Final = 1 << 6
PS: Final = 1 << 7
HOST_WRITABLE: Final = 1 << 9
MMU_WRITABLE: Final = 1 << 10
MMU_PRESENT: Final = 1 << 11
"""The only test for presence that KVM uses (software bit)."""
GFN_SHIFT: Final = 12
ADDRESS: Final = 0x000F_FFFF_FFFF_F000
MMIO: Final = 1 << 51
"""With P and without MMU_PRESENT: an MMIO SPTE of shadow paging or NPT; a fault on it has RSVD set."""
NX: Final = 1 << 63
ACCESS_TRACKED: Final = 1 << 54
"""Model's own: rights are taken away to learn of accesses, where tables have no A bit (EPT without A/D)."""
AD_WRITE_PROTECT: Final = 1 << 52
"""Model's own: write protection instead of D even though PML is on (A/D type 2: L2 SPTEs)."""

WRITE_BITS: Final = W | MMU_WRITABLE
PAGES_PER_LEVEL: Final = (0, 1, 1 << 9, 1 << 18, 1 << 27, 1 << 36)
"""4 KiB pages that a leaf of each level maps; index 0 is unused."""


def gfn_of(spte: int) -> int:
    """The gfn that a leaf maps (its first one for a huge leaf)."""
    return (spte & ADDRESS) >> GFN_SHIFT


def is_present(spte: int) -> bool:
    """Whether KVM takes the entry for present; MMIO SPTEs are not."""
    return bool(spte & MMU_PRESENT)


def is_valid(spte: int) -> bool:
    """Whether the three facts about writing go together: W needs MMU_WRITABLE, that needs HOST_WRITABLE."""
    if spte & W and not spte & MMU_WRITABLE:
        return False
    return not (spte & MMU_WRITABLE and not spte & HOST_WRITABLE)


def needs_flush(old: int, new: int, *, ad_bits: bool) -> bool:
    """Whether replacing a present leaf asks for a TLB flush (``mmu_spte_update``).

    It does when MMU_WRITABLE goes away: a stale writable translation would let an untracked write through,
    so the flush may not be late.  Losing W alone does not count: it happens for logging, whose caller
    flushes once before anybody reads the log.  ``ad_bits``: also when A or D is cleared (up to 6.12).
    """
    if old & MMU_WRITABLE and not new & MMU_WRITABLE:
        return True
    return bool(ad_bits and old & ~new & (A | D))
