"""Binning of pages, against counting them one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pykvm.report.heat import bin_pages, bin_sizes, bin_width, coarser, level


@given(st.integers(1, 5000), st.integers(1, 200), st.lists(st.integers(0, 6000), unique=True, max_size=300))
def test_each_page_is_counted_in_the_part_that_has_it(pages: int, bins: int, numbers: list[int]) -> None:
    counts = bin_pages(np.array(sorted(numbers), dtype=np.uint64), pages, bins)
    sizes = bin_sizes(pages, bins)
    assert len(counts) == len(sizes) <= bins
    start = 0
    for count, size in zip(counts, sizes, strict=True):
        assert count == sum(start <= number < start + size for number in numbers)
        start += size
    assert start == pages


@given(st.integers(1, 1 << 30), st.integers(1, 300))
def test_the_number_of_parts_says_how_wide_they_are(pages: int, bins: int) -> None:
    """A reader who has only the counts finds the same parts."""
    width = bin_width(pages, bins)
    assert bin_width(pages, -(-pages // width)) == width


def test_a_tebibyte_is_binned_without_overflow() -> None:
    pages = 1 << 28
    counts = bin_pages(np.array([0, pages - 1], dtype=np.uint64), pages, 128)
    assert counts[0] == counts[127] == 1
    assert sum(counts) == 2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(1, 64))
def test_coarser_parts_hold_the_same_pages(counts: list[int], bins: int) -> None:
    merged = coarser(tuple(counts), bins)
    assert len(merged) <= bins
    assert sum(merged) == sum(counts)
    assert merged[0] == sum(counts[: -(-len(counts) // bins)])


def test_levels_rise_with_the_share_of_dirty_pages() -> None:
    assert [level(count, 100) for count in (0, 1, 2, 6, 21, 51, 81, 100)] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert level(0, 0) == 0
