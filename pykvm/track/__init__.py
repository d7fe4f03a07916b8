"""Ways to learn what a guest wrote, behind one protocol.

``prepare`` before the machine has vCPUs, ``arm`` when logging shall begin, then ``collect`` and ``rearm``
as often as wanted, ``disarm`` at the end.
"""

from __future__ import annotations

from typing import Protocol

from pykvm.errors import UsageError
from pykvm.machine import DirtyPages, Machine, Vcpu
from pykvm.track.bitmap import BitmapTracker
from pykvm.track.manual import ManualTracker
from pykvm.track.pagemap import PagemapTracker
from pykvm.track.ring import RingTracker
from pykvm.track.userfaultfd import UserfaultfdTracker

TRACKERS = ("bitmap", "manual", "ring")
"""What KVM itself logs."""
HOST_TRACKERS = ("userfaultfd", "pagemap")
"""What the host's page tables tell: writes by devices, too (docs/write-tracking.md)."""


class RingFullHandler(Protocol):
    """Whatever runs the vCPUs and lets a tracker empty a full ring: GuestRunner."""

    on_ring_full: object


class Tracker(Protocol):
    """One way to learn which pages a guest wrote."""

    @property
    def name(self) -> str: ...

    def prepare(self, machine: Machine) -> None:
        """Switch the machine to this way of logging; before its first vCPU and slot.

        Raises CapabilityError, RingSizeError, RingOrderError.
        """

    def on_ring_full(self, vcpu: Vcpu) -> None:
        """To be called by a vCPU's thread after DirtyRingFull, before it runs on."""

    def arm(self, machine: Machine) -> None:
        """Start logging on every writable slot.  What was written before is not reported."""

    def collect(self, *, final: bool = False) -> DirtyPages:
        """The pages written since the last collection (a superset: KVM may report more, never fewer).

        ``final`` kicks running vCPUs out of the guest first, so that nothing waits in a processor's
        buffer (api.rst 8.29); use it when the vCPUs are paused and the last pages are wanted.
        """

    def rearm(self, pages: DirtyPages) -> None:
        """After this the contents of ``pages`` may be read: a later write is reported again."""

    def disarm(self) -> None:
        """Stop logging; what was not collected is lost."""


def make_tracker(
    name: str, *, ring_entries: int = 4096, clear_chunk: int | None = None, initially_set: bool = False
) -> Tracker:
    """The tracker of that name: one of TRACKERS or HOST_TRACKERS.

    ``ring_entries``: per vCPU.  ``clear_chunk``: pages per KVM_CLEAR_DIRTY_LOG of the manual tracker (a
    multiple of 64; None: as few calls as possible).  ``initially_set``: the manual tracker's bitmaps start
    all ones, so the first collection reports every page.  Raises UsageError.
    """
    if name == "bitmap":
        return BitmapTracker()
    if name == "manual":
        return ManualTracker(clear_chunk=clear_chunk, initially_set=initially_set)
    if name == "ring":
        return RingTracker(ring_entries)
    if name == "userfaultfd":
        return UserfaultfdTracker()
    if name == "pagemap":
        return PagemapTracker()
    names = ", ".join((*TRACKERS, *HOST_TRACKERS))
    raise UsageError(f"Tracker {name!r} does not exist; use one of: {names}.")


__all__ = [
    "HOST_TRACKERS",
    "TRACKERS",
    "BitmapTracker",
    "ManualTracker",
    "PagemapTracker",
    "RingTracker",
    "Tracker",
    "UserfaultfdTracker",
    "make_tracker",
]
