"""Merging marks: whatever way is chosen by density, the result is Python's sorted set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.machine import RingEntries, RingHarvest, SlotFrames
from pykvm.machine.dirty import distinct

HIGHEST = (1 << 52) - 1


@given(
    st.lists(st.integers(0, HIGHEST))
    | st.integers(0, HIGHEST - 100).flatmap(lambda base: st.lists(st.integers(base, base + 100)))
)
def test_is_the_sorted_set(gfns: list[int]) -> None:
    given_pages = np.array(gfns, dtype=np.uint64)
    result = distinct(given_pages)
    assert result.dtype == np.uint64
    assert result.tolist() == sorted(set(gfns))
    assert not np.shares_memory(result, given_pages)


@pytest.mark.parametrize("spread", [1, 31, 32, 33, 1 << 30])
def test_dense_and_sparse_agree(spread: int) -> None:
    gfns = [7 + 5 * spread, 7, 7 + 5 * spread, 7 + spread]
    assert distinct(np.array(gfns, dtype=np.uint64)).tolist() == sorted(set(gfns))


def entries(slots: list[int], offsets: list[int]) -> RingEntries:
    return RingEntries(0, np.array(slots, dtype=np.uint32), np.array(offsets, dtype=np.uint64))


def test_a_harvest_resolves_slots_and_drops_what_is_stale() -> None:
    """Slot 1 is known with 8 pages; slot 2 is gone; offset 9 was pushed before slot 1 shrank."""
    harvest = RingHarvest(
        [
            (entries([1, 2, 1, 1], [3, 0, 9, 3]), {1: SlotFrames(0x100, 8), 5: SlotFrames(0, 4)}),
            (entries([1], [0]), {1: SlotFrames(0x200, 8)}),
            (entries([5, 5], [1, 0]), {5: SlotFrames(0x40, 4)}),
        ]
    )
    assert harvest.stale == 2
    assert list(harvest.pages) == [(1, 0x103), (1, 0x200), (5, 0x40), (5, 0x41)]
    assert len(harvest.entries) == 3


def test_nothing_harvested() -> None:
    harvest = RingHarvest()
    assert (harvest.entries, harvest.stale, len(harvest.pages)) == ((), 0, 0)
