"""Dirty rings: harvest and reset per entry.

Two VMs with the same guest fill their rings to the same length, one for each side, since a ring's position
belongs to whoever harvests it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from time import perf_counter_ns
from typing import Any, TypeVar

from guest_code import STOP_PORT, start_page_stores
from measure import Effort, Row, paired, quiet, ratio_row
from yardstick import YardstickError, checked, ffi

from pykvm.abi import lib
from pykvm.kvm import KvmSystem
from pykvm.kvm.rings import ENTRY_SIZE
from pykvm.machine import IoOut, SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory

SIZES = (4096, 65536)
RESERVED = 64
"""Entries that KVM keeps free (KVM_DIRTY_RING_RSVD_ENTRIES): the guest stays below the soft limit."""
MARGIN = 64
WARM_UP = 256
FIRST_PAGE = 64 << 20


class Filler:
    """A VM whose guest fills its ring with one entry per page, each pass the same number."""

    def __init__(self, stack: ExitStack, system: KvmSystem, entries: int) -> None:
        self.count = entries - RESERVED - MARGIN
        memory = stack.enter_context(GuestMemory(FIRST_PAGE + self.count * PAGE_SIZE))
        self.vm = stack.enter_context(system.create_machine())
        self.vm.enable_dirty_ring(entries)
        self.vm.create_slot(memory, 0, flags=SlotFlags.LOG_DIRTY_PAGES)
        self.vcpu = self.vm.create_vcpu()
        start_page_stores(self.vcpu, memory, [(FIRST_PAGE, self.count)])
        # The first pass takes in the guest's own pages and runs into a full ring.
        while not isinstance(self.vcpu.run(), IoOut):
            self.vm.collect_rings()
        self.vm.collect_rings()

    def fill(self) -> None:
        """One pass of the guest."""
        stop = self.vcpu.run()
        if not (isinstance(stop, IoOut) and stop.port == STOP_PORT):
            raise YardstickError(f"The ring guest stopped with {stop}.")


class Side:
    """How to empty a ring."""

    def __init__(self, filler: Filler) -> None:
        self.filler = filler
        self.taken = 0

    def check(self) -> None:
        """Both sides must have taken exactly what the guest wrote."""
        if self.taken != self.filler.count:
            raise YardstickError(f"{self.taken} entries where the guest pushed {self.filler.count}.")


S = TypeVar("S", bound=Side)


class Library(Side):
    """The public way: ``collect_rings``, and on top of it the distinct pages."""

    def entries(self) -> float:
        start = perf_counter_ns()
        harvest = self.filler.vm.collect_rings()
        spent = perf_counter_ns() - start
        self.taken = sum(len(entries.slots) for entries in harvest.entries)
        self.check()
        return spent

    def pages(self) -> float:
        start = perf_counter_ns()
        pages = self.filler.vm.collect_rings().pages
        spent = perf_counter_ns() - start
        self.taken = len(pages)
        self.check()
        return spent


class Yardstick(Side):
    """The same in C, on a second mapping of the ring and with its own position in it."""

    def __init__(self, filler: Filler, library: Any, entries: int) -> None:
        super().__init__(filler)
        self._library = library
        self._entries = entries
        self._ring = library.yardstick_map(
            filler.vcpu.fileno(), entries * ENTRY_SIZE, lib.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
        )
        ring = filler.vcpu.ring
        self._head = ffi.new("uint32_t *", ring.head if ring else 0)
        self._slots = ffi.new("uint32_t[]", entries)
        self._offsets = ffi.new("uint64_t[]", entries)

    def entries(self) -> float:
        taken = ffi.new("uint32_t *")
        spent = checked(
            self._library.yardstick_ring(
                self.filler.vm.fileno(),
                self._ring,
                self._entries,
                self._head,
                self._slots,
                self._offsets,
                taken,
            )
        )
        self.taken = taken[0]
        self.check()
        return spent

    def close(self) -> None:
        self._library.yardstick_unmap(self._ring, self._entries * ENTRY_SIZE)


def measure(yardstick: Any, effort: Effort) -> Iterator[Row]:
    for entries in SIZES:
        rounds = effort.rounds(60, 20) if entries == SIZES[0] else effort.rounds(11, 4)
        with ExitStack() as stack:
            system = stack.enter_context(KvmSystem())

            def filler(size: int, stack: ExitStack = stack, system: KvmSystem = system) -> Filler:
                return Filler(stack, system, size)

            small, large = Library(filler(WARM_UP)), Library(filler(entries))
            small_c, large_c = (Yardstick(filler(size), yardstick, size) for size in (WARM_UP, entries))
            for side in (small_c, large_c):
                stack.callback(side.close)
            stack.enter_context(quiet())
            theirs = partial(warmed, small_c, large_c, Yardstick.entries)
            for name, method, target in (
                (f"ring of {entries}: harvest + reset", Library.entries, 1.1),
                (f"ring of {entries}: … and distinct pages", Library.pages, None),
            ):
                pairs = paired(rounds, partial(warmed, small, large, method), theirs)
                yield ratio_row("rings", name, pairs, count=large.filler.count, per="entry", target=target)


def warmed(small: S, large: S, method: Callable[[S], float]) -> float:
    """``method`` on the large ring, right after the small one brought its code into the caches."""
    large.filler.fill()
    small.filler.fill()
    method(small)
    return method(large)


__all__ = ["measure"]
