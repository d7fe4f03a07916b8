"""The dirty ring: the pages come to the collector instead of being searched for (api.rst 8.29)."""

from __future__ import annotations

import contextlib
import threading

from pykvm.errors import RingOverflowError, UsageError
from pykvm.machine import DirtyPages, Machine, Vcpu
from pykvm.track.logging_slots import SlotLogging


class RingTracker(SlotLogging):
    """One ring a vCPU, ``entries`` (a power of two, 256 to 65536 on x86) each.

    The cost follows the dirty pages, not the memory.  A vCPU whose ring is full stops until its entries are
    collected: its thread does that itself (``on_ring_full``) while the others go on, and what it took waits
    for the next ``collect``.  Raises RingOverflowError once a ring has lost entries, and ever after.
    """

    name = "ring"

    def __init__(self, entries: int = 4096) -> None:
        super().__init__()
        if entries <= 0 or entries & (entries - 1):
            raise UsageError(
                f"A ring of {entries} entries: the number must be a power of two (256 to 65536)."
            )
        self.entries = entries
        self.stale = 0
        """Entries dropped so far because their slot was deleted or moved."""
        self._rings: Machine | None = None
        self._lock = threading.Lock()
        self._taken = DirtyPages()

    def prepare(self, machine: Machine) -> None:
        machine.enable_dirty_ring(self.entries)
        self._rings = machine

    def arm(self, machine: Machine) -> None:
        if not machine.ring_entries:
            raise UsageError("The machine has no dirty rings; call prepare(machine) before its first vCPU.")
        machine.collect_rings()
        with self._lock:
            self._rings = machine
            self._taken = DirtyPages()  # a vCPU may have filled its ring once more after ``disarm``
        super().arm(machine)

    def on_ring_full(self, vcpu: Vcpu) -> None:
        """Empty the full ring from its own thread; the pages go out with the next ``collect``.

        An overflow does not stop the guest: the ring is emptied, and the next ``collect`` raises.
        """
        with contextlib.suppress(RingOverflowError):
            self._take([vcpu])

    def collect(self, *, final: bool = False) -> DirtyPages:
        if self._machine is None:
            raise UsageError("The tracker is not armed; call arm(machine) first.")
        if final:
            self.kick_vcpus()
        self._take(None)
        with self._lock:
            taken, self._taken = self._taken, DirtyPages()
        return taken

    def _take(self, vcpus: list[Vcpu] | None) -> None:
        # One lock around both: otherwise pages could sit between the harvest and ``_taken`` while a final
        # collection returns without them.
        with self._lock:
            if self._rings is not None:
                harvest = self._rings.collect_rings(vcpus)
                self._taken |= harvest.pages
                self.stale += harvest.stale

    def rearm(self, pages: DirtyPages) -> None:
        """Nothing: the reset re-armed them before they were handed out."""

    def disarm(self) -> None:
        """Stop logging and empty the rings, so that no vCPU stops for what nobody wants any more."""
        super().disarm()
        with contextlib.suppress(RingOverflowError):
            self._take(None)
        with self._lock:
            self._taken = DirtyPages()
