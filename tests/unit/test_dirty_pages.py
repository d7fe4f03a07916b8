"""DirtyPages against Python's own sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.machine import DirtyPages

PAIRS = st.sets(st.tuples(st.sampled_from([0, 1, 0x10002]), st.integers(0, 300) | st.integers(0, 1 << 52)))


@given(PAIRS, PAIRS)
def test_set_operations_are_those_of_sets(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> None:
    x, y = DirtyPages.of(a), DirtyPages.of(b)
    assert set(x) == a
    assert len(x) == len(a)
    assert bool(x) == bool(a)
    assert set(x | y) == a | b
    assert set(x & y) == a & b
    assert set(x - y) == a - b
    assert (x == y) == (a == b)
    if a == b:
        assert hash(x) == hash(y)


@given(PAIRS)
def test_iteration_is_ascending_and_repeats_are_merged(a: set[tuple[int, int]]) -> None:
    pages = DirtyPages.of([*a, *sorted(a, reverse=True)])
    assert list(pages) == sorted(a)


@given(PAIRS, st.tuples(st.sampled_from([0, 1, 5]), st.integers(0, 300)))
def test_membership(a: set[tuple[int, int]], page: tuple[int, int]) -> None:
    assert (page in DirtyPages.of(a)) == (page in a)


@given(PAIRS)
def test_runs_are_maximal_and_cover_exactly(a: set[tuple[int, int]]) -> None:
    pages = DirtyPages.of(a)
    for slot in pages.slots:
        runs = pages.runs(slot)
        covered = [gfn for first, count in runs for gfn in range(first, first + count)]
        assert covered == sorted(gfn for s, gfn in a if s == slot)
        assert all(
            a_first + a_count < b_first for (a_first, a_count), (b_first, _) in itertools.pairwise(runs)
        )


def test_the_arrays_cannot_be_changed() -> None:
    pages = DirtyPages.of([(0, 1), (0, 2)])
    with pytest.raises(ValueError, match="read-only"):
        pages.gfns(0)[0] = 7
    assert not pages.gfns(9).flags.writeable


def test_things_that_are_not_pages_are_not_members() -> None:
    pages = DirtyPages.of([(0, 1)])
    assert 1 not in pages
    assert (0, 1, 2) not in pages
    assert pages != {(0, 1)}


def test_memory_follows_the_pages_not_the_slot() -> None:
    pages = DirtyPages.of((0, gfn << 18) for gfn in range(1000))
    assert pages.gfns(0).nbytes == 8000
    assert pages.gfns(0).dtype == np.uint64
