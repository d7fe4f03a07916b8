"""A GPU whose page tables lie in guest memory and are shadowed: what KVM has page write-tracking for.

A model of the mechanism, not of any device.  Like the per-process GTT of Intel's GPUs since Gen8 it is a
radix of four levels with 512 entries of 8 bytes, PML4, PDP, PD and PT, here with the bits P (0) and W (1)
and the frame in 51:12, and like KVMGT the device never walks the guest's tables: it walks a shadow, which is
kept in step by being told of every write to a table.  There are no large pages, no commands and no engines.

The shadow is built from what the notifications say.  Guest memory is read only when a table is linked, after
it was tracked, so a write that nobody reported would show as a difference from ``walk``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol

from pykvm.errors import SlotAbsentError
from pykvm.memory import PAGE_SIZE

LEVELS: Final = ("PT", "PD", "PDP", "PML4")
TOP: Final = len(LEVELS)
PRESENT, WRITABLE = 1 << 0, 1 << 1
_FRAME: Final = ((1 << 52) - 1) & ~(PAGE_SIZE - 1)
_ENTRY: Final = 8
_ENTRIES: Final = PAGE_SIZE // _ENTRY
_INDEX_BITS: Final = 9


class Mapping(NamedTuple):
    """Where a page of the GPU's address space lies: ``gpa`` in bytes; ``writable`` at every level."""

    gpa: int
    writable: bool


Mappings = dict[int, Mapping]
"""By the number of the page in the GPU's address space (its address >> 12)."""

Read = Callable[[int], bytes | None]
"""The 4096 bytes of a guest frame, by its number; None where the guest has no memory."""


class TableTracker(Protocol):
    """Who reports the writes to tables: pykvm.track.write_track.WriteTracker, with the GPU as its node."""

    def add_gfn(self, gfn: int) -> None: ...
    def remove_gfn(self, gfn: int) -> None: ...


def entries(table: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """(index, entry) of the present entries of a table."""
    words = memoryview(table).cast("Q")
    return ((index, entry) for index, entry in enumerate(words) if entry & PRESENT)


def walk(read: Read, root: int) -> Mappings:
    """All mappings of the tables from frame ``root`` on, straight from guest memory."""
    return dict(_walk(read, root, TOP, 0, writable=True))


def _walk(read: Read, gfn: int, level: int, page: int, *, writable: bool) -> Iterator[tuple[int, Mapping]]:
    table = read(gfn)
    if table is None:
        return
    for index, entry in entries(table):
        at = page << _INDEX_BITS | index
        also = writable and bool(entry & WRITABLE)
        if level == 1:
            yield at, Mapping(entry & _FRAME, also)
        else:
            yield from _walk(read, (entry & _FRAME) // PAGE_SIZE, level - 1, at, writable=also)


class _Shadow:
    """The shadow of one guest page in the role of a table of one level."""

    def __init__(self, gfn: int, level: int, table: bytes) -> None:
        self.gfn = gfn
        self.level = level
        self.table = bytearray(table)
        self.children: dict[int, _Shadow] = {}
        """By index; where a present entry has none, its table lies outside of the guest's memory."""
        self.links = 0
        """Entries that point here; 1 more for the root."""


class Ppgtt:
    """The shadow of one PPGTT; a pykvm.machine.TrackNode, to be registered where ``tracker`` reports.

    ``read`` reads guest memory.  Calls come one at a time, as from one WriteTracker.  A guest page that is
    linked in several places, or at several levels, is shadowed and tracked once per level.
    """

    def __init__(self, root: int, read: Read, tracker: TableTracker) -> None:
        """Shadow the tables from frame ``root`` on.  Raises SlotAbsentError if there is no memory."""
        self._read = read
        self._tracker = tracker
        self._shadows: dict[tuple[int, int], _Shadow] = {}
        self._root = self._link(root, TOP)
        if self._root is None:
            tracker.add_gfn(root)  # raises, and says it better

    @property
    def tables(self) -> set[tuple[int, int]]:
        """(gfn, level) of the tables that are shadowed."""
        return set(self._shadows)

    def mappings(self) -> Mappings:
        """All mappings, as the GPU would find them in the shadow."""
        return {} if self._root is None else dict(self._mappings(self._root, 0, writable=True))

    def translate(self, address: int, *, write: bool = False) -> int | None:
        """The gpa behind a GPU address (48 bits); None where the GPU would fault."""
        shadow, entry = self._root, 0
        for level in range(TOP, 0, -1):
            if shadow is None:
                return None
            index = address >> 12 + (level - 1) * _INDEX_BITS & _ENTRIES - 1
            entry = int.from_bytes(shadow.table[index * _ENTRY : index * _ENTRY + _ENTRY], "little")
            if not entry & PRESENT or (write and not entry & WRITABLE):
                return None
            shadow = shadow.children.get(index)
        return entry & _FRAME | address & PAGE_SIZE - 1

    def close(self) -> None:
        """Give the shadow up; nothing of it is tracked any more.  Idempotent."""
        root, self._root = self._root, None
        if root is not None:
            self._unlink(root)

    # --- what the tracker reports ------------------------------------------------------------------------

    def track_write(self, gpa: int, new: bytes) -> None:
        """The guest wrote, perhaps to a table, perhaps a part of an entry or of several."""
        gfn, offset = divmod(gpa, PAGE_SIZE)
        for level in range(TOP, 0, -1):  # an upper role first: it may unlink the page from the lower ones
            shadow = self._shadows.get((gfn, level))
            if shadow is not None:
                self._patch(shadow, offset, new)

    def track_remove_region(self, gfn: int, pages: int) -> None:
        """Guest memory goes away, and with it the counts of its tables."""
        for shadow in [each for each in self._shadows.values() if 0 <= each.gfn - gfn < pages]:
            if self._shadows.pop((shadow.gfn, shadow.level), None) is None:
                continue
            for parent in list(self._shadows.values()):
                for index in [index for index, child in parent.children.items() if child is shadow]:
                    del parent.children[index]
            if shadow is self._root:
                self._root = None
            for child in list(shadow.children.values()):
                self._unlink(child, gone=range(gfn, gfn + pages))

    # --- inside ------------------------------------------------------------------------------------------

    def _mappings(self, shadow: _Shadow, page: int, *, writable: bool) -> Iterator[tuple[int, Mapping]]:
        for index, entry in entries(shadow.table):
            at = page << _INDEX_BITS | index
            also = writable and bool(entry & WRITABLE)
            if shadow.level == 1:
                yield at, Mapping(entry & _FRAME, also)
            elif index in shadow.children:
                yield from self._mappings(shadow.children[index], at, writable=also)

    def _patch(self, shadow: _Shadow, offset: int, new: bytes) -> None:
        first, last = offset // _ENTRY, (offset + len(new) - 1) // _ENTRY
        before = shadow.table[first * _ENTRY : (last + 1) * _ENTRY]
        shadow.table[offset : offset + len(new)] = new
        if shadow.level == 1:
            return
        for index in range(first, last + 1):
            at = (index - first) * _ENTRY
            old = int.from_bytes(before[at : at + _ENTRY], "little")
            now = int.from_bytes(shadow.table[index * _ENTRY : (index + 1) * _ENTRY], "little")
            self._relink(shadow, index, old, now)

    def _relink(self, shadow: _Shadow, index: int, old: int, now: int) -> None:
        if old & (_FRAME | PRESENT) == now & (_FRAME | PRESENT):
            return
        gone = shadow.children.pop(index, None)
        if now & PRESENT:  # before the old table goes: what both use need not be tracked anew
            child = self._link((now & _FRAME) // PAGE_SIZE, shadow.level - 1)
            if child is not None:
                shadow.children[index] = child
        if gone is not None:
            self._unlink(gone)

    def _link(self, gfn: int, level: int) -> _Shadow | None:
        shadow = self._shadows.get((gfn, level))
        if shadow is None:
            try:
                self._tracker.add_gfn(gfn)  # first, so that no write falls between reading and tracking
            except SlotAbsentError:
                return None
            table = self._read(gfn)
            if table is None:
                self._tracker.remove_gfn(gfn)
                return None
            shadow = self._shadows[gfn, level] = _Shadow(gfn, level, table)
            if level > 1:
                for index, entry in entries(shadow.table):
                    child = self._link((entry & _FRAME) // PAGE_SIZE, level - 1)
                    if child is not None:
                        shadow.children[index] = child
        shadow.links += 1
        return shadow

    def _unlink(self, shadow: _Shadow, gone: range = range(0)) -> None:
        """One entry less points to the table; ``gone`` are frames whose counts went with their slot."""
        shadow.links -= 1
        if shadow.links or self._shadows.pop((shadow.gfn, shadow.level), None) is None:
            return
        for child in shadow.children.values():
            self._unlink(child, gone)
        if shadow.gfn not in gone:
            self._tracker.remove_gfn(shadow.gfn)


__all__ = ["LEVELS", "PRESENT", "TOP", "WRITABLE", "Mapping", "Mappings", "Ppgtt", "entries", "walk"]
