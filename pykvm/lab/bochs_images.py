"""What Bochs finds in memory when it starts: a kernel, its layers and the few instructions that enter it.

Bochs can fill the guest's RAM from files before the first instruction.  So a lab needs no disk, no boot
loader and no BIOS call to read hundreds of megabytes: the files lie where Linux' boot protocol
(Documentation/arch/x86/boot.rst) wants them, and a ROM extension, which the BIOS calls after it has set up
ACPI and PCI, jumps to the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import HostError, UsageError
from pykvm.lab.cpio import join

SETUP_AT = 0x90000
COMMAND_LINE_AT = 0x9E000
CONVENTIONAL_END = 0x9FC00  # the BIOS keeps its extended data area above
KERNEL_AT = 0x100000
ROM_SIZE = 2048
ROM_AT = 0xD0000

_HEAP_END = 0xDE00  # from SETUP_AT: the setup's heap and stack end below the command line
_PAGE = 4096
_ACPI_TABLES = 1 << 20  # at the end of RAM
_ANY_LOADER = 0xFF
_CAN_USE_HEAP = 0x80
_OLDEST_PROTOCOL = 0x20C
_ROOM_PER_LAYER_BYTE = 2.25  # packed, unpacked, and something to run in


@dataclass(frozen=True)
class Image:
    """A file that Bochs puts at a physical address."""

    path: Path
    address: int


def rom(code: bytes) -> bytes:
    """A ROM extension of 2 KiB whose entry is ``code``; its bytes sum to 0, else the BIOS skips it."""
    body = b"\x55\xaa" + bytes([ROM_SIZE // 512]) + code
    if len(body) >= ROM_SIZE:
        raise ValueError("the code does not fit into the ROM")
    body = body.ljust(ROM_SIZE - 1, b"\0")
    return body + bytes([-sum(body) & 0xFF])


def video_rom() -> bytes:
    """In place of a VGA BIOS, without which Bochs does not start: it returns at once."""
    return rom(b"\xcb")


def boot_rom() -> bytes:
    """Enters the kernel's setup."""
    return rom(
        bytes.fromhex(
            "fa"  # cli
            "b80090 8ed8 8ec0 8ed0 8ee0 8ee8"  # ds, es, ss, fs, gs = SETUP_AT >> 4
            "bc00de"  # sp = _HEAP_END
            "ea00002090"  # jmp to the setup's second sector
        )
    )


def split(image: bytes, name: str) -> tuple[bytearray, bytes]:
    """Setup and kernel of a bzImage; HostError if it is none, or one older than Linux 4."""
    if image[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", image, 0x206)[0] < _OLDEST_PROTOCOL:
        raise HostError(
            f"{name} is no Linux kernel for x86; run 'pykvm lab clean --kernels' and prepare it again."
        )
    at = ((image[0x1F1] or 4) + 1) * 512
    return bytearray(image[:at]), image[at:]


def setup(head: bytearray, command_line: str, layers_at: int, layers_size: int) -> bytes:
    """The setup with its header filled in and the command line behind it, for ``SETUP_AT``."""
    (longest,) = struct.unpack_from("<I", head, 0x238)
    text = command_line.encode() + b"\0"
    if len(text) > min(longest + 1, CONVENTIONAL_END - COMMAND_LINE_AT):
        raise UsageError(f"The kernel's command line is too long: {len(text)} bytes.")
    head[0x210] = _ANY_LOADER
    head[0x211] |= _CAN_USE_HEAP
    struct.pack_into("<II", head, 0x218, layers_at, layers_size)
    struct.pack_into("<H", head, 0x224, _HEAP_END - 0x200)
    struct.pack_into("<I", head, 0x228, COMMAND_LINE_AT)
    return bytes(head).ljust(COMMAND_LINE_AT - SETUP_AT, b"\0") + text


def write(
    folder: Path, kernel: Path, layers: Sequence[Path], command_line: str, memory: int
) -> tuple[tuple[Image, ...], Image]:
    """Write everything below ``folder``: what goes into RAM of ``memory`` MiB, and the ROM.

    Raises UsageError if the layers do not fit into the memory.
    """
    head, rest = split(kernel.read_bytes(), str(kernel))
    size = join(layers, folder / "layers.img")
    (needed,) = struct.unpack_from("<I", head, 0x260)  # init_size: what it unpacks itself in
    if size * _ROOM_PER_LAYER_BYTE + needed + (64 << 20) > memory << 20:
        fit = int(size * _ROOM_PER_LAYER_BYTE + needed + (64 << 20)) // (1 << 20) + 1
        raise UsageError(
            f"The lab's files need {fit} MiB of memory and it has {memory}; give it more with --memory."
        )
    layers_at = ((memory << 20) - _ACPI_TABLES - size) & -_PAGE
    parts = {
        "setup.img": setup(head, command_line, layers_at, size),
        "kernel.img": rest,
        "boot.rom": boot_rom(),
        "video.rom": video_rom(),
    }
    for name, data in parts.items():
        (folder / name).write_bytes(data)
    images = (
        Image(folder / "setup.img", SETUP_AT),
        Image(folder / "kernel.img", KERNEL_AT),
        Image(folder / "layers.img", layers_at),
    )
    return images, Image(folder / "boot.rom", ROM_AT)
