"""The dirty bitmap of one memslot (kvm-mmu.md 3): sparse, so that a huge slot costs what of it is dirty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
WORD: Final = 64
_ONES: Final = (1 << WORD) - 1


class DirtyBitmap:
    """One bit a page.  ``initially_set``: all ``npages`` bits start as 1, the padding never."""

    def __init__(self, npages: int, *, initially_set: bool = False) -> None:
        self.npages = npages
        self._words: dict[int, int] = {}
        self._rest = _ONES if initially_set else 0

    @property
    def nwords(self) -> int:
        """64-bit words of the bitmap, padding included."""
        return (self.npages + WORD - 1) // WORD

    def _initial(self, index: int) -> int:
        if self._rest and index == self.npages // WORD:
            return (1 << self.npages % WORD) - 1
        return self._rest

    def word(self, index: int) -> int:
        """The bits of pages 64*index to 64*index+63."""
        found = self._words.get(index)
        return self._initial(index) if found is None else found

    def mark(self, page: int) -> None:
        """Set the bit of a page, counted within the slot."""
        index = page >> 6
        self._words[index] = self.word(index) | 1 << (page & 63)

    def is_marked(self, page: int) -> bool:
        """Whether the page's bit is set."""
        return bool(self.word(page >> 6) >> (page & 63) & 1)

    def exchange(self, index: int) -> int:
        """Take a word's bits and leave it zero."""
        bits = self.word(index)
        if self._rest or bits:
            self._words[index] = 0
        return bits

    def clear(self, index: int, mask: int) -> int:
        """Clear the bits of ``mask`` in a word: those that were set."""
        word = self.word(index)
        if word & mask:
            self._words[index] = word & ~mask
        return word & mask

    def nonzero(self) -> Iterator[int]:
        """Indices of words with a set bit, ascending."""
        if self._rest:
            yield from (index for index in range(self.nwords) if self.word(index))
        else:
            yield from sorted(index for index, word in self._words.items() if word)

    def words(self) -> Words:
        """A copy as 64-bit words."""
        result = np.zeros(self.nwords, dtype=np.uint64)
        for index in self.nonzero():
            result[index] = self.word(index)
        return result
