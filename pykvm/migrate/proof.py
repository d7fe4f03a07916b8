"""The proof: digests of every page, made and compared range by range, so that neither side waits long."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.migrate.messages import PAGES_NAMED
from pykvm.migrate.wire import DIGESTS_PER_FRAME, RECORD_SIZE, Pages

RECORD = np.dtype([("page", "<u8"), ("digest", "V16")])


class RangeDigests(NamedTuple):
    """Digests of the pages ``first`` to ``end`` - 1 that are not all zero."""

    first: int
    end: int
    records: npt.NDArray[np.void]


def digest_ranges(memory: GuestMemory, most: int = DIGESTS_PER_FRAME) -> Iterator[RangeDigests]:
    """Digests of the whole memory in ascending ranges without gaps; a hole joins the range behind it.

    At most ``most`` in each, by default what a frame holds: those of 64 MiB.
    """
    total = memory.size // PAGE_SIZE
    first = 0
    while first < total:
        data = next(memory.extents(first * PAGE_SIZE), None)
        begin = total if data is None else data[0] // PAGE_SIZE
        end = min(total, begin + most)
        yield RangeDigests(first, end, digest_range(memory, begin, end))
        first = end


def digest_range(memory: GuestMemory, first: int, end: int) -> npt.NDArray[np.void]:
    """Page numbers and BLAKE2b-128 digests of the pages of a range that are not all zero, ascending."""
    pages, digests = memory.page_digests(first * PAGE_SIZE, (end - first) * PAGE_SIZE)
    records = np.empty(len(pages), dtype=RECORD)
    records["page"] = pages
    records["digest"] = digests.view("V16").reshape(-1)
    return records


class RootDigest:
    """The digest over all records: BLAKE2b-128 of page numbers and digests in ascending order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.pages = 0

    def add(self, records: npt.NDArray[np.void]) -> None:
        self._hash.update(records.tobytes())
        self.pages += len(records)

    def hex(self) -> str:
        return self._hash.hexdigest()


def differing(ours: npt.NDArray[np.void], theirs: npt.NDArray[np.void]) -> Pages:
    """The pages whose digests differ, or that only one side has, ascending."""
    if ours.tobytes() == theirs.tobytes():
        return np.empty(0, dtype=np.uint64)
    ours_by, theirs_by = _by_page(ours), _by_page(theirs)
    pages = sorted(
        page for page in ours_by.keys() | theirs_by.keys() if ours_by.get(page) != theirs_by.get(page)
    )
    return np.array(pages, dtype=np.uint64)


def _by_page(records: npt.NDArray[np.void]) -> dict[int, bytes]:
    data = records.tobytes()
    return {
        int(page): data[at * RECORD_SIZE + 8 : (at + 1) * RECORD_SIZE]
        for at, page in enumerate(records["page"].tolist())
    }


class Comparison:
    """What the destination finds out, range by range."""

    def __init__(self) -> None:
        self.root = RootDigest()
        self.count = 0
        self.pages: list[int] = []

    def add(self, ours: npt.NDArray[np.void], theirs: npt.NDArray[np.void]) -> None:
        self.root.add(ours)
        pages = differing(ours, theirs)
        self.count += len(pages)
        self.pages += pages[: PAGES_NAMED - len(self.pages)].tolist()
