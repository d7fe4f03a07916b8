"""KVM_GET_DIRTY_LOG that only reads, KVM_CLEAR_DIRTY_LOG that re-arms (api.rst 7.18, 4.117)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pykvm.errors import UsageError
from pykvm.machine import DirtyPages, Gfns, Machine, Slot, Vcpu
from pykvm.memory import PAGE_SIZE
from pykvm.track.logging_slots import SlotLogging

WORD = 64
DEFAULT_CHUNK = 1 << 22
"""Pages per CLEAR by default: a 512 KiB bitmap, 16 GiB of guest."""
GAP = 64
"""Clean words that are worth a call of their own: about what an ioctl costs (hosts.md, section I)."""


class ManualTracker(SlotLogging):
    """Fetching and re-arming apart: a page re-armed just before it is read is dirtied anew less often.

    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.  A page stays in the log until ``rearm`` cleared it, so pages that
    were collected and not re-armed are reported again: nothing is lost by dropping a collection.
    """

    name = "manual"

    def __init__(self, *, clear_chunk: int | None = None, initially_set: bool = False) -> None:
        super().__init__()
        if clear_chunk is not None and (clear_chunk <= 0 or clear_chunk % WORD):
            raise UsageError(f"A clear chunk of {clear_chunk} pages is not a positive multiple of 64.")
        self._chunk = clear_chunk or DEFAULT_CHUNK
        self._initially_set = initially_set
        self._bases: dict[int, int] = {}
        """By slot id, the gpa at which its pages were collected."""

    def prepare(self, machine: Machine) -> None:
        machine.enable_manual_protect(self._initially_set)

    def on_ring_full(self, vcpu: Vcpu) -> None:
        """Never happens: there are no rings."""

    def collect(self, *, final: bool = False) -> DirtyPages:
        if final:
            self.kick_vcpus()
        machine, slots = self.machine, self.slots
        self._bases = {slot.id: slot.gpa for slot in slots}
        return DirtyPages({slot.id: machine.get_dirty_log(slot) for slot in slots})

    def rearm(self, pages: DirtyPages) -> None:
        """KVM_CLEAR_DIRTY_LOG over the given pages only, in chunks.

        In a slot that moved since their collection those gfns are other pages, whose marks must stay: it is
        left alone, and all its pages are reported again.
        """
        machine = self.machine
        for slot in self.slots:
            gfns = pages.gfns(slot.id)
            if len(gfns) and self._bases.get(slot.id) == slot.gpa:
                for first, count, words in clear_ranges(slot, gfns, self._chunk):
                    machine.clear_dirty_log(slot, first, count, words)


def clear_ranges(slot: Slot, gfns: Gfns, chunk: int) -> Iterator[tuple[int, int, npt.NDArray[np.uint64]]]:
    """(first page, pages, bitmap words) for KVM_CLEAR_DIRTY_LOG calls that cover ``gfns`` (ascending).

    Ranges start at multiples of 64, hold at most ``chunk`` pages, skip long clean stretches, and end with
    the slot where they reach its end, as the ioctl demands.
    """
    npages = slot.size // PAGE_SIZE
    pages = gfns - np.uint64(slot.gpa // PAGE_SIZE)
    words = (pages // WORD).astype(np.int64)
    cuts = np.flatnonzero((np.diff(words) > GAP) | (np.diff(words * WORD // chunk) > 0)) + 1
    for part in np.split(np.arange(len(pages)), cuts):
        base = int(words[part[0]])
        n = int(words[part[-1]]) - base + 1
        bits = np.zeros(n, dtype=np.uint64)
        np.bitwise_or.at(bits, words[part] - base, np.uint64(1) << (pages[part] % np.uint64(WORD)))
        first = base * WORD
        yield first, min(n * WORD, npages - first), bits
