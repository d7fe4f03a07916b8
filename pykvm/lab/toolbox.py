"""Programs that labs use, from Debian's stable release, unpacked into the cache with all their libraries.

Nothing is installed: each tool is a folder with the packages' files, and its programs are started through
the dynamic linker of that folder with its libraries, so that they run on any x86-64 Linux.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pykvm.errors import HostError
from pykvm.lab import elf
from pykvm.lab.archive import Archive
from pykvm.lab.cache import Cache, Note, remove

OLDEST_QEMU: Final = 8
"""QEMU 7.2 was seen to corrupt the memory of guests with Linux 6.12."""

_LINKER: Final = "usr/lib64/ld-linux-x86-64.so.2"
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_FACTS: Final = "tool.json"
_FOR_PEOPLE: Final = (
    "usr/share/alsa",
    "usr/share/applications",
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/debconf",
    "usr/share/doc",
    "usr/share/doc-base",
    "usr/share/glib-2.0",
    "usr/share/icons",
    "usr/share/info",
    "usr/share/initramfs-tools",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/pam-configs",
    "usr/share/perl5",
    "usr/share/pixmaps",
    "usr/lib/systemd",
    "usr/lib/udev",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "etc",
    "var",
)
_QEMU: Final = "usr/bin/qemu-system-x86_64"
_QEMU_FIRMWARE: Final = (
    "kvmvapic.bin",
    "linuxboot.bin",
    "linuxboot_dma.bin",
    "multiboot*.bin",
    "pvh.bin",
    "keymaps",
)
_VERSION = re.compile(r"version (\d+(?:\.\d+)+)")


@dataclass(frozen=True)
class Tool:
    """A folder of unpacked packages."""

    name: str
    root: Path
    version: str
    """Version of the first package that was asked for."""

    @property
    def folder(self) -> Path:
        """Where all of it lies."""
        return self.root.parent

    def argv(self, program: str, *arguments: str) -> tuple[str, ...]:
        """How to start ``program``, a path within the folder such as ``usr/bin/xorriso``."""
        path = self.root / program
        if not _is_dynamic(path):
            return (str(path), *arguments)
        libraries = self.root / _LIBRARIES
        return (str(self.root / _LINKER), "--library-path", str(libraries), str(path), *arguments)


def find(cache: Cache, name: str) -> Tool | None:
    """The tool of that name if it was prepared."""
    folder = cache.root / "tools" / name
    try:
        facts = json.loads((folder / _FACTS).read_text())
        return Tool(facts["name"], folder / "root", facts["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prepare_root(
    cache: Cache,
    archive: Archive,
    note: Note,
    name: str,
    packages: Sequence[str],
    trim: Callable[[Path], None] = lambda root: None,
) -> Tool:
    """Fetch ``packages`` and all that they need, and unpack them as the tool ``name``, unless that was done.

    Documentation, translations and configuration are left out, and ``trim`` removes more from the root.
    """
    target = cache.folder("tools") / name

    def make(scratch: Path) -> None:
        closure = archive.closure(packages)
        size = sum(package.size for package in closure)
        several = f"{len(closure)} packages, " if len(closure) > 1 else ""
        note(f"{name}: fetching {several}{size / 1e6:.0f} MB.")
        root = scratch / "root"
        root.mkdir(parents=True)
        with archive.fetch(closure, name) as debs:
            for deb in debs:
                archive.unpack(deb, root)
        for part in _FOR_PEOPLE:
            remove(root / part)
        trim(root)
        _drop_privileges(root)
        versions = {package.name: package.version for package in closure}
        facts = {"name": name, "version": upstream(versions.get(packages[0], "")), "packages": versions}
        (scratch / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")

    cache.provide(target, make, note)
    tool = find(cache, name)
    if tool is None:
        raise HostError(f"{target} is not a tool of this pykvm; run 'pykvm lab clean --tools'.")
    return tool


def _drop_privileges(root: Path) -> None:
    """Unpacked by root, a set-user-ID program would be one for everybody who can reach the cache."""
    for path in root.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
            path.chmod(stat.S_IMODE(mode) & 0o777)


def upstream(version: str) -> str:
    """``10.0.13`` of Debian's ``1:10.0.13+ds-0+deb13u1``."""
    found = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", version)
    return found[1] if found else version


# --- QEMU ----------------------------------------------------------------------------------------


def qemu(
    cache: Cache,
    note: Note,
    environment: Mapping[str, str] = os.environ,
    archive: Archive | None = None,
) -> tuple[tuple[str, ...], str]:
    """How to start qemu-system-x86_64, firmware included, and its version; fetched first if it is missing.

    ``$PYKVM_LAB_QEMU`` names another one; HostError if that is too old.
    """
    if own := environment.get("PYKVM_LAB_QEMU"):
        return (own,), _version_of(own)
    tool = find(cache, "qemu") or prepare_qemu(cache, archive or Archive(cache, note), note)
    firmware = (str(tool.root / "usr/share" / name) for name in ("qemu", "seabios"))
    return tool.argv(_QEMU, *(word for folder in firmware for word in ("-L", folder))), tool.version


def prepare_qemu(cache: Cache, archive: Archive, note: Note) -> Tool:
    """QEMU for x86, which emulates SVM."""
    return prepare_root(cache, archive, note, "qemu", ["qemu-system-x86"], _trim_qemu)


def _trim_qemu(root: Path) -> None:
    """Leave the one emulator, its libraries, and firmware for a PC."""
    firmware = root / "usr/share/qemu"
    wanted = {path for pattern in _QEMU_FIRMWARE for path in firmware.glob(pattern)}
    for path in firmware.iterdir():
        if path not in wanted:
            remove(path)
    for path in (root / "usr/bin").iterdir():
        if path != root / _QEMU:
            remove(path)
    for name in ("usr/sbin", "usr/libexec"):
        remove(root / name)


def _version_of(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=30, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else "it does not answer"
        raise HostError(f"PYKVM_LAB_QEMU names {program}, which cannot be started ({why}).") from None
    found = _VERSION.search(done.stdout)
    if found is None:
        raise HostError(f"PYKVM_LAB_QEMU names {program}, which is no QEMU: '--version' does not say so.")
    if int(found[1].partition(".")[0]) < OLDEST_QEMU:
        raise HostError(
            f"PYKVM_LAB_QEMU names QEMU {found[1]}, which corrupts the memory of newer guests; "
            f"name version {OLDEST_QEMU} or newer, or unset it to use the one that labs fetch."
        )
    return found[1]


# --- busybox -------------------------------------------------------------------------------------


def busybox(cache: Cache, note: Note) -> Path:
    """The statically linked busybox, fetched first if it is missing."""
    tool = find(cache, "busybox") or prepare_busybox(cache, Archive(cache, note), note)
    return tool.root / "usr/bin/busybox"


def prepare_busybox(cache: Cache, archive: Archive, note: Note) -> Tool:
    """The shell and the few commands with which a lab starts."""
    return prepare_root(cache, archive, note, "busybox", ["busybox-static"])


def _is_dynamic(program: Path) -> bool:
    """Whether the program names a dynamic linker; HostError if it cannot be read."""
    try:
        return elf.loader(program) is not None
    except OSError as error:
        raise HostError(
            f"{program} cannot be read ({error.strerror}); run 'pykvm lab clean --tools' and try again."
        ) from None
