"""A reader of "newc" archives, written from Documentation/driver-api/early-userspace/buffer-format.rst."""

from __future__ import annotations

from dataclasses import dataclass

FIELDS = (
    "ino", "mode", "uid", "gid", "nlink", "mtime", "filesize",
    "maj", "min", "rmaj", "rmin", "namesize", "chksum",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One member: its thirteen header fields by name, and its data."""

    fields: dict[str, int]
    data: bytes


def read(archive: bytes) -> dict[str, Entry]:
    """All members before the trailer, by name, in their order."""
    found: dict[str, Entry] = {}
    place = 0
    while True:
        assert archive[place : place + 6] == b"070701", f"no header at {place}"
        numbers = [int(archive[place + 6 + 8 * n : place + 14 + 8 * n], 16) for n in range(13)]
        fields = dict(zip(FIELDS, numbers, strict=True))
        place += 110
        name = archive[place : place + fields["namesize"]]
        assert name.endswith(b"\0")
        place = (place + fields["namesize"] + 3) // 4 * 4
        data = archive[place : place + fields["filesize"]]
        place = (place + fields["filesize"] + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            return found
        assert name[:-1].decode() not in found, "a name twice"
        found[name[:-1].decode()] = Entry(fields, data)
