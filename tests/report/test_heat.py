"""Binning of pages, against counting them one by one."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pykvm.report.heat import bin_pages, bin_range, coarser, level


@given(
    st.integers(0, 1 << 30),
    st.integers(1, 5000),
    st.integers(1, 200),
    st.lists(st.integers(0, 6000), unique=True, max_size=300),
)
def test_each_page_is_counted_in_the_bin_whose_range_has_it(
    first: int, pages: int, bins: int, offsets: list[int]
) -> None:
    gfns = np.array(sorted(first + offset for offset in offsets), dtype=np.uint64)
    counts = bin_pages(gfns, first, pages, bins)
    assert len(counts) == min(bins, pages)
    for index, count in enumerate(counts):
        low, high = bin_range(index, pages, len(counts))
        assert count == sum(low <= offset < high for offset in offsets)


@given(st.integers(1, 5000), st.integers(1, 200))
def test_the_ranges_of_all_bins_cover_every_page_once(pages: int, bins: int) -> None:
    bins = min(bins, pages)
    edges = [bin_range(index, pages, bins) for index in range(bins)]
    assert edges[0][0] == 0
    assert edges[-1][1] == pages
    assert all(left[1] == right[0] for left, right in itertools.pairwise(edges))
    assert all(low < high for low, high in edges)


def test_a_tebibyte_is_binned_without_overflow() -> None:
    pages = 1 << 28
    counts = bin_pages(np.array([0, pages - 1], dtype=np.uint64), 0, pages, 128)
    assert counts[0] == counts[127] == 1
    assert sum(counts) == 2


def test_pages_below_a_slot_are_not_wrapped_around() -> None:
    gfns = np.array([3, 100, 205], dtype=np.uint64)
    assert bin_pages(gfns, 100, 100, 2) == (1, 0)


def test_coarser_bins_hold_the_same_pages() -> None:
    gfns = np.arange(0, 1024, 3, dtype=np.uint64)
    fine = bin_pages(gfns, 0, 1024, 128)
    assert coarser(fine, 32) == bin_pages(gfns, 0, 1024, 32)
    assert coarser((1, 2, 3), 2) == (1, 2, 3)


def test_levels_rise_with_the_share_of_dirty_pages() -> None:
    assert [level(count, 100) for count in (0, 1, 2, 6, 21, 51, 81, 100)] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert level(0, 0) == 0
