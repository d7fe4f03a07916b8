"""Host memory behind the slots of a machine: what trackers of the host's page tables share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pykvm.errors import HostError, UsageError
from pykvm.machine import DirtyPages, Gfns, Machine, Slot, SlotFlags, Vcpu
from pykvm.machine.dirty import distinct
from pykvm.memory import PAGE_SIZE, GuestMemory


class HostRange(NamedTuple):
    """Mapped memory of this process: host address of its first byte, and bytes."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def pages(self) -> int:
        return self.length // PAGE_SIZE


def merged(ranges: list[HostRange]) -> list[HostRange]:
    """The same bytes in ascending ranges that do not touch."""
    result: list[HostRange] = []
    for each in sorted(ranges):
        if result and each.start <= result[-1].end:
            end = max(each.end, result[-1].end)
            result[-1] = HostRange(result[-1].start, end - result[-1].start)
        else:
            result.append(each)
    return result


class _Armed(NamedTuple):
    slot: Slot
    address: int
    memory: GuestMemory


class HostTracker(ABC):
    """Tracks the writable slots of one machine by the pages of this process that they show.

    Whoever writes to such a page through that mapping is seen, vCPU or not.  A page that several slots show
    is reported for each of them, since the host's page tables know no slots.  Slots that are made after
    ``arm`` are not tracked.
    """

    def __init__(self) -> None:
        self._machine: Machine | None = None
        self._armed: list[_Armed] = []
        self.ranges: list[HostRange] = []
        self._found: list[Gfns] = []
        """What a collection that failed halfway had found: the kernel need not tell it again."""

    def prepare(self, machine: Machine) -> None:  # noqa: B027
        """Nothing: KVM takes no part in it."""

    def on_ring_full(self, vcpu: Vcpu) -> None:  # noqa: B027
        """Never happens: there are no rings."""

    def arm(self, machine: Machine) -> None:
        """Protect the memory of every writable slot; what was written before is not reported.

        Raises HostError where kernel, permission or kind of memory does not allow it.
        """
        if self._machine is not None:
            raise UsageError("The tracker is armed already; disarm it first.")
        self._machine = machine
        try:
            for slot in machine.slots.values():
                if not slot.flags & SlotFlags.READONLY:
                    address = slot.memory.pin() + slot.memory_offset
                    self._armed.append(_Armed(slot, address, slot.memory))
            self.ranges = merged([HostRange(each.address, each.slot.size) for each in self._armed])
            self.start()
        except BaseException:
            self.disarm()
            raise

    def disarm(self) -> None:
        """End the protection; what was not collected is lost.  Harmless when not armed."""
        self._machine = None
        try:
            self.stop()
        finally:
            self.ranges, self._found = [], []
            while self._armed:
                self._armed.pop().memory.unpin()

    def collect(self, *, final: bool = False) -> DirtyPages:
        """The pages written since the last collection; nothing of it waits in a processor's buffer."""
        if self._machine is None:
            raise UsageError("The tracker is not armed; call arm(machine) first.")
        self._found.extend(self.written())
        written = distinct(np.concatenate([np.empty(0, dtype=np.uint64), *self._found]))
        self._found = []
        pages: dict[int, Gfns] = {}
        for slot, address, _ in self._armed:
            if slot.alive:
                first = np.uint64(address // PAGE_SIZE)
                here = written[(written >= first) & (written < first + np.uint64(slot.size // PAGE_SIZE))]
                pages[slot.id] = here - first + np.uint64(slot.gpa // PAGE_SIZE)
        return DirtyPages({slot: distinct(gfns) for slot, gfns in pages.items()})

    @abstractmethod
    def rearm(self, pages: DirtyPages) -> None:
        """See pykvm.track.Tracker."""

    @abstractmethod
    def start(self) -> None:
        """Protect ``ranges``."""

    @abstractmethod
    def stop(self) -> None:
        """Undo ``start``, also one that failed halfway."""

    @abstractmethod
    def written(self) -> Iterator[Gfns]:
        """The pages that were written, by host address >> 12, in parts."""

    def host_pages(self, pages: DirtyPages) -> Gfns:
        """The host pages of ``pages``, by address >> 12, ascending."""
        parts = [np.empty(0, dtype=np.uint64)]
        for slot, address, _ in self._armed:
            gfns = pages.gfns(slot.id) - np.uint64(slot.gpa // PAGE_SIZE)
            parts.append(gfns[gfns < slot.size // PAGE_SIZE] + np.uint64(address // PAGE_SIZE))
        return distinct(np.concatenate(parts))


def runs(pages: Gfns) -> list[tuple[int, int]]:
    """Maximal runs of ascending page numbers as (first, count)."""
    if not len(pages):
        return []
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(pages)]))
    return [(int(pages[s]), int(e - s)) for s, e in zip(starts.tolist(), ends.tolist(), strict=True)]


def open_pagemap() -> int:
    """A descriptor of /proc/self/pagemap.  Raises HostError where the process may not read it."""
    try:
        return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"Cannot open /proc/self/pagemap ({error.strerror}); mount /proc, or use the bitmap tracker."
        ) from error
