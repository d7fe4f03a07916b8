"""What KVM knows of a fault on a guest-physical address while it works on it (``struct kvm_page_fault``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.mmu.spte import NX, P, W

if TYPE_CHECKING:
    from pykvm.model.mmu.memslots import Memslot

PRESENT: Final = 1 << 0
WRITE: Final = 1 << 1
USER: Final = 1 << 2
RSVD: Final = 1 << 3
FETCH: Final = 1 << 4
GUEST_FINAL: Final = 1 << 32
"""The fault is of the final access (kvm-mmu.md 7.1)."""
GUEST_PAGE: Final = 1 << 33
"""The fault is of an access to a guest page table."""


class DirectFault:
    """One fault of a direct map; ``error`` is the code of ``kvm_mmu_page_fault``."""

    __slots__ = (
        "fetch",
        "gfn",
        "goal_level",
        "huge_page_disallowed",
        "map_writable",
        "present",
        "req_level",
        "rsvd",
        "slot",
        "write",
    )

    def __init__(self, gfn: int, error: int, slot: Memslot | None) -> None:
        self.gfn = gfn
        self.slot = slot
        self.present = bool(error & PRESENT)
        self.write = bool(error & WRITE)
        self.fetch = bool(error & FETCH)
        self.rsvd = bool(error & RSVD)
        self.map_writable = False
        """The look-up of the host page ended with a writable one."""
        self.req_level = 1
        """The largest leaf that host and slot allow."""
        self.goal_level = 1
        """The level that is built: less than ``req_level`` where the NX mitigation wants small pages."""
        self.huge_page_disallowed = False
        """The NX mitigation forbids a huge page for this (executing) access."""

    def allowed_by(self, spte: int) -> bool:
        """``is_access_allowed``: whether an SPTE lets the access pass."""
        if self.fetch:
            return bool(spte & P) and not spte & NX
        if self.write:
            return bool(spte & W)
        return bool(spte & P)
