"""KVM_GET_DIRTY_LOG that clears and re-protects in one go (api.rst 4.8)."""

from __future__ import annotations

from pykvm.machine import DirtyPages, Gfns, Machine, Vcpu
from pykvm.track.logging_slots import SlotLogging


class BitmapTracker(SlotLogging):
    """The oldest way: one bitmap a slot; fetching it re-arms every page that was set.

    Needs nothing of the host.  Costs a walk over the bitmap of every slot per collection, and one fault
    per page and round.
    """

    name = "bitmap"

    def __init__(self) -> None:
        super().__init__()
        self._fetched = DirtyPages()
        """What a collection that failed halfway had fetched: KVM does not tell it again."""

    def prepare(self, machine: Machine) -> None:
        """Nothing: bitmaps are KVM's default."""

    def on_ring_full(self, vcpu: Vcpu) -> None:
        """Never happens: there are no rings."""

    def collect(self, *, final: bool = False) -> DirtyPages:
        if final:
            self.kick_vcpus()
        machine = self.machine
        pages: dict[int, Gfns] = {}
        try:
            for slot in self.slots:
                pages[slot.id] = machine.get_dirty_log(slot)
        except BaseException:
            self._fetched |= DirtyPages(pages)
            raise
        fetched, self._fetched = self._fetched, DirtyPages()
        return fetched | DirtyPages(pages)

    def rearm(self, pages: DirtyPages) -> None:
        """Nothing: fetching re-armed them."""

    def disarm(self) -> None:
        """Stop logging; what was not collected is lost."""
        super().disarm()
        self._fetched = DirtyPages()
