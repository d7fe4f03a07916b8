"""userfaultfd write-protection: every writer through the slots' mapping is seen, devices included."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from pykvm.abi import ffi, lib
from pykvm.errors import HostError, KvmError, UsageError
from pykvm.machine import DirtyPages, Gfns
from pykvm.memory import PAGE_SIZE
from pykvm.track.host_pages import HostTracker, open_pagemap, runs
from pykvm.track.uffd import Userfaultfd

if TYPE_CHECKING:
    from pykvm.abi.library import CData

Mode = Literal["sync", "async"]
_PROTECTED = np.uint64(1 << 57)
"""Bit of an entry of /proc/self/pagemap (admin-guide/mm/pagemap.rst)."""
_BLOCK = 1 << 17
"""Pages whose entries are read at once: 1 MiB of them."""


class UserfaultfdTracker(HostTracker):
    """The first write to a page after it was protected is a fault of the writer's.

    In mode ``async`` (linux 6.7) the kernel lifts the protection by itself, and a collection reads which
    pages have none any more: 8 bytes per page of guest memory.  In mode ``sync`` (linux 5.19) a thread of C
    answers each fault, and a collection reads a bit per page.  The default is ``async`` where there is it.
    """

    name = "userfaultfd"

    def __init__(self, mode: Mode | None = None) -> None:
        if mode not in (None, "sync", "async"):
            raise UsageError(f"userfaultfd mode {mode!r} does not exist; use 'sync' or 'async'.")
        super().__init__()
        self.mode = mode
        """As asked for; which one it is, once armed."""
        self._asked = mode
        self._fd: Userfaultfd | None = None
        self._pagemap = -1
        self._faults: CData | None = None
        self._words: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []
        self._c_ranges: CData | None = None

    @property
    def faults(self) -> int:
        """Faults that were answered since ``arm``; 0 in mode ``async``."""
        return 0 if self._faults is None else int(lib.pykvm_faults_count(self._faults))

    def start(self) -> None:
        self.mode = self._asked or ("async" if Userfaultfd.has_asynchronous() else "sync")
        self._fd = Userfaultfd(asynchronous=self.mode == "async")
        for each in self.ranges:
            self._fd.register(each.start, each.length)
        if self.mode == "async":
            self._pagemap = open_pagemap()
        else:
            self._start_thread(self._fd)
        for each in self.ranges:
            self._fd.protect(each.start, each.length)

    def _start_thread(self, fd: Userfaultfd) -> None:
        self._words = [np.zeros((each.pages + 63) // 64, dtype=np.uint64) for each in self.ranges]
        # SAFETY: the thread writes to ``_words`` through ``_c_ranges``; both are held until it was stopped.
        self._c_ranges = ffi.new(f"struct pykvm_fault_range[{max(1, len(self.ranges))}]")
        for number, (each, words) in enumerate(zip(self.ranges, self._words, strict=True)):
            self._c_ranges[number].start = each.start
            self._c_ranges[number].pages = each.pages
            self._c_ranges[number].words = ffi.cast("__u64 *", words.ctypes.data)
        error = ffi.new("int *")
        faults = lib.pykvm_faults_start(fd.fileno(), self._c_ranges, len(self.ranges), error)
        if faults == ffi.NULL:
            raise HostError(f"Cannot start a thread for page faults: {os.strerror(error[0])}.")
        self._faults = faults

    def stop(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None and self._faults is not None:
            for each in self.ranges:  # from here on there are no new faults; the thread answers the others
                with contextlib.suppress(KvmError):  # not registered yet, when arming failed
                    fd.unregister(each.start, each.length)
            faults, self._faults = self._faults, None
            lib.pykvm_faults_stop(faults)
        if fd is not None:
            fd.close()
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1
        self._words, self._c_ranges = [], None

    def written(self) -> Iterator[Gfns]:
        for number, each in enumerate(self.ranges):
            first = each.start // PAGE_SIZE
            if self._faults is None:
                yield from self._unprotected(first, each.pages)
            else:
                words = np.zeros_like(self._words[number])
                # SAFETY: as long as the range's bitmap, and held by this frame.
                lib.pykvm_faults_take(self._faults, number, ffi.cast("__u64 *", words.ctypes.data))
                bits = np.unpackbits(words.view(np.uint8), bitorder="little")
                yield np.flatnonzero(bits).astype(np.uint64) + np.uint64(first)

    def _unprotected(self, first: int, pages: int) -> Iterator[Gfns]:
        """The pages without protection, from /proc/self/pagemap."""
        for start in range(first, first + pages, _BLOCK):
            count = min(_BLOCK, first + pages - start)
            entries = np.frombuffer(os.pread(self._pagemap, count * 8, start * 8), dtype=np.uint64)
            yield np.flatnonzero(entries & _PROTECTED == 0).astype(np.uint64) + np.uint64(start)

    def rearm(self, pages: DirtyPages) -> None:
        """Protect the pages anew; in mode ``async`` they are reported again until then."""
        fd = self._fd
        if fd is not None:
            for first, count in runs(self.host_pages(pages)):
                fd.protect(first * PAGE_SIZE, count * PAGE_SIZE)
