"""Page contents out of one memory and into another, and where in the memory a slot's pages are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from pykvm.abi import ffi, lib
from pykvm.errors import HostError, MigrationError, UsageError, WireError
from pykvm.machine import DirtyPages, Slot
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.migrate import wire
from pykvm.migrate.channel import Channel, Frame
from pykvm.migrate.wire import FRAME_PAGES, FrameType, Pages


class SlotMap:
    """Slots over one memory: their gfns as page numbers of the memory, and back."""

    def __init__(self, slots: Mapping[int, Slot], memory: GuestMemory) -> None:
        if any(slot.memory is not memory for slot in slots.values()):
            raise UsageError("Only a guest whose memslots all show one memory can be migrated.")
        self._slots = dict(slots)

    def pages(self, dirty: DirtyPages) -> Pages:
        """The memory's pages behind ``dirty``, ascending, each once."""
        parts = [self.pages_of(slot, dirty.gfns(slot)) for slot in dirty.slots]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)

    def pages_of(self, slot_id: int, gfns: Pages) -> Pages:
        """The memory's pages behind the gfns of one slot."""
        slot = self._slots.get(slot_id)
        if slot is None or not slot.alive:
            raise MigrationError(
                f"Memslot {slot_id} came or went during the migration; keep them as they are."
            )
        pages = gfns - np.uint64(slot.gpa // PAGE_SIZE)
        # A gfn below the slot has become a huge number.
        if len(pages) and int(pages.max()) >= slot.size // PAGE_SIZE:
            raise MigrationError(f"Memslot {slot_id} moved during the migration; keep it where it is.")
        return pages + np.uint64(slot.memory_offset // PAGE_SIZE)

    def gfn(self, page: int) -> int | None:
        """The first gfn that shows a page of the memory, or None where no slot does."""
        for slot in self._slots.values():
            at = page - slot.memory_offset // PAGE_SIZE
            if 0 <= at < slot.size // PAGE_SIZE:
                return slot.gpa // PAGE_SIZE + at
        return None


def allocated_pages(memory: GuestMemory, batch: int) -> Iterator[Pages]:
    """Batches of at most ``batch`` ascending page numbers, over all pages that are allocated."""
    waiting: list[Pages] = []
    room = batch
    for offset, length in memory.extents():
        first, end = offset // PAGE_SIZE, (offset + length) // PAGE_SIZE
        while first < end:
            count = min(room, end - first)
            waiting.append(np.arange(first, first + count, dtype=np.uint64))
            first += count
            room -= count
            if not room:
                yield np.concatenate(waiting)
                waiting, room = [], batch
    if waiting:
        yield np.concatenate(waiting)


def batches(pages: Pages, batch: int) -> Iterator[Pages]:
    """``pages`` in batches of at most ``batch``."""
    for at in range(0, len(pages), batch):
        yield pages[at : at + batch]


class PageSender:
    """Sends page contents: copies a batch out of the (running) guest, checks what is zero, sends the rest."""

    def __init__(self, memory: GuestMemory, channel: Channel) -> None:
        self._memory = memory.pointer()
        self._channel = channel
        self._contents = bytearray(FRAME_PAGES * PAGE_SIZE)
        self._body = memoryview(self._contents)
        self._zero = np.empty(FRAME_PAGES, dtype=np.uint8)
        self._stored = ffi.new("size_t *")
        self.last_sent: dict[int, int] | None = None
        """Once set to a dict: the checksum of each page's contents as sent last, by page number."""

    def send(self, pages: Pages, *, zeros: bool) -> tuple[int, int]:
        """Send at most FRAME_PAGES ascending pages; returns how many with contents, how many zero.

        Pages that are all zero go as runs, or not at all where ``zeros`` is false (round 1: the
        destination's memory is zero already).
        """
        # SAFETY: ``pages`` and the arrays live in this frame and this object; the memory stays mapped as
        # long as ``_memory`` exists; every page number is below its size, since slots and extents are.
        # The guest may be writing: C copies first, then tests and sums the copy.
        checksum = lib.pykvm_gather(
            self._memory,
            ffi.from_buffer("__u64[]", pages),
            len(pages),
            ffi.from_buffer("char[]", self._contents),
            ffi.from_buffer("__u8[]", self._zero),
            self._stored,
        )
        stored = int(self._stored[0])
        is_zero = self._zero[: len(pages)].astype(bool)
        full = pages if stored == len(pages) else pages[~is_zero]
        body = self._body[: stored * PAGE_SIZE]
        if stored:
            self._channel.send(FrameType.PAGES, wire.pack_runs(full), body, body_checksum=checksum)
        if self.last_sent is not None:
            self._note(self.last_sent, full, body, pages[is_zero])
        if zeros and stored < len(pages):
            self._channel.send(FrameType.ZEROS, wire.pack_runs(pages[is_zero]))
        return stored, len(pages) - stored

    @staticmethod
    def _note(last_sent: dict[int, int], full: Pages, body: memoryview, zero: Pages) -> None:
        for at, page in enumerate(full.tolist()):
            last_sent[page] = wire.checksum(body[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])
        for page in zero.tolist():
            last_sent.pop(page, None)


class PageReceiver:
    """Stores what PAGES and ZEROS frames bring, within the memory and within ``limit`` allocated bytes.

    Contents arrive here after their checksum was found right; nothing else ever touches the memory.
    """

    def __init__(self, memory: GuestMemory, limit: int) -> None:
        self._memory = memory
        self._limit = limit
        self._total = memory.size // PAGE_SIZE
        self.pages = 0
        self.zeros = 0

    def begin(self) -> None:
        """A round begins: its pages are counted from zero."""
        self.pages = self.zeros = 0

    def store(self, frame: Frame) -> None:
        """Take a PAGES or ZEROS frame.  Raises WireError, HostError."""
        runs = wire.parse_runs(frame.head, self._total, frame.type.name)
        count = sum(count for _, count in runs)
        if frame.type is FrameType.ZEROS:
            self.zeros += count
            for first, pages in runs:
                self._memory.discard(first * PAGE_SIZE, pages * PAGE_SIZE)
        else:
            if count * PAGE_SIZE != len(frame.body):
                raise WireError(f"A PAGES frame names {count} pages and brings {len(frame.body)} bytes.")
            self.pages += count
            self._fill(runs, frame.body)
        if self.pages + self.zeros > self._total:
            raise WireError("A round has more pages than the memory.")

    def _fill(self, runs: Iterable[tuple[int, int]], body: memoryview) -> None:
        at = 0
        for first, count in runs:
            end = at + count * PAGE_SIZE
            self._memory.write(first * PAGE_SIZE, body[at:end])
            at = end
        if self._memory.allocated > self._limit:
            raise HostError(
                f"The guest needs more than the {self._limit >> 20} MiB of memory that this side may spend; "
                "free some memory or raise the limit."
            )
