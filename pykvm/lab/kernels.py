"""Kernels for labs: which ones Debian's archive offers, fetching them, and finding the fetched ones.

A lab boots Debian's "cloud" flavour, which has the KVM modules and few drivers.  Which series there are is
read from the archive's lists, so a new one appears by itself.  From 6.19 on a kernel is two packages, its
image and its modules, and of some of those the lists have forgotten the modules while the pool has them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pykvm.errors import HostError, UsageError
from pykvm.lab.archive import Archive, ArchiveUnreachableError, Package
from pykvm.lab.cache import Cache, Note

DEFAULT_SERIES: Final = "6.12"
"""The kernel of Debian's stable release, with long-term support upstream."""

OLDEST: Final = (6, 1)

_PATTERN: Final = r"linux-(image|binary|modules)-\d+\.\d+\S*-cloud-amd64"
_NAME = re.compile(r"linux-(image|binary|modules)-((\d+)\.(\d+)\S*-cloud-amd64)")
_TEXT = re.compile(r"\d+\.\d+\S*")
_FACTS: Final = "kernel.json"
_UNUSED_MODULES: Final = (
    "drivers/gpu",
    "drivers/hid",
    "drivers/infiniband",
    "drivers/input",
    "drivers/media",
    "drivers/mmc",
    "drivers/net",
    "drivers/nvme",
    "drivers/usb",
    "net/bridge",
    "net/ceph",
    "net/core",
    "net/ipv4",
    "net/ipv6",
    "net/mptcp",
    "net/netfilter",
    "net/openvswitch",
    "net/sched",
    "net/sctp",
    "net/sunrpc",
    "net/tipc",
    "net/tls",
    "net/xfrm",
    "sound",
)
"""Half of what a package weighs, for devices and protocols that no lab has."""


@dataclass(frozen=True)
class Kernel:
    """The newest kernel of a series that the archive has."""

    series: str
    release: str
    version: str
    packages: tuple[Package, ...]
    download: int
    """Bytes to fetch."""
    source: Literal["index", "pool"]
    """Where its modules come from: signed lists vouch for them, or only the kernel itself will."""
    missing: str = ""
    """Why it cannot be had, else empty."""


@dataclass(frozen=True)
class PreparedKernel:
    """A kernel in the cache.

    ``image`` is what a boot loader takes, ``modules`` a folder with .ko or .ko.xz files at any depth.  With
    ``enforce`` the kernel must be started with ``module.sig_enforce=1`` and its modules keep their
    signatures: the image came with a checked sum and holds the key, so it accepts only its own modules.
    """

    series: str
    release: str
    image: Path
    modules: Path
    enforce: bool

    @property
    def folder(self) -> Path:
        """What ``Cache.use`` is to hold while the kernel is in use."""
        return self.image.parent


# --- what there is -------------------------------------------------------------------------------


def offered(archive: Archive) -> list[Kernel]:
    """The newest kernel of each series, oldest first; those with ``missing`` cannot be had."""
    archive.update()
    known = archive.remembered("kernels")
    if known is None:
        known = [asdict(kernel) for kernel in _discover(archive)]
        archive.remember("kernels", known)
    return _from_json(known)


def remembered(archive: Archive) -> list[Kernel]:
    """What ``offered`` said last, without a network; empty if it never did."""
    return _from_json(archive.remembered("kernels") or [])


def _from_json(known: Iterable[dict[str, Any]]) -> list[Kernel]:
    return [
        Kernel(**fields | {"packages": tuple(Package(**package) for package in fields["packages"])})
        for fields in known
    ]


def _discover(archive: Archive) -> list[Kernel]:
    packages = newest_of_each_series(archive.packages(_PATTERN))
    return [_complete(archive, release, parts) for release, parts in packages]


def newest_of_each_series(packages: Iterable[Package]) -> list[tuple[str, dict[str, Package]]]:
    """Release and packages (by ``image``, ``binary``, ``modules``) of each series' newest, oldest first."""
    releases: dict[str, dict[str, Package]] = {}
    for package in packages:
        if found := _NAME.fullmatch(package.name):
            releases.setdefault(found[2], {})[found[1]] = package
    newest: dict[tuple[int, ...], str] = {}
    for release in sorted(releases, key=_order):
        # The lists keep modules or an image alone for a while when the other one has moved on.
        if {"image", "binary"} & releases[release].keys() and _order(release)[:2] >= OLDEST:
            newest[_order(release)[:2]] = release
    return [(release, releases[release]) for _, release in sorted(newest.items())]


def _complete(archive: Archive, release: str, parts: dict[str, Package]) -> Kernel:
    series = series_of(release)
    if "binary" not in parts:
        image = parts["image"]
        return Kernel(series, release, image.version, (image,), image.size, "index")
    binary = parts["binary"]
    if "modules" in parts:
        pair = (binary, parts["modules"])
        return Kernel(series, release, binary.version, pair, sum(part.size for part in pair), "index")
    name = f"linux-modules-{release}"
    version = binary.version.rpartition(":")[2]  # a file's name leaves the epoch out
    path = f"pool/main/l/linux/{name}_{version}_amd64.deb"
    size = archive.pool_size(path)
    pair = (binary, Package(name, binary.version, size or 0, path))
    missing = "" if size is not None else f"{name} is neither in the archive's lists nor in its pool"
    return Kernel(series, release, binary.version, pair, sum(part.size for part in pair), "pool", missing)


def prepared(cache: Cache) -> list[PreparedKernel]:
    """What was fetched and can be booted without a network, oldest first."""
    found = [_read(folder) for folder in cache.entries("kernels")]
    return sorted(filter(None, found), key=lambda kernel: _order(kernel.release))


def _read(folder: Path) -> PreparedKernel | None:
    try:
        facts = json.loads((folder / _FACTS).read_text())
        kernel = PreparedKernel(
            facts["series"], facts["release"], folder / "vmlinuz", folder / "modules", bool(facts["enforce"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not a folder of ours, or of another version of pykvm
    return kernel if kernel.image.is_file() and kernel.modules.is_dir() else None


# --- choosing ------------------------------------------------------------------------------------


def select(cache: Cache, text: str) -> PreparedKernel | None:
    """The prepared kernel of that release, or the newest one of that series; None if there is none."""
    check(text)
    fitting = [kernel for kernel in prepared(cache) if text in (kernel.series, kernel.release)]
    return fitting[-1] if fitting else None


def offer(archive: Archive, text: str) -> Kernel:
    """The archive's kernel of that series or release.

    UsageError if it has none, HostError if it has only half of it.
    """
    check(text)
    kernels = offered(archive)
    for kernel in kernels:
        if text in (kernel.series, kernel.release):
            if kernel.missing:
                raise HostError(f"Linux {text} cannot be had: {kernel.missing}.")
            return kernel
    names = ", ".join(kernel.series for kernel in kernels if not kernel.missing)
    raise UsageError(f"Debian's archive has no kernel {text}; it has the series {names}, the newest of each.")


def check(text: str) -> None:
    """UsageError unless ``text`` looks like a series or a release."""
    if not _TEXT.fullmatch(text):
        raise UsageError(
            f"'{text}' is no kernel; write a series such as 6.12, or a release from 'pykvm lab list'."
        )


def series_of(release: str) -> str:
    """``6.12`` of ``6.12.117+deb13-cloud-amd64``."""
    return ".".join(str(number) for number in _order(release)[:2])


def _order(release: str) -> tuple[int, ...]:
    """Numbers of a release up to its flavour: ``6.1.0-56-cloud-amd64`` is (6, 1, 0, 56)."""
    return tuple(int(number) for number in re.findall(r"\d+", release.partition("-cloud")[0]))


# --- fetching ------------------------------------------------------------------------------------


def provide(cache: Cache, text: str, note: Note) -> PreparedKernel:
    """The prepared kernel that ``text`` names, fetched first if there is none.

    ArchiveUnreachableError names the prepared ones.
    """
    if (kernel := select(cache, text)) is not None:
        return kernel
    archive = Archive(cache, note)
    try:
        return prepare(cache, archive, offer(archive, text), note)
    except ArchiveUnreachableError as error:
        there = ", ".join(kernel.series for kernel in prepared(cache)) or "none"
        raise ArchiveUnreachableError(f"{error} Kernels that need no fetching: {there}.") from None


def prepare(cache: Cache, archive: Archive, kernel: Kernel, note: Note) -> PreparedKernel:
    """Fetch and unpack a kernel unless that was done, and remove older ones of its series."""
    if kernel.missing:
        raise HostError(f"Linux {kernel.release} cannot be had: {kernel.missing}.")
    target = cache.folder("kernels") / kernel.release

    def make(scratch: Path) -> None:
        note(f"Linux {kernel.release}: fetching {kernel.download / 1e6:.0f} MB.")
        tree = scratch / "unpacked"
        listed = kernel.packages if kernel.source == "index" else kernel.packages[:1]
        with archive.fetch(listed, f"Linux {kernel.series}") as debs:
            for deb in debs:
                archive.unpack(deb, tree)
        for package in kernel.packages[len(listed) :]:
            with archive.fetch_pool(package.filename) as deb:
                archive.unpack(deb, tree)
        _sort_out(tree, scratch, kernel)
        facts = {
            "series": kernel.series,
            "release": kernel.release,
            "version": kernel.version,
            "enforce": kernel.source == "pool",
        }
        (scratch / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")

    cache.provide(target, make, note)
    ready = _read(target)
    if ready is None:
        raise HostError(f"{target} is not a kernel of this pykvm; run 'pykvm lab clean --kernels'.")
    older = [other.folder for other in prepared(cache) if other.series == kernel.series and other != ready]
    cache.discard(older)
    return ready


def _sort_out(tree: Path, folder: Path, kernel: Kernel) -> None:
    """Take image, configuration and modules out of the unpacked packages, and leave the rest."""
    image = _one(tree, f"boot/vmlinuz-{kernel.release}", f"usr/lib/modules/{kernel.release}/vmlinuz")
    image.rename(folder / "vmlinuz")
    modules = _one(tree, f"usr/lib/modules/{kernel.release}/kernel", f"lib/modules/{kernel.release}/kernel")
    for name in _UNUSED_MODULES:
        shutil.rmtree(modules / name, ignore_errors=True)
    # Packages from the pool are unchecked: nothing but plain files may come through.
    for path in list(modules.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            path.unlink()
    modules.rename(folder / "modules")
    for configuration in tree.glob("boot/config-*"):
        configuration.rename(folder / "config")
    shutil.rmtree(tree)


def _one(tree: Path, *places: str) -> Path:
    for place in places:
        path = tree / place
        if path.exists() and path.resolve().is_relative_to(tree.resolve()):
            return path
    raise HostError(
        f"The kernel's packages lack {' and '.join(places)}; 'pykvm lab list' names other kernels."
    )


def trust_remark(kernel: Kernel | PreparedKernel) -> str:
    """Why modules may be trusted that no list vouches for; empty for others."""
    unlisted = kernel.enforce if isinstance(kernel, PreparedKernel) else kernel.source == "pool"
    if not unlisted:
        return ""
    return (
        "the archive lists its modules no more: taken from the pool, and the kernel checks their signatures"
    )
