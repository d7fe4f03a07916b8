"""Heat maps of guest memory: how many pages of each part of the address space are in a set."""

from __future__ import annotations

import numpy as np

from pykvm.machine.dirty import Gfns

LEVELS = (0.0, 0.01, 0.05, 0.2, 0.5, 0.8)
"""A bin is at level n+1 if more than LEVELS[n] of its pages are in the set; level 0 is none of them."""


def bin_pages(gfns: Gfns, first_gfn: int, pages: int, bins: int) -> tuple[int, ...]:
    """How many of ``gfns`` fall into each of ``bins`` equal parts of [first_gfn, first_gfn + pages).

    There are never more bins than pages; gfns outside the range are not counted.
    """
    bins = max(1, min(bins, pages))
    inside = gfns[(gfns >= first_gfn) & (gfns < first_gfn + pages)].astype(np.int64) - first_gfn
    # Exact in 64 bits: pages stay below 2^40 and bins below 2^12.
    counts = np.bincount(inside * bins // max(1, pages), minlength=bins)
    return tuple(counts.tolist())


def bin_range(index: int, pages: int, bins: int) -> tuple[int, int]:
    """The pages [first, last) of a bin, relative to the range's first page."""
    # The smallest page p with p * bins // pages == index.
    return -(-index * pages // bins), -(-(index + 1) * pages // bins)


def coarser(counts: tuple[int, ...], bins: int) -> tuple[int, ...]:
    """The same pages in fewer bins; ``bins`` divides the present number, else the counts stay as they are."""
    if len(counts) <= bins or len(counts) % bins:
        return counts
    step = len(counts) // bins
    return tuple(sum(counts[at : at + step]) for at in range(0, len(counts), step))


def level(count: int, size: int) -> int:
    """0 (none) to 6 (over 80 %): how full a bin of ``size`` pages is with ``count``."""
    share = count / size if size else 0.0
    return sum(share > threshold for threshold in LEVELS)
