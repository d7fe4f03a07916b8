"""KVM_GET_DIRTY_LOG that clears and re-protects in one go (api.rst 4.8)."""

from __future__ import annotations

from pykvm.machine import DirtyPages, Machine, Vcpu
from pykvm.track.logging_slots import SlotLogging


class BitmapTracker(SlotLogging):
    """The oldest way: one bitmap a slot; fetching it re-arms every page that was set.

    Needs nothing of the host.  Costs a walk over the bitmap of every slot per collection, and one fault
    per page and round.
    """

    name = "bitmap"

    def prepare(self, machine: Machine) -> None:
        """Nothing: bitmaps are KVM's default."""

    def on_ring_full(self, vcpu: Vcpu) -> None:
        """Never happens: there are no rings."""

    def collect(self, *, final: bool = False) -> DirtyPages:
        if final:
            self.kick_vcpus()
        machine = self.machine
        return DirtyPages({slot.id: machine.get_dirty_log(slot) for slot in self.slots})

    def rearm(self, pages: DirtyPages) -> None:
        """Nothing: fetching re-armed them."""
