"""Memory that a traced child and its parent share, at fixed addresses with nothing mapped around it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from pykvm.errors import UsageError

PAGE: Final = 4096
CODE: Final = 0x1000_0000
"""One page of code that the child can read and execute."""
DATA: Final = 0x1001_0000
"""Four pages that the child can read and write, then one that it can only read; unmapped on both sides."""
WRITABLE_PAGES: Final = 4
READ_ONLY: Final = DATA + WRITABLE_PAGES * PAGE
DATA_END: Final = READ_ONLY + PAGE

_DATA_BYTES: Final = DATA_END - DATA
_ZEROS: Final = bytes(_DATA_BYTES)

Changes = tuple[tuple[int, bytes], ...]
"""What was written: (address, new bytes), ascending, each run as long as possible."""


def changes(before: bytes, after: bytes, base: int) -> Changes:
    """The runs of bytes in which two images of equal length differ; ``base`` is the first byte's address."""
    if before == after:
        return ()
    different = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
    starts = np.flatnonzero(np.diff(different, prepend=-2) > 1)
    runs: list[tuple[int, bytes]] = []
    for run in np.split(different, starts[1:]):
        first, last = int(run[0]), int(run[-1])
        runs.append((base + first, after[first : last + 1]))
    return tuple(runs)


def place(image: bytearray | memoryview, base: int, patches: Iterable[tuple[int, bytes]]) -> None:
    """Write (address, bytes) into the image of memory from ``base`` on.  Raises UsageError outside of it."""
    for address, data in patches:
        at = address - base
        if not 0 <= at <= len(image) - len(data):
            raise UsageError(
                f"{len(data)} bytes at {address:#x} are not inside the arena; see pykvm.observe."
            )
        image[at : at + len(data)] = data


class Arena:
    """A memfd of the code page and the data pages, mapped writable here whatever the child may do with it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("pykvm-arena", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, PAGE + _DATA_BYTES)
        self._map = mmap.mmap(self.fd, PAGE + _DATA_BYTES)
        self._before = _ZEROS

    def close(self) -> None:
        """Unmap and close; twice does nothing."""
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    def set_code(self, address: int, code: bytes, filler: int) -> None:
        """Fill the code page with ``filler``, put ``code`` at ``address``; the page's end cuts it off."""
        offset = address - CODE
        page = bytearray([filler]) * PAGE
        page[offset : offset + len(code)] = code[: PAGE - offset]
        self._map[:PAGE] = bytes(page)

    def set_data(self, patches: Mapping[int, bytes]) -> None:
        """Zero the data pages but for ``patches``."""
        if patches:
            image = bytearray(_DATA_BYTES)
            place(image, DATA, patches.items())
            self._before = bytes(image)
        else:
            self._before = _ZEROS
        self._map[PAGE:] = self._before

    def changes(self) -> Changes:
        """What was written since ``set_data``."""
        return changes(self._before, self._map[PAGE:], DATA)
