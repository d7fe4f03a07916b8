"""PAGEMAP_SCAN(2const): the kernel finds the written pages and protects them anew in one go."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed
from pykvm.errors import HostError, KvmError
from pykvm.machine import DirtyPages, Gfns
from pykvm.memory import PAGE_SIZE
from pykvm.track.host_pages import HostTracker, open_pagemap
from pykvm.track.uffd import Userfaultfd

if TYPE_CHECKING:
    from pykvm.abi.library import CData

_REGIONS = 4096


class PagemapTracker(HostTracker):
    """Asynchronous userfaultfd write-protection, read by PAGEMAP_SCAN (linux 6.7).

    A collection walks the page tables of all guest memory in the kernel and returns runs of written pages,
    so its cost follows the populated memory, and what it returns is protected when it comes out.
    """

    name = "pagemap"

    def __init__(self) -> None:
        super().__init__()
        self._fd: Userfaultfd | None = None
        self._pagemap: Managed | None = None
        # SAFETY: the kernel writes at most _REGIONS regions, as the request says; both live with the tracker.
        self._regions = np.zeros((_REGIONS, 3), dtype=np.uint64)
        self._request = ffi.new("struct pm_scan_arg *")

    def start(self) -> None:
        self._fd = Userfaultfd(asynchronous=True)
        self._pagemap = Managed(Managed.new_handle(open_pagemap()))
        for each in self.ranges:
            self._fd.register(each.start, each.length)
            self._fd.protect(each.start, each.length)

    def stop(self) -> None:
        fd, self._fd = self._fd, None
        pagemap, self._pagemap = self._pagemap, None
        if fd is not None:
            fd.close()
        if pagemap is not None:
            pagemap.close()

    def written(self) -> Iterator[Gfns]:
        for each in self.ranges:
            yield from self._scan(each.start, each.end)

    def _scan(self, start: int, end: int) -> Iterator[Gfns]:
        request, regions = self._request, self._regions
        request.size = ffi.sizeof("struct pm_scan_arg")
        request.flags = lib.PM_SCAN_WP_MATCHING | lib.PM_SCAN_CHECK_WPASYNC
        request.vec = regions.ctypes.data
        request.vec_len = _REGIONS
        request.category_mask = request.return_mask = lib.PAGE_IS_WRITTEN
        request.end = end
        while start < end:
            request.start = start
            count = self._ioctl(request)
            start = int(request.walk_end)
            found = [
                np.arange(first // PAGE_SIZE, last // PAGE_SIZE, dtype=np.uint64)
                for first, last in regions[:count, :2].tolist()
            ]
            if found:
                yield np.concatenate(found)

    def _ioctl(self, request: CData) -> int:
        assert self._pagemap is not None
        try:
            return self._pagemap.ioctl(lib.PAGEMAP_SCAN, request, "PAGEMAP_SCAN")
        except KvmError as error:
            if error.errno != errno.ENOTTY:
                raise
            raise HostError(
                "This kernel has no PAGEMAP_SCAN (linux 6.7); use the userfaultfd tracker."
            ) from error

    def rearm(self, pages: DirtyPages) -> None:
        """Nothing: they came out protected."""
