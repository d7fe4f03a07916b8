"""The two things a lab reads from ELF files: the contents of a section, and the program's loader.

Layouts are those of ELF64, little-endian, in elf(5).
"""

from __future__ import annotations

import struct
from pathlib import Path

_MAGIC = b"\x7fELF\x02\x01"
_PT_INTERP = 3
_HEADERS = 1 << 16  # program headers follow the ELF header at once


def is_elf(path: Path) -> bool:
    """Whether a file is an ELF64 file of this machine's byte order."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def loader(path: Path) -> str | None:
    """The program that loads ``path`` (``ld-linux-x86-64.so.2`` with its folder); None for static ones."""
    with path.open("rb") as file:
        head = file.read(_HEADERS)
        if not head.startswith(_MAGIC):
            return None
        (table,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        for number in range(count):
            kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", head, table + size * number)
            if kind == _PT_INTERP:
                file.seek(offset)
                return file.read(length).rstrip(b"\0").decode()
    return None


def section(data: bytes, name: str) -> bytes:
    """The contents of the section of that name; nothing if there is none."""
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * number) for number in range(count)]
    strings = headers[names][4]
    for name_at, _, _, _, offset, length in headers:
        if data.startswith(name.encode() + b"\0", strings + name_at):
            return data[offset : offset + length]
    return b""
