"""Who wrote what to chosen pages: KVM's page write-tracking for programs outside of the kernel.

The contract is that of ``kvm_write_track_add_gfn`` and ``kvm_page_track_register_notifier``
(docs/reference/kvm-mmu.md 9, 9.1, 12.4), as docs/write-tracking.md tells it: for a tracked gfn every write of
a vCPU is reported with address and bytes after memory was changed, and all other pages cost nothing.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable
from typing import Final, NoReturn, Self, cast

from pykvm.errors import ClosedError, SlotAbsentError, UsageError
from pykvm.machine import Machine, PageTracking, TrackingMachine, TrackNode
from pykvm.memory import PAGE_SIZE
from pykvm.track.carved import CarvedMachine

PIECE: Final = 8
"""The most bytes that one call reports: those of an MMIO exit (api.rst section 5, kvm_run.mmio)."""


def tracking_machine(machine: Machine) -> TrackingMachine:
    """``machine`` itself where it tracks pages, else one made of it with read-only slots."""
    if isinstance(machine, PageTracking):
        return cast(TrackingMachine, machine)
    return CarvedMachine(machine)


class WriteTracker:
    """Users of write-tracking on one machine.  A context manager: leaving it removes and unregisters all.

    Run the guest through ``machine`` from now on.  ``add_gfn`` and ``remove_gfn`` count, so that users need
    not know of each other; nodes get the writes to every tracked page, whoever added it, the one that
    registered last first.  A write is reported in pieces: each lies within one page, and a store of more than
    8 bytes comes 8 at a time from its lowest address, or its first in the next page, on.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = tracking_machine(machine)
        self._nodes: list[TrackNode] = []
        self._delivery = threading.RLock()
        """Held while nodes are called, so that none is called after its ``unregister`` returned."""
        self._counts: dict[int, int] = {}
        self._counting = threading.Lock()
        """Never held while the machine is called, which may be waiting for a vCPU that reports a write."""
        self._closed = False
        self._listener = _Listener(self)
        self.machine.register_track_notifier(self._listener)

    @property
    def gfns(self) -> frozenset[int]:
        """The pages that are tracked."""
        with self._counting:
            return frozenset(self._counts)

    def count(self, gfn: int) -> int:
        """How often the page was added and not removed."""
        return self._counts.get(gfn, 0)

    def add_gfn(self, gfn: int) -> None:
        """From the return on, every write to the page is reported.  Also from within a callback.

        Raises SlotAbsentError for a gfn that lies in no slot, UsageError beyond 65535 times, and
        GuestTimeoutError where a vCPU does not come out of the guest.
        """
        self.machine.track_add_gfn(gfn)
        with self._counting:
            self._counts[gfn] = self._counts.get(gfn, 0) + 1

    def remove_gfn(self, gfn: int) -> None:
        """Undo one ``add_gfn``.  Raises SlotAbsentError, and UsageError for a page that is not tracked."""
        with self._counting:
            count = self._counts.get(gfn, 0)
            if count > 1:
                self._counts[gfn] = count - 1
            else:
                self._counts.pop(gfn, None)
        if not count:
            self._refuse_removal(gfn)
        try:
            self.machine.track_remove_gfn(gfn)
        except SlotAbsentError:
            raise  # the slot went meanwhile, and with it the count
        except BaseException:
            with self._counting:
                self._counts[gfn] = self._counts.get(gfn, 0) + 1
            raise

    def _refuse_removal(self, gfn: int) -> NoReturn:
        for slot in self.machine.slots.values():
            if 0 <= gfn * PAGE_SIZE - slot.gpa < slot.size:
                raise UsageError(f"gfn {gfn:#x} is not tracked; add it first.")
        raise SlotAbsentError(
            errno.EINVAL,
            "kvm_write_track_remove_gfn",
            f"gfn {gfn:#x} lies in no slot; its count went with its slot.",
        )

    def register(self, node: TrackNode) -> None:
        """Call ``node`` for every write to a tracked page, before those that registered earlier."""
        with self._delivery:
            if any(each is node for each in self._nodes):
                raise UsageError("The node is registered already; unregister it first.")
            self._nodes.insert(0, node)

    def unregister(self, node: TrackNode) -> None:
        """No call of ``node`` once this returned; the pages that it added stay tracked."""
        with self._delivery:
            if not any(each is node for each in self._nodes):
                raise UsageError("The node is not registered.")
            self._nodes = [each for each in self._nodes if each is not node]

    def close(self) -> None:
        """Stop tracking everything that was added here.  Idempotent, and harmless after the machine's end."""
        if self._closed:
            return
        self._closed = True
        self.machine.unregister_track_notifier(self._listener)
        with self._counting:
            counts, self._counts = self._counts, {}
        for gfn, count in counts.items():
            with contextlib.suppress(SlotAbsentError, ClosedError):
                for _ in range(count):
                    self.machine.track_remove_gfn(gfn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- from the machine --------------------------------------------------------------------------------

    def written(self, gpa: int, new: bytes) -> None:
        """The machine's ``track_write``: for tracked pages, in pieces, to every node."""
        if gpa // PAGE_SIZE not in self._counts:
            return
        for at in range(0, len(new), PIECE):
            self._tell_piece(gpa + at, new[at : at + PIECE])

    def _tell_piece(self, gpa: int, piece: bytes) -> None:
        self._tell(lambda node: node.track_write(gpa, piece))

    def region_removed(self, gfn: int, pages: int) -> None:
        """The machine's ``track_remove_region``: the counts are gone."""
        with self._counting:
            for each in [each for each in self._counts if 0 <= each - gfn < pages]:
                del self._counts[each]
        self._tell(lambda node: node.track_remove_region(gfn, pages))

    def _tell(self, what: Callable[[TrackNode], None]) -> None:
        """Call all nodes; the first failure comes out when all were called."""
        failed: BaseException | None = None
        with self._delivery:
            for node in tuple(self._nodes):
                if any(each is node for each in self._nodes):  # another one may have unregistered it
                    try:
                        what(node)
                    except BaseException as error:
                        failed = failed or error
        if failed is not None:
            raise failed


class _Listener:
    """The node of a WriteTracker at its machine."""

    def __init__(self, tracker: WriteTracker) -> None:
        self._tracker = tracker

    def track_write(self, gpa: int, new: bytes) -> None:
        self._tracker.written(gpa, new)

    def track_remove_region(self, gfn: int, pages: int) -> None:
        self._tracker.region_removed(gfn, pages)
