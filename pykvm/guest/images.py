"""Guest images: flat binaries, ELF files, multiboot kernels and ROMs, parsed with suspicion.

Whatever the bytes are, the only exception is ImageError.  Addresses are guest-physical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pykvm.errors import ImageError
from pykvm.guest.boot import BootMode
from pykvm.guest.elf import parse_elf
from pykvm.memory import PAGE_SIZE, GuestMemory

FOUR_GIB: Final = 1 << 32
ROM_LIMIT: Final = 16 << 20
REAL_LIMIT: Final = 1 << 20
FORMATS: Final = ("auto", "flat", "elf", "multiboot", "rom")

_MULTIBOOT_MAGIC: Final = 0x1BADB002
_MULTIBOOT_SEARCH: Final = 8192  # Multiboot specification 0.6.96, 3.1.1
_MULTIBOOT_HANDLED: Final = 0x7  # page-aligned modules, memory information, (ignored:) video mode
_MULTIBOOT_REQUIRED: Final = 0xFFFF
_MULTIBOOT_ADDRESSES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """``data`` goes to ``gpa``; the rest up to ``size`` bytes is zero."""

    gpa: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Image:
    """A parsed image: what goes where, where it starts (linear, with identity mapping) and in which mode."""

    format: str
    chunks: tuple[Chunk, ...]
    entry: int
    mode: BootMode

    def place(self, memory: GuestMemory) -> None:
        """Copy it into memory that the guest sees from gpa 0 on.  ImageError if it does not fit."""
        for chunk in self.chunks:
            if chunk.gpa + chunk.size > memory.size:
                raise ImageError(
                    f"The image needs memory up to {chunk.gpa + chunk.size:#x}, "
                    f"the guest has {memory.size:#x}; give it more."
                )
        for chunk in self.chunks:
            memory.write(chunk.gpa, chunk.data)


def load_image(
    data: bytes,
    format: str = "auto",
    *,
    address: int = 0x8000,
    entry: int | None = None,
    mode: BootMode | None = None,
) -> Image:
    """Parse an image.

    ``format``: ``flat`` (goes to ``address`` and starts at ``entry``, by default there), ``elf`` (32-
    or 64-bit x86, started in 32-bit protected or in long mode), ``multiboot`` (a 32-bit ELF file or one with
    addresses in its multiboot header), ``rom`` (ends at 4 GiB, started as after reset), or ``auto``, which
    tells multiboot and ELF by their magic numbers and takes anything else as flat.  ``mode`` overrides the
    mode of flat (real by default) and ELF images.  Raises ImageError.
    """
    if format not in FORMATS:
        raise ImageError(f"There is no image format '{format}'; use one of {', '.join(FORMATS)}.")
    if not data:
        raise ImageError("The image is empty.")
    if format == "auto":
        format = _detect(data)
    if format == "rom":
        return _rom(data)
    if format == "multiboot":
        return _multiboot(data)
    if format == "elf":
        return _elf(data, mode)
    return _flat(data, address, address if entry is None else entry, mode or BootMode.REAL)


def _detect(data: bytes) -> str:
    if _multiboot_header(data) is not None:
        return "multiboot"
    return "elf" if data.startswith(b"\x7fELF") else "flat"


def _flat(data: bytes, address: int, entry: int, mode: BootMode) -> Image:
    if not 0 <= address < 1 << 52:
        raise ImageError(f"A flat image cannot be loaded at {address:#x}.")
    if not address <= entry < address + len(data):
        raise ImageError(f"The entry point {entry:#x} is outside the image.")
    if mode is BootMode.REAL and entry >= REAL_LIMIT:
        raise ImageError(f"Real mode cannot start at {address:#x}; use an address below 1 MiB.")
    return Image("flat", (Chunk(address, data, len(data)),), entry, mode)


def _elf(data: bytes, mode: BootMode | None) -> Image:
    elf = parse_elf(data)
    default = BootMode.LONG if elf.bits == 64 else BootMode.PROTECTED32
    return Image("elf", _chunks(data), elf.entry, mode or default)


def _chunks(data: bytes) -> tuple[Chunk, ...]:
    return tuple(Chunk(gpa, content, size) for gpa, content, size in parse_elf(data).segments)


def _rom(data: bytes) -> Image:
    if len(data) % PAGE_SIZE or len(data) > ROM_LIMIT:
        raise ImageError(f"A ROM is a multiple of 4096 bytes up to 16 MiB, not {len(data)} bytes.")
    return Image("rom", (Chunk(FOUR_GIB - len(data), data, len(data)),), FOUR_GIB - 16, BootMode.REAL)


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _multiboot_header(data: bytes) -> int | None:
    """The offset of the multiboot header: 4-aligned, whole within the first 8192 bytes, sum zero."""
    for at in range(0, min(len(data), _MULTIBOOT_SEARCH) - 11, 4):
        if _word(data, at) == _MULTIBOOT_MAGIC:
            total = sum(_word(data, at + offset) for offset in (0, 4, 8))
            if total & 0xFFFFFFFF == 0:
                return at
    return None


def _multiboot(data: bytes) -> Image:
    at = _multiboot_header(data)
    if at is None:
        raise ImageError("The image has no multiboot header within its first 8192 bytes.")
    flags = _word(data, at + 4)
    unknown = flags & _MULTIBOOT_REQUIRED & ~_MULTIBOOT_HANDLED
    if unknown:
        raise ImageError(f"The multiboot header requires features {unknown:#x}, which are not supported.")
    if flags & _MULTIBOOT_ADDRESSES:
        chunk, entry = _multiboot_addresses(data, at)
        return Image("multiboot", (chunk,), entry, BootMode.PROTECTED32)
    elf = parse_elf(data)
    if elf.bits != 32:
        raise ImageError("A multiboot kernel is a 32-bit ELF file; convert it with 'objcopy -O elf32-i386'.")
    return Image("multiboot", _chunks(data), elf.entry, BootMode.PROTECTED32)


def _multiboot_addresses(data: bytes, at: int) -> tuple[Chunk, int]:
    """The address fields of a header that is not in an ELF file (specification, 3.1.3)."""
    if at + 32 > len(data):
        raise ImageError("The multiboot header ends before its address fields.")
    header, load, load_end, bss_end, entry = (_word(data, at + offset) for offset in range(12, 32, 4))
    start = at - (header - load)
    length = load_end - load if load_end else len(data) - start
    size = max(length, bss_end - load if bss_end else 0)
    if not 0 <= start <= at or length <= 0 or start + length > len(data) or load + size > FOUR_GIB:
        raise ImageError("The address fields of the multiboot header do not fit the file.")
    if not load <= entry < load + size:
        raise ImageError(f"The entry point {entry:#x} is outside the image.")
    return Chunk(load, data[start : start + length], size), entry
