"""Page write-tracking as a machine offers it to users outside of its MMU (docs/reference/kvm-mmu.md, 9).

The names are the kernel's: ``kvm_write_track_add_gfn``, ``kvm_page_track_register_notifier`` and the node's
``track_write`` and ``track_remove_region``.  A machine that cannot track pages does not have these methods;
``pykvm.track.write_track`` then does the same with read-only slots.
"""

from __future__ import annotations

from typing import Final, Protocol, runtime_checkable

from pykvm.machine.protocols import Machine

MAX_TRACK_COUNT: Final = 65535
"""``gfn_write_track`` counts in 16 bits (kvm-mmu.md 9)."""


class TrackNode(Protocol):
    """Somebody who wants to know of writes: ``struct kvm_page_track_notifier_node``.

    Both methods are called on the thread that caused them, so ``track_write`` on that of the vCPU that wrote,
    with no lock held that they could need: they may add and remove gfns, register and unregister.
    """

    def track_write(self, gpa: int, new: bytes) -> None:
        """The guest wrote ``new`` at ``gpa``, within one page; its memory has changed already."""

    def track_remove_region(self, gfn: int, pages: int) -> None:
        """A slot of ``pages`` from ``gfn`` on goes away there: its counts are gone, forget its pages."""


@runtime_checkable
class PageTracking(Protocol):
    """A machine that tracks writes page by page."""

    def track_add_gfn(self, gfn: int) -> None:
        """Track the page: once this returns, no write to it stays unreported.  Everybody counts together.

        Raises SlotAbsentError (EINVAL) for a gfn without a slot, UsageError beyond MAX_TRACK_COUNT.
        """

    def track_remove_gfn(self, gfn: int) -> None:
        """Undo one ``track_add_gfn``; the last one ends the tracking.

        Raises SlotAbsentError (EINVAL) for a gfn without a slot, UsageError for one that is not tracked.
        """

    def register_track_notifier(self, node: TrackNode) -> None:
        """Have ``node`` called from now on, before those that were registered earlier.

        ``track_write`` may be called for pages that are not tracked, too: the node filters (kvm-mmu.md 9).
        Raises UsageError for a node that is registered.
        """

    def unregister_track_notifier(self, node: TrackNode) -> None:
        """The node is not called any more once this returns; its counts stay.  UsageError if it was not."""


class TrackingMachine(Machine, PageTracking, Protocol):
    """A machine with page tracking."""
