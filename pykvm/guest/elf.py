"""Reading the loadable segments of an x86 ELF executable (System V ABI, chapters 4 and 5)."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final, NamedTuple

from pykvm.errors import ImageError

_EM_386: Final = 3
_EM_X86_64: Final = 62
_ET_EXEC: Final = 2
_PT_LOAD: Final = 1
_MAX_SEGMENTS: Final = 1024
_HEADERS: Final = {32: struct.Struct("<16sHHIIIIIHHHHHH"), 64: struct.Struct("<16sHHIQQQIHHHHHH")}
_SEGMENTS: Final = {32: struct.Struct("<IIIIIIII"), 64: struct.Struct("<IIQQQQQQ")}


class ElfSegment(NamedTuple):
    """``data`` goes to the physical address ``gpa``; the rest up to ``size`` bytes is zero."""

    gpa: int
    data: bytes
    size: int


class Elf(NamedTuple):
    """``bits`` is 32 or 64; ``entry`` is the entry point's physical address."""

    bits: int
    entry: int
    segments: tuple[ElfSegment, ...]


def parse_elf(data: bytes) -> Elf:
    """Raises ImageError unless ``data`` is a static x86 executable whose segments lie within the file,
    within the physical address space and apart from each other, with the entry point in one of them."""
    bits = _bits(data)
    header = _HEADERS[bits]
    if len(data) < header.size:
        raise ImageError("The ELF file ends within its header.")
    _, kind, machine, _, entry, table, _, _, _, entry_size, count, *_ = header.unpack_from(data)
    if machine != (_EM_386 if bits == 32 else _EM_X86_64):
        raise ImageError(f"The ELF file is for machine {machine}, not for x86.")
    if kind != _ET_EXEC:
        raise ImageError("The ELF file is not a static executable (type EXEC); link it without -pie.")
    layout = _SEGMENTS[bits]
    if entry_size != layout.size or not 0 < count <= _MAX_SEGMENTS or table + count * entry_size > len(data):
        raise ImageError("The ELF file's table of segments is damaged.")
    segments = []
    start = None
    for number in range(count):
        values = layout.unpack_from(data, table + number * entry_size)
        if bits == 32:
            kind, offset, linear, gpa, in_file, size, *_ = values
        else:
            kind, _, offset, linear, gpa, in_file, size, _ = values
        if kind != _PT_LOAD or size == 0:
            continue
        if in_file > size or offset + in_file > len(data) or gpa + size > 1 << 52:
            raise ImageError(f"Segment {number} of the ELF file lies outside the file or the address space.")
        segments.append(ElfSegment(gpa, data[offset : offset + in_file], size))
        if start is None and linear <= entry < linear + size:
            start = entry - linear + gpa
    if start is None:
        raise ImageError(f"The ELF file's entry point {entry:#x} is in none of its loadable segments.")
    _check_apart(segments)
    return Elf(bits, start, tuple(segments))


def _bits(data: bytes) -> int:
    if len(data) < 16 or not data.startswith(b"\x7fELF"):
        raise ImageError("The image is not an ELF file.")
    if data[4] not in {1, 2} or data[5] != 1:
        raise ImageError("The ELF file is not a little-endian 32- or 64-bit one.")
    return 32 if data[4] == 1 else 64


def _check_apart(segments: list[ElfSegment]) -> None:
    ordered = sorted(segments)
    for one, two in pairwise(ordered):
        if one.gpa + one.size > two.gpa:
            raise ImageError(f"Segments of the ELF file overlap at {two.gpa:#x}.")
