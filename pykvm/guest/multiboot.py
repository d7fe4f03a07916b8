"""What a multiboot kernel finds in memory and registers (Multiboot specification 0.6.96, 3.2 and 3.3)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from pykvm.errors import ImageError
from pykvm.guest.boot import BootMode, BootState, boot_state
from pykvm.guest.images import Image
from pykvm.memory import PAGE_SIZE, GuestMemory

_LOADER_MAGIC: Final = 0x2BADB002
_INFO_SIZE: Final = 120
_MEMORY, _CMDLINE, _MODULES, _MAP, _LOADER_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
_BASE_MEMORY_END: Final = 0x9F000
_MIB: Final = 1 << 20
_EBDA_SEGMENT: Final = 0x40E
_BASE_KILOBYTES: Final = 0x413

# Where information and modules may go: test kernels use page 0 and 4 to 18 MiB without asking.
_WINDOWS: Final = ((0x10000, _BASE_MEMORY_END), (_MIB, 4 * _MIB), (18 * _MIB, 3 << 30))


class _Places:
    """Page-aligned free space in the windows, away from the image."""

    def __init__(self, memory: GuestMemory, image: Image) -> None:
        self._memory = memory
        self._taken = [(chunk.gpa, chunk.gpa + chunk.size) for chunk in image.chunks]

    def put(self, data: bytes) -> int:
        """Store ``data`` and return its gpa.  ImageError if there is no room."""
        for start, end in _WINDOWS:
            for gpa in self._candidates(start):
                stop = gpa + len(data)
                fits = start <= gpa and stop <= min(end, self._memory.size)
                if fits and all(stop <= low or high <= gpa for low, high in self._taken):
                    self._memory.write(gpa, data)
                    self._taken.append((gpa, stop))
                    return gpa
        raise ImageError(f"The guest's memory has no room for {len(data)} bytes of boot data; give it more.")

    def _candidates(self, start: int) -> Iterator[int]:
        yield start
        yield from sorted(-(-high // PAGE_SIZE) * PAGE_SIZE for _, high in self._taken)


def prepare_multiboot(
    memory: GuestMemory, image: Image, *, cmdline: str = "", modules: Sequence[tuple[bytes, str]] = ()
) -> BootState:
    """Place the kernel, its command line and modules (contents, name) and describe them; the first state.

    ``memory`` is seen from gpa 0 on; what lies above 3 GiB is not told to the kernel.  Raises ImageError if
    something does not fit.
    """
    image.place(memory)
    places = _Places(memory, image)
    table = b"".join(
        struct.pack("<IIII", at, at + len(content), places.put(name.encode() + b"\0"), 0)
        for content, name in modules
        for at in (places.put(content),)
    )
    # What a BIOS leaves in its data area: kernels look there for the end of base memory.
    memory.write(_EBDA_SEGMENT, struct.pack("<H", _BASE_MEMORY_END >> 4))
    memory.write(_BASE_KILOBYTES, struct.pack("<H", _BASE_MEMORY_END >> 10))
    top = min(memory.size, 3 << 30)
    regions = _memory_map(top)
    flags = _MEMORY | _CMDLINE | _MAP | _LOADER_NAME | (_MODULES if modules else 0)
    info = bytearray(_INFO_SIZE)
    struct.pack_into("<III", info, 0, flags, _BASE_MEMORY_END >> 10, max(top - _MIB, 0) >> 10)
    struct.pack_into("<I", info, 16, places.put(cmdline.encode() + b"\0"))
    struct.pack_into("<II", info, 20, len(modules), places.put(table) if modules else 0)
    struct.pack_into("<II", info, 44, len(regions), places.put(regions))
    struct.pack_into("<I", info, 64, places.put(b"pykvm\0"))
    state = boot_state(BootMode.PROTECTED32, entry=image.entry, stack=0)
    state.registers.rax = _LOADER_MAGIC
    state.registers.rbx = places.put(bytes(info))
    return state


def _memory_map(top: int) -> bytes:
    """Usable memory (type 1) below the video memory and from 1 MiB on."""
    regions = [(0, _BASE_MEMORY_END, 1), (_BASE_MEMORY_END, _MIB - _BASE_MEMORY_END, 2)]
    if top > _MIB:
        regions.append((_MIB, top - _MIB, 1))
    return b"".join(struct.pack("<IQQI", 20, base, length, kind) for base, length, kind in regions)
