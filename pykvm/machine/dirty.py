"""A set of guest pages, as every collector of dirty pages returns it.

Per slot one sorted array of distinct gfns (uint64): memory follows the number of pages, not the size of
the slot, so that a 1 TiB slot with a thousand dirty pages costs 8 kB.  Immutable; operations are numpy's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

Gfns = npt.NDArray[np.uint64]

_EMPTY: Final[Gfns] = np.empty(0, dtype=np.uint64)
_EMPTY.setflags(write=False)


_SPARSE: Final = 32
"""Pages of span per mark from which on sorting is cheaper than marking and scanning."""


def distinct(gfns: Gfns) -> Gfns:
    """The same pages ascending and without repeats, as a new array.

    Marks lie close together as a rule, and then a map of the span between them beats sorting tenfold.
    """
    if not len(gfns):
        return gfns.copy()
    first = gfns.min()
    span = int(gfns.max() - first) + 1
    if span > _SPARSE * len(gfns):
        return np.unique(gfns)
    marked = np.zeros(span, dtype=np.bool_)
    marked[(gfns - first).view(np.int64)] = True
    pages = np.flatnonzero(marked).view(np.uint64)
    pages += first
    return pages


def _frozen(gfns: Gfns) -> Gfns:
    gfns.setflags(write=False)
    return gfns


class DirtyPages:
    """An immutable set of (slot id, gfn).

    The slot id is KVM's: address space in bits 31:16, slot in bits 15:0.  gfns are absolute guest frame
    numbers (guest-physical address >> 12), not offsets into the slot.
    """

    __slots__ = ("_slots",)

    def __init__(self, slots: Mapping[int, Gfns] | None = None) -> None:
        """``slots`` maps slot ids to sorted arrays without repeats (use ``of`` for anything else)."""
        self._slots: dict[int, Gfns] = {}
        for slot in sorted(slots or {}):
            gfns = (slots or {})[slot]
            if len(gfns):
                self._slots[slot] = _frozen(gfns)

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> DirtyPages:
        """From any (slot, gfn) pairs, in any order and with repeats."""
        by_slot: dict[int, list[int]] = {}
        for slot, gfn in pairs:
            by_slot.setdefault(slot, []).append(gfn)
        return cls({slot: distinct(np.array(gfns, dtype=np.uint64)) for slot, gfns in by_slot.items()})

    @property
    def slots(self) -> tuple[int, ...]:
        """The ids of the slots that have pages here, ascending."""
        return tuple(self._slots)

    def gfns(self, slot: int) -> Gfns:
        """The slot's pages, ascending, read-only; empty where there are none."""
        return self._slots.get(slot, _EMPTY)

    def __len__(self) -> int:
        return sum(len(gfns) for gfns in self._slots.values())

    def __bool__(self) -> bool:
        return bool(self._slots)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for slot, gfns in self._slots.items():
            for gfn in gfns.tolist():
                yield slot, gfn

    def __contains__(self, page: object) -> bool:
        if not (isinstance(page, tuple) and len(page) == 2):
            return False
        gfns = self.gfns(page[0])
        at = int(np.searchsorted(gfns, np.uint64(page[1])))
        return at < len(gfns) and int(gfns[at]) == page[1]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyPages):
            return NotImplemented
        return self.slots == other.slots and all(
            np.array_equal(self.gfns(slot), other.gfns(slot)) for slot in self.slots
        )

    def __hash__(self) -> int:
        return hash(tuple((slot, gfns.tobytes()) for slot, gfns in self._slots.items()))

    def __or__(self, other: DirtyPages) -> DirtyPages:
        if not self:
            return other
        if not other:
            return self
        return DirtyPages(
            {
                slot: distinct(np.concatenate((self.gfns(slot), other.gfns(slot))))
                for slot in {*self.slots, *other.slots}
            }
        )

    def __and__(self, other: DirtyPages) -> DirtyPages:
        return DirtyPages(
            {
                slot: np.intersect1d(self.gfns(slot), other.gfns(slot), assume_unique=True)
                for slot in self.slots
                if slot in other._slots
            }
        )

    def __sub__(self, other: DirtyPages) -> DirtyPages:
        return DirtyPages(
            {slot: np.setdiff1d(self.gfns(slot), other.gfns(slot), assume_unique=True) for slot in self.slots}
        )

    def runs(self, slot: int) -> list[tuple[int, int]]:
        """Maximal runs of consecutive pages of a slot as (first gfn, count), ascending."""
        gfns = self.gfns(slot)
        if not len(gfns):
            return []
        breaks = np.flatnonzero(np.diff(gfns) != 1) + 1
        starts = np.concatenate(([0], breaks))
        ends = np.concatenate((breaks, [len(gfns)]))
        return [(int(gfns[s]), int(e - s)) for s, e in zip(starts.tolist(), ends.tolist(), strict=True)]

    def __repr__(self) -> str:
        parts = ", ".join(f"slot {slot}: {len(gfns)}" for slot, gfns in self._slots.items())
        return f"<DirtyPages {parts or 'none'}>"
