"""Guest memory that the host maps with 2 MiB pages."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pykvm.abi import ffi
from pykvm.memory import GuestMemory

SIZE_2M = 2 << 20


def why_not() -> str | None:
    """A sentence where the host makes no transparent huge pages on request."""
    try:
        enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        enabled = ""
    if "[always]" in enabled or "[madvise]" in enabled:
        return None
    return "This host makes no transparent huge pages (transparent_hugepage/enabled)."


class UntouchedPages(GuestMemory):
    """``size`` bytes of private anonymous memory that nobody has touched, without huge pages.

    SAFETY: as GuestMemory: the mmap object owns the mapping.
    """

    def __init__(self, size: int) -> None:
        super().__init__(4096)
        self.size = size
        self._anonymous = mmap.mmap(
            -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self._anonymous.madvise(mmap.MADV_NOHUGEPAGE)

    def pin(self) -> int:
        super().pin()
        return int(ffi.cast("uintptr_t", ffi.from_buffer(self._anonymous)))


class HugePages(GuestMemory):
    """``size`` bytes of anonymous memory in transparent huge pages, beginning ``skew`` bytes after a multiple
    of 2 MiB in the host's addresses.

    SAFETY: as GuestMemory: the mmap object owns the mapping, views refer to it.
    """

    def __init__(self, size: int, *, skew: int = 0) -> None:
        super().__init__(4096)
        self.size = size
        self._anonymous = mmap.mmap(
            -1,
            size + 2 * SIZE_2M,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
        base = int(ffi.cast("uintptr_t", ffi.from_buffer(self._anonymous)))
        self._begin = -base % SIZE_2M + skew
        self._anonymous.madvise(mmap.MADV_HUGEPAGE)
        self.view()[::4096] = 0

    def pin(self) -> int:
        super().pin()
        return int(ffi.cast("uintptr_t", ffi.from_buffer(self._anonymous))) + self._begin

    def read(self, offset: int, length: int) -> bytes:
        return self.view(offset, length).tobytes()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.view(offset, len(data))[:] = np.frombuffer(data, dtype=np.uint8)

    def view(self, offset: int = 0, length: int | None = None) -> npt.NDArray[np.uint8]:
        length = self.size - offset if length is None else length
        self._check(offset, length)
        return np.frombuffer(self._anonymous, dtype=np.uint8, count=length, offset=self._begin + offset)

    @property
    def page_size(self) -> int:
        return SIZE_2M

    @property
    def huge_bytes(self) -> int:
        """How much of it the host really maps with huge pages."""
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._anonymous)))
        found = inside = 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                inside = start <= address + self._begin < end
            elif first == "AnonHugePages:" and inside:
                found += int(line.split()[1]) * 1024
        return found
