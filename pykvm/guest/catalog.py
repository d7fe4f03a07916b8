"""The guests that come with the package: their images, sources and listings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import capstone

from pykvm.errors import ImageError, UsageError
from pykvm.guest.images import FOUR_GIB
from pykvm.guest.protocol import LOAD_ADDRESS, GuestHeader, Kind

_IMAGES: Final = Path(__file__).parent / "images"
_BITS: Final = {
    Kind.REAL: capstone.CS_MODE_16,
    Kind.PROTECTED16: capstone.CS_MODE_16,
    Kind.ROM: capstone.CS_MODE_16,
    Kind.PROTECTED32: capstone.CS_MODE_32,
    Kind.PAGED32: capstone.CS_MODE_32,
    Kind.PAE: capstone.CS_MODE_32,
    Kind.MULTIBOOT: capstone.CS_MODE_32,
}
_MULTIBOOT_ADDRESS: Final = 0x100000
_MODES: Final = {
    Kind.WORKLOAD: "long mode, CPL 0 or 3",
    Kind.REAL: "real mode",
    Kind.PROTECTED16: "16-bit protected mode",
    Kind.PROTECTED32: "32-bit protected mode",
    Kind.PAGED32: "32-bit protected mode with paging",
    Kind.PAE: "32-bit protected mode with PAE paging",
    Kind.LONG: "long mode",
    Kind.LA57: "long mode with 5-level paging",
    Kind.ROM: "real mode, from the reset vector",
    Kind.MULTIBOOT: "32-bit protected mode, multiboot",
}


@dataclass(frozen=True)
class CatalogGuest:
    """One guest: its header and its image (flat, or a multiboot file)."""

    header: GuestHeader
    image: bytes

    @property
    def name(self) -> str:
        return self.header.name

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return self.header.summary

    @property
    def modes(self) -> str:
        """The CPU modes that it runs in, in words."""
        return _MODES[self.header.kind]

    @property
    def load_address(self) -> int:
        """Where the image belongs (gpa); a multiboot file tells by itself, this is its first address."""
        if self.header.kind is Kind.ROM:
            return FOUR_GIB - len(self.image)
        return _MULTIBOOT_ADDRESS if self.header.kind is Kind.MULTIBOOT else LOAD_ADDRESS

    @property
    def source(self) -> str:
        """Its assembly source (GNU as, Intel syntax)."""
        return (_IMAGES / f"{self.name}.S").read_text()

    @property
    def disassembly(self) -> str:
        """A listing of the image's code: address as linked, bytes, instruction."""
        decoder = capstone.Cs(capstone.CS_ARCH_X86, _BITS.get(self.header.kind, capstone.CS_MODE_64))
        decoder.skipdata = True
        code, first = self.image[self.header.code :], self.header.entry
        lines = []
        for address, size, name, operands in decoder.disasm_lite(code, first):
            hexadecimal = code[address - first :][:size].hex(" ")
            lines.append(f"{address:08x}  {hexadecimal:<32}  {name} {operands}".rstrip())
        return "\n".join(lines)


def names() -> tuple[str, ...]:
    """The names of all guests, in alphabetical order.  Raises ImageError if they were not built."""
    found = tuple(sorted(file.stem for file in _IMAGES.glob("*.bin")))
    if not found:
        raise ImageError("The guest images are missing; build them with scripts/build_guests.py.")
    return found


def workloads() -> tuple[str, ...]:
    """The names of the workloads among them."""
    return tuple(name for name in names() if load(name).header.kind is Kind.WORKLOAD)


@cache
def load(name: str) -> CatalogGuest:
    """The guest of that name.  Raises UsageError with the known names, ImageError for a damaged image."""
    if name not in names():
        raise UsageError(f"There is no guest '{name}'; the guests are {', '.join(names())}.")
    image = (_IMAGES / f"{name}.bin").read_bytes()
    return CatalogGuest(GuestHeader.parse(image), image)


def include() -> str:
    """The include file with the guest-host protocol."""
    return (_IMAGES / "pykvm.inc").read_text()
