"""Guest memory: a sparse, shareable memfd with bounds-checked access.

Memory is a plain object of its own, apart from memslots: several slots may show parts of it, at several
addresses, in several machines.  Pages cost nothing until they are touched, so 1 TiB on a small host is
fine.  Offsets are bytes into the memory, not guest-physical addresses.

SAFETY: the mapping belongs to a Python mmap object.  Views hold a reference to it, and a slot pins the
GuestMemory, so the pages stay mapped until the last of them is gone even if ``close`` came first.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from pykvm.abi import ffi, lib
from pykvm.errors import ClosedError, HostError, UsageError

if TYPE_CHECKING:
    from pykvm.abi.library import CData

PAGE_SIZE = 4096
_ZERO_PAGE = bytes(PAGE_SIZE)
_MAP_NORESERVE = 0x4000  # <asm-generic/mman-common.h>; the mmap module has it from 3.13 on
_HUGE = {"2M": 21, "1G": 30}
Discarded = Callable[["GuestMemory", int, int], None]
"""Told of pages that the host dropped: memory, offset and length in bytes."""


class _Backing:
    """The memfd and its mapping; both go with the last reference, so no call can meet a reused fd."""

    __slots__ = ("fd", "map")

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self.fd = fd
        self.map = mapping

    def __del__(self) -> None:
        os.close(self.fd)


class GuestMemory:
    """``size`` bytes of zeroed memory (a multiple of 4096, up to 2^47).

    ``huge``: None for 4 KiB pages, ``"2M"`` or ``"1G"`` for hugetlb pages (which the host must have
    reserved).  Raises UsageError for a bad size, HostError where the host cannot provide it.
    """

    def __init__(self, size: int, *, huge: str | None = None, name: str = "pykvm") -> None:
        if not isinstance(size, int) or size <= 0 or size % PAGE_SIZE or size > 1 << 47:
            raise UsageError(
                f"Guest memory of {size} bytes: the size must be a multiple of 4096 up to 128 TiB."
            )
        flags = os.MFD_CLOEXEC
        if huge is not None:
            if huge not in _HUGE:
                raise UsageError(f"Huge pages of size {huge!r}: use '2M' or '1G'.")
            if size % (1 << _HUGE[huge]):
                raise UsageError(f"Guest memory of {size} bytes is not a multiple of its {huge} pages.")
            flags |= os.MFD_HUGETLB | _HUGE[huge] << os.MFD_HUGE_SHIFT
        try:
            fd = os.memfd_create(name, flags)
        except OSError as error:
            raise HostError(f"Cannot create guest memory: {error.strerror}.") from error
        try:
            os.ftruncate(fd, size)
            extra = 0 if huge else _MAP_NORESERVE
            mapping = mmap.mmap(
                fd, size, flags=mmap.MAP_SHARED | extra, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        except (OSError, ValueError) as error:
            os.close(fd)
            remedy = (
                f"reserve {huge} pages in /proc/sys/vm/nr_hugepages or do without" if huge else "ask for less"
            )
            raise HostError(f"Cannot map {size} bytes of guest memory ({error}); {remedy}.") from error
        self.size = size
        self._huge = huge is not None
        self._huge_shift = _HUGE[huge] if huge is not None else 0
        self._backing: _Backing | None = _Backing(fd, mapping)
        self._pins = 0
        self._closed = False
        self._told: list[weakref.WeakMethod[Discarded]] = []
        self._lock = threading.Lock()

    @property
    def page_size(self) -> int:
        """Bytes of the host's pages behind it: 4096, or those of hugetlb."""
        return 1 << self._huge_shift if self._huge else PAGE_SIZE

    # --- lifetime --------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End access through this object.  The pages go when no slot and no view uses them any more."""
        with self._lock:
            self._closed = True
            self._drop_if_unused()

    def _drop_if_unused(self) -> None:
        if self._closed and not self._pins:
            self._backing = None

    def pin(self) -> int:
        """Keep the mapping alive for a memslot; returns the host address.  Raises ClosedError."""
        with self._lock:
            backing = self._open()
            self._pins += 1
            return int(ffi.cast("uintptr_t", ffi.from_buffer(backing.map)))

    def unpin(self) -> None:
        """Undo one ``pin``."""
        with self._lock:
            self._pins -= 1
            self._drop_if_unused()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- access ----------------------------------------------------------------------------------

    def _open(self) -> _Backing:
        backing = self._backing
        if self._closed or backing is None:
            raise ClosedError("The guest memory is closed; create a new one.")
        return backing

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise UsageError(
                f"[{offset:#x}, {offset + length:#x}) is outside guest memory of {self.size:#x} bytes."
            )

    def read(self, offset: int, length: int) -> bytes:
        """Copy ``length`` bytes out.  Reading a page that was never written does not allocate it."""
        backing = self._open()
        self._check(offset, length)
        parts = []
        while length:
            part = os.pread(backing.fd, min(length, 1 << 30), offset)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes in.  A guest's dirty log does not see this (api.rst 4.8)."""
        backing = self._open()
        data = memoryview(data).cast("B")
        self._check(offset, len(data))
        if len(data) < PAGE_SIZE or self._huge:  # hugetlb files cannot be written
            backing.map[offset : offset + len(data)] = data
            return
        # Through the file: no fault and no zeroing per page, so twice as fast where pages are new.
        while data:
            try:
                count = os.pwrite(backing.fd, data, offset)
            except OSError as error:
                raise HostError(f"Cannot store guest memory: {error.strerror}; free some memory.") from error
            data = data[count:]
            offset += count

    def view(self, offset: int = 0, length: int | None = None) -> npt.NDArray[np.uint8]:
        """A live, writable array of bytes; it keeps the memory mapped as long as it exists."""
        backing = self._open()
        length = self.size - offset if length is None else length
        self._check(offset, length)
        return np.frombuffer(backing.map, dtype=np.uint8, count=length, offset=offset)

    def pointer(self) -> CData:
        """The mapping as ``char[]`` for the C helpers; keeps it mapped as long as it exists."""
        return ffi.from_buffer("char[]", self._open().map)

    def discard(self, offset: int, length: int) -> None:
        """Make whole pages zero again and free them (fallocate PUNCH_HOLE)."""
        backing = self._open()
        self._check(offset, length)
        if offset % PAGE_SIZE or length % PAGE_SIZE:
            raise UsageError("Only whole pages can be discarded.")
        # SAFETY: plain numbers; ``backing`` keeps the descriptor open during the call.
        result = lib.pykvm_punch_hole(backing.fd, offset, length) if length else 0
        if result < 0:
            raise HostError(f"Cannot discard guest memory: {os.strerror(-result)}.")
        for each in list(self._told):
            method = each()
            if method is not None:
                method(self, offset, length)

    def notify_discards(self, method: Discarded) -> None:
        """Have a method called after ``discard`` with the memory, offset and length, as long as its object
        lives: what the kernel's MMU notifiers are to KVM."""
        self._told = [each for each in self._told if each() not in (None, method)]
        self._told.append(weakref.WeakMethod(method))

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """The ranges (offset, length) within the given one that hold allocated pages, ascending.

        Everything else is zero.  Allocated pages may be zero, too.  Touches nothing (SEEK_DATA).
        """
        backing = self._open()
        length = self.size - offset if length is None else length
        self._check(offset, length)
        end = offset + length
        while offset < end:
            try:
                start = os.lseek(backing.fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            if start >= end:
                return
            stop = min(os.lseek(backing.fd, start, os.SEEK_HOLE), end)
            yield start, stop - start
            offset = stop

    @property
    def allocated(self) -> int:
        """Bytes that the host really spends on this memory."""
        return os.fstat(self._open().fd).st_blocks * 512

    def page_digests(
        self, offset: int = 0, length: int | None = None
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """The pages that are not all zero and their BLAKE2b-128 digests, of the whole memory or of some pages
        (offset and length in bytes, multiples of 4096).

        Returns (page numbers ascending, array of shape (n, 16)).  Two memories of one size are equal if and
        only if both arrays are.  Time and memory follow the allocated pages, not the size.
        """
        if offset % PAGE_SIZE or (length or 0) % PAGE_SIZE:
            raise UsageError("Digests are of whole pages: offset and length must be multiples of 4096.")
        pages: list[int] = []
        digests = bytearray()
        for begin, span in self.extents(offset, length):
            for start in range(begin, begin + span, 1 << 20):
                block = memoryview(self.read(start, min(1 << 20, begin + span - start)))
                for at in range(0, len(block), PAGE_SIZE):
                    page = block[at : at + PAGE_SIZE]
                    if page != _ZERO_PAGE:
                        pages.append((start + at) // PAGE_SIZE)
                        digests += hashlib.blake2b(page, digest_size=16).digest()
        return (
            np.array(pages, dtype=np.uint64),
            np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, 16),
        )

    def __repr__(self) -> str:
        state = " (closed)" if self._closed else ""
        return f"<GuestMemory of {self.size:#x} bytes{state}>"
