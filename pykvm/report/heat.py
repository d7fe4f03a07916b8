"""Heat maps of guest memory: how many pages of each part of the address space are in a set."""

from __future__ import annotations

import numpy as np

from pykvm.machine.dirty import Gfns

LEVELS = (0.0, 0.01, 0.05, 0.2, 0.5, 0.8)
"""A bin is at level n+1 if more than LEVELS[n] of its pages are in the set; level 0 is none of them."""


def bin_width(pages: int, bins: int) -> int:
    """Pages in each part if ``pages`` are divided into at most ``bins``; the last part may be smaller."""
    return max(1, -(-pages // bins))


def bin_sizes(pages: int, bins: int) -> tuple[int, ...]:
    """Pages in each part."""
    width = bin_width(pages, bins)
    return tuple(min(width, pages - first) for first in range(0, pages, width))


def bin_pages(numbers: Gfns, pages: int, bins: int) -> tuple[int, ...]:
    """How many of ``numbers`` (page numbers below ``pages``) fall into each part; others are not counted."""
    width = bin_width(pages, bins)
    inside = numbers[numbers < pages].astype(np.int64)
    return tuple(np.bincount(inside // width, minlength=-(-pages // width)).tolist())


def coarser(counts: tuple[int, ...], bins: int) -> tuple[int, ...]:
    """The sums of neighbours, so that at most ``bins`` remain; good for counts and for sizes."""
    step = bin_width(len(counts), bins)
    return tuple(sum(counts[at : at + step]) for at in range(0, len(counts), step))


def level(count: int, size: int) -> int:
    """0 (none) to 6 (over 80 %): how full a bin of ``size`` pages is with ``count``."""
    share = count / size if size else 0.0
    return sum(share > threshold for threshold in LEVELS)
