"""Archives that the kernel unpacks as its first file system.

The format is "newc" of Documentation/driver-api/early-userspace/buffer-format.rst: a header of 110 ASCII
characters, the name, the data, each padded to four bytes.  The kernel unpacks any number of them one after
the other, and the last file of a name wins, which is why a lab's system is made of layers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Self

from pykvm.errors import HostError

_TRAILER = "TRAILER!!!"
_LARGEST = 0xFFFF_FFFF


class CpioWriter:
    """Writes one archive to a binary file; a context manager that ends it with the trailer.

    Names are absolute paths in the guest.  Parent folders come by themselves, and a name that is there
    already is left as it is.  Owner is root.  Files keep their modification time in whole seconds, since
    Python trusts compiled bytecode by it.
    """

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._names: set[str] = set()
        self._inode = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            self._entry(_TRAILER, 0, b"", 0, (0, 0))

    def __contains__(self, name: str) -> bool:
        return name.strip("/") in self._names

    def folder(self, name: str, mode: int = 0o755) -> None:
        """A folder; those above it are made, too."""
        self._add(name, stat.S_IFDIR | mode, b"", 0)

    def file(self, name: str, data: bytes, mode: int = 0o644, mtime: int = 0) -> None:
        """A file with its contents."""
        self._add(name, stat.S_IFREG | mode, data, mtime)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, os.fsencode(target), 0)

    def device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device."""
        self._add(name, stat.S_IFCHR | mode, b"", 0, (major, minor))

    def copy(self, source: Path, name: str | None = None) -> None:
        """A file, folder (without what is in it) or link of this machine; other kinds are left out.

        ValueError for a file that is too large for the format.
        """
        name = str(source) if name is None else name
        found = source.lstat()
        mode = stat.S_IMODE(found.st_mode)
        if stat.S_ISLNK(found.st_mode):
            self.link(name, os.readlink(source))
        elif stat.S_ISDIR(found.st_mode):
            self.folder(name, mode)
        elif stat.S_ISREG(found.st_mode):
            _check_size(name, found.st_size)  # before it is read into memory
            self.file(name, source.read_bytes(), mode, int(found.st_mtime))

    def _add(self, name: str, mode: int, data: bytes, mtime: int, device: tuple[int, int] = (0, 0)) -> None:
        name = name.strip("/")
        if not name or name in self._names:
            return
        above = str(PurePosixPath(name).parent)
        if above != ".":
            self.folder(above)
        self._names.add(name)
        self._entry(name, mode, data, mtime, device)

    def _entry(self, name: str, mode: int, data: bytes, mtime: int, device: tuple[int, int]) -> None:
        _check_size(name, len(data))
        encoded = os.fsencode(name) + b"\0"
        self._inode += 1
        fields = (
            self._inode,
            mode,
            0,
            0,
            1,
            max(mtime, 0) & _LARGEST,
            len(data),
            0,
            0,
            *device,
            len(encoded),
            0,
        )
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._output.write(head + b"\0" * (-len(head) % 4))
        self._output.write(data)
        self._output.write(b"\0" * (-len(data) % 4))


def _check_size(name: str, size: int) -> None:
    if size > _LARGEST:
        raise ValueError(f"{name}: a file of 4 GiB or more does not fit the format")


def join(archives: Iterable[Path], target: Path) -> int:
    """All archives in one file, each at a multiple of four bytes as the kernel wants them; returns its size.

    HostError if one becomes shorter meanwhile.
    """
    with target.open("wb") as output:
        for archive in archives:
            with archive.open("rb") as source:
                left = os.fstat(source.fileno()).st_size
                while left:
                    done = os.sendfile(output.fileno(), source.fileno(), None, left)
                    if done == 0:
                        raise HostError(
                            "A layer of the lab became shorter while it was read; "
                            "run 'pykvm lab clean --layers'."
                        )
                    left -= done
            output.seek(0, os.SEEK_END)
            output.write(bytes(-output.tell() % 4))
            output.flush()
        return output.tell()
