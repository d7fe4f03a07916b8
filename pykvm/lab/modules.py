"""Kernel modules: which ones a module needs, in the order in which they load.

The guest has no depmod and its busybox insmod reads no compressed files, so this is settled outside: the
``depends=`` field of each module's ``.modinfo`` section, followed to the end.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import HostError
from pykvm.lab import elf

_SIGNATURE_MARK = b"~Module signature appended~\n"
_SIGNATURE_TAIL = struct.Struct(">8xI")  # struct module_signature of include/linux/module_signature.h


@dataclass(frozen=True)
class Module:
    """A module ready for insmod: its name with underscores, its contents uncompressed."""

    name: str
    data: bytes

    @property
    def signed(self) -> bool:
        """Whether a signature is appended."""
        return self.data.endswith(_SIGNATURE_MARK)

    @property
    def unsigned(self) -> Module:
        """The module without its signature, whose check takes long in an emulated kernel."""
        if not self.signed:
            return self
        end = len(self.data) - len(_SIGNATURE_MARK)
        (length,) = _SIGNATURE_TAIL.unpack(self.data[end - _SIGNATURE_TAIL.size : end])
        return Module(self.name, self.data[: end - _SIGNATURE_TAIL.size - length])


def _canonical(name: str) -> str:
    return name.split(".ko")[0].replace("-", "_")


def _contents(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    return path.read_bytes()


def modinfo(module: bytes) -> Iterator[tuple[str, str]]:
    """The fields of ``.modinfo``, NUL-terminated ``key=value`` strings."""
    for field in elf.section(module, ".modinfo").split(b"\0"):
        key, equals, value = field.decode(errors="replace").partition("=")
        if equals:
            yield key, value


def closure(folder: Path, wanted: Iterable[str]) -> list[Module]:
    """``wanted`` modules below ``folder`` and all they depend on, each after what it needs.

    A wanted module that has no file is taken to be built into the kernel (virtio is, from 6.12 on) and left
    out. HostError if a dependency is missing.
    """
    files = {_canonical(path.name): path for path in sorted(folder.rglob("*.ko*"))}
    found: dict[str, Module] = {}

    def add(name: str, needed_by: str) -> None:
        name = _canonical(name)
        if name in found:
            return
        if name not in files:
            if needed_by:
                raise HostError(
                    f"The kernel in {folder} lacks the module {name} that {needed_by} needs; "
                    "run 'pykvm lab clean --kernels' and prepare it again."
                )
            return
        data = _contents(files[name])
        for dependency in dict(modinfo(data)).get("depends", "").split(","):
            if dependency:
                add(dependency, name)
        found[name] = Module(name, data)

    for name in wanted:
        add(name, "")
    return list(found.values())
