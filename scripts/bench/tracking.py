"""Ways to learn of writes, side by side: what the guest's first write costs, and what a collection does.

The yardstick is KVM's oldest way, the dirty bitmap, in the same round.  The guest is at CPL 3, where every
host runs it on the processor, and stores once to each of its pages in a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
from guest_code import STOP_PORT, start_page_stores
from measure import Effort, Row, quiet, ratio_row
from yardstick import YardstickError

from pykvm.errors import HostError
from pykvm.kvm import KvmSystem
from pykvm.machine import DirtyRingFull, IoOut, Kicked, Machine, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.track import BitmapTracker, ManualTracker, PagemapTracker, RingTracker, Tracker, UserfaultfdTracker
from pykvm.track.write_track import WriteTracker

FIRST = 64 << 20
"""Guest-physical address of the pages that are written; the guest's own lie below."""
PAGES = 2048
TRACKED = 256
BESIDE = 16384
"""Pages that are stored to beside tracked ones: many, so that the exits do not count."""
RING = 16384
"""Entries: more than a pass writes, so that no vCPU has to stop in the middle of one."""

TRACKERS: dict[str, Callable[[], Tracker]] = {
    "bitmap": BitmapTracker,
    "manual": ManualTracker,
    "ring": lambda: RingTracker(RING),
    "userfaultfd, async": lambda: UserfaultfdTracker("async"),
    "userfaultfd, sync": lambda: UserfaultfdTracker("sync"),
    "pagemap": PagemapTracker,
}


class Times(NamedTuple):
    """Of one round, in nanoseconds."""

    write: float
    collect: float


class Guest:
    """A machine whose guest stores to ``pages`` pages from FIRST on."""

    def __init__(self, stack: ExitStack, machine: Machine, pages: int) -> None:
        self.machine = machine
        self.memory = stack.enter_context(GuestMemory(FIRST + pages * PAGE_SIZE))
        self.memory.view()[FIRST::PAGE_SIZE] = 1
        machine.create_slot(self.memory, 0)
        self.vcpu: Vcpu = machine.create_vcpu()
        start_page_stores(self.vcpu, self.memory, [(FIRST, pages)])

    def run(self) -> float:
        """One pass; nanoseconds."""
        start = perf_counter_ns()
        stop = self.vcpu.run()
        while isinstance(stop, Kicked):
            stop = self.vcpu.run()
        spent = perf_counter_ns() - start
        if not (isinstance(stop, IoOut) and stop.port == STOP_PORT):
            raise YardstickError(f"The guest of the trackers stopped with {stop}.")
        return spent


class Side:
    """One tracker on a machine of its own."""

    def __init__(self, stack: ExitStack, system: KvmSystem, tracker: Tracker) -> None:
        self.tracker = tracker
        machine = stack.enter_context(system.create_machine())
        tracker.prepare(machine)
        self.guest = Guest(stack, machine, PAGES)
        tracker.arm(machine)
        stack.callback(tracker.disarm)
        while isinstance(stop := self.guest.vcpu.run(), DirtyRingFull):
            tracker.on_ring_full(self.guest.vcpu)
        if not isinstance(stop, IoOut):
            raise YardstickError(f"The guest of the trackers stopped with {stop}.")
        self.round()
        self.round()

    def round(self) -> Times:
        """A pass over protected pages, then a collection after which they are protected again."""
        write = self.guest.run()
        start = perf_counter_ns()
        pages = self.tracker.collect()
        self.tracker.rearm(pages)
        collect = perf_counter_ns() - start
        first = FIRST // PAGE_SIZE
        gfns = pages.gfns(0)
        if not np.array_equal(gfns[gfns >= first], np.arange(first, first + PAGES, dtype=np.uint64)):
            raise YardstickError(f"{self.tracker.name} reported other pages than the guest wrote.")
        return Times(write, collect)


class Counter:
    """A node that does nothing but count."""

    def __init__(self) -> None:
        self.writes = 0

    def track_write(self, gpa: int, new: bytes) -> None:
        self.writes += 1

    def track_remove_region(self, gfn: int, pages: int) -> None:
        """No slot goes."""


def measure(yardstick: Any, effort: Effort) -> Iterator[Row]:
    rounds = effort.rounds(40, 6)
    with ExitStack() as stack:
        system = stack.enter_context(KvmSystem())
        sides = {}
        for name, make in TRACKERS.items():
            try:
                sides[name] = Side(stack, system, make())
            except HostError:
                continue  # what this kernel lacks is left out
        write_tracked = WriteTracked(stack, system)
        stack.enter_context(quiet())
        found: list[dict[str, Times]] = []
        tracked: list[tuple[float, float, float, float]] = []
        for _ in range(rounds):
            found.append({name: side.round() for name, side in sides.items()})
            tracked.append(write_tracked.round())
    for name in sides:
        if name != "bitmap":
            pairs = [(times[name].write, times["bitmap"].write) for times in found]
            yield ratio_row("tracking", f"first write, {name}", pairs, count=PAGES, per="page")
    both = list(zip(tracked, found, strict=True))
    pairs = [(each[0] / TRACKED, times["bitmap"].write / PAGES) for each, times in both]
    yield ratio_row("tracking", "every write, read-only slots", pairs, per="write")
    for name in sides:
        if name != "bitmap":
            pairs = [(times[name].collect, times["bitmap"].collect) for times in found]
            yield ratio_row("tracking", f"collect and rearm, {name}", pairs, per="collection")
    pairs = [(each[1], each[2]) for each in tracked]
    yield ratio_row("tracking", "stores beside tracked pages", pairs, count=BESIDE, per="store")
    pairs = [(each[3], times["bitmap"].collect) for each, times in both]
    yield ratio_row("tracking", "track one more page and let it go", pairs, per="two changes")


class WriteTracked:
    """A guest whose pages are tracked, one beside whose pages others are, and one without any of that."""

    def __init__(self, stack: ExitStack, system: KvmSystem) -> None:
        self.node = Counter()
        first = FIRST // PAGE_SIZE

        def guest(pages: int, tracked: range) -> tuple[Guest, WriteTracker]:
            tracker = WriteTracker(stack.enter_context(system.create_machine()))
            stack.enter_context(tracker)
            made = Guest(stack, tracker.machine, pages)
            for gfn in tracked:
                tracker.add_gfn(gfn)
            tracker.register(self.node)
            return made, tracker

        self.inside, _ = guest(TRACKED, range(first, first + TRACKED))
        self.beside, _ = guest(BESIDE, range(first - 4096, first, 256))
        _, self.tracker = guest(PAGES, range(first - 4096, first, 256))
        self.plain, _ = guest(BESIDE, range(0))
        for each in (self.inside, self.beside, self.plain):
            each.run()

    def round(self) -> tuple[float, float, float, float]:
        """Nanoseconds of a pass in tracked pages, beside them, without any, and of a page more and less."""
        before = self.node.writes
        inside = self.inside.run()
        if self.node.writes - before != TRACKED:
            raise YardstickError("The write-tracker reported another number of writes than the guest made.")
        start = perf_counter_ns()
        self.tracker.add_gfn(FIRST // PAGE_SIZE - 100)
        self.tracker.remove_gfn(FIRST // PAGE_SIZE - 100)
        changes = perf_counter_ns() - start
        order = [self.beside, self.plain]
        if before // TRACKED % 2:
            order.reverse()
        passes = {guest is self.beside: guest.run() for guest in order}
        return inside, passes[True], passes[False], changes


__all__ = ["measure"]
