"""Dirty bitmaps of the model: exactly the pages that were written (docs/reference/kvm-mmu.md, 3)."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from pykvm.machine.dirty import Gfns

_WORD: Final = 64

Words = npt.NDArray[np.uint64]


class DirtyBitmap:
    """One bit a page of a slot, the bits beyond its end always 0.

    The zeroed array comes from the host untouched, so a huge slot costs what of it is written.
    """

    def __init__(self, pages: int, *, full: bool) -> None:
        self.words: Words = np.zeros((pages + _WORD - 1) // _WORD, dtype=np.uint64)
        if full:
            self.words[:] = np.iinfo(np.uint64).max
            if pages % _WORD:
                self.words[-1] = (1 << pages % _WORD) - 1
        self._bytes = memoryview(self.words).cast("B")  # type: ignore[arg-type]

    def mark(self, page: int) -> None:
        """The guest wrote to the page."""
        self._bytes[page >> 3] |= 1 << (page & 7)

    def take(self, clear: bool) -> Words:
        """A copy of the words, which are all zero afterwards with ``clear``."""
        copy = self.words.copy()
        if clear:
            self.words[np.flatnonzero(copy)] = 0
        return copy

    def take_pages(self, clear: bool) -> Gfns:
        """The marked pages, ascending; afterwards there are none with ``clear``."""
        where = np.flatnonzero(self.words)
        found = self.words[where]
        bits = np.unpackbits(found.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        word, bit = np.nonzero(bits)
        if clear:
            self.words[where] = 0
        return (where[word] * _WORD + bit).astype(np.uint64)

    def clear(self, first_page: int, words: Words) -> None:
        """Unmark the pages whose bits are set in ``words``, bit 0 being ``first_page``."""
        start = first_page // _WORD
        words = words[: len(self.words) - start]
        self.words[start : start + len(words)] &= ~words
