"""What labs need against what the cache has: kernels and tools, with what they would still cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pykvm.errors import HostError
from pykvm.lab import bochs_build, kernels, toolbox
from pykvm.lab.archive import Archive
from pykvm.lab.cache import Cache, size_of
from pykvm.lab.kinds import Kind

State = Literal["prepared", "outdated", "available", "unavailable"]

TOOLS: Final[Mapping[str, tuple[str, ...]]] = {"qemu": ("qemu-system-x86",), "busybox": ("busybox-static",)}
"""What is unpacked from packages.  Bochs is the one that is built."""


@dataclass(frozen=True)
class KernelStock:
    """One series of kernels."""

    series: str
    release: str
    """The prepared one if there is one, else the one to fetch."""
    state: State
    newest: str
    """The archive's newest release, empty if the lists are not here."""
    download: int
    """Bytes to fetch for ``newest``; 0 if it is prepared or not to be had."""
    disk: int
    """Bytes that the prepared one takes."""
    remark: str


@dataclass(frozen=True)
class ToolStock:
    """One tool."""

    name: str
    state: State
    version: str
    download: int | None
    """Bytes to fetch; 0 if it is prepared, None if the archive's lists would have to say."""
    build_seconds: float
    """Roughly what its compilation takes; 0 for what is only unpacked."""
    disk: int


@dataclass(frozen=True)
class Stock:
    """All of it."""

    kernels: tuple[KernelStock, ...]
    tools: tuple[ToolStock, ...]
    unreachable: str
    """The sentence on why the archive could not be asked, else empty."""

    def tool(self, name: str) -> ToolStock:
        """The tool of that name."""
        return next(tool for tool in self.tools if tool.name == name)


def take(cache: Cache, archive: Archive, *, offline: bool = False) -> Stock:
    """Look at the cache and, unless ``offline``, at the archive's lists, fetched if they are old."""
    unreachable = ""
    offers = kernels.remembered(archive)
    if not offline:
        try:
            offers = kernels.offered(archive)
            for name in TOOLS:
                download_of(archive, name)
        except HostError as error:  # no network, or no apt
            unreachable = str(error)
    return Stock(_kernels(cache, offers), tuple(_tools(cache, archive)), unreachable)


def download_of(archive: Archive, name: str) -> int:
    """Bytes to fetch for a tool of TOOLS."""
    known = archive.remembered(f"tool {name}")
    if isinstance(known, int):
        return known
    size = sum(package.size for package in archive.closure(TOOLS[name]))
    archive.remember(f"tool {name}", size)
    return size


def emulator_of(kind: Kind) -> str:
    """The tool that emulates the processor of this kind."""
    return "qemu" if kind.vendor == "amd" else "bochs"


def _kernels(cache: Cache, offers: list[kernels.Kernel]) -> tuple[KernelStock, ...]:
    here = {kernel.series: kernel for kernel in kernels.prepared(cache)}  # the newest of each
    offered = {kernel.series: kernel for kernel in offers}
    return tuple(
        _kernel(here.get(series), offered.get(series))
        for series in sorted({*here, *offered}, key=lambda text: [int(part) for part in text.split(".")])
    )


def _kernel(here: kernels.PreparedKernel | None, offer: kernels.Kernel | None) -> KernelStock:
    newest = offer.release if offer else ""
    if here is not None:
        disk = size_of(here.folder)
        if offer is None or offer.missing or offer.release == here.release:
            remark = kernels.trust_remark(here)
            return KernelStock(here.series, here.release, "prepared", newest, 0, disk, remark)
        remark = f"the archive has {offer.release}"
        return KernelStock(here.series, here.release, "outdated", newest, offer.download, disk, remark)
    assert offer is not None
    if offer.missing:
        return KernelStock(offer.series, offer.release, "unavailable", newest, 0, 0, offer.missing)
    return KernelStock(
        offer.series, offer.release, "available", newest, offer.download, 0, kernels.trust_remark(offer)
    )


def _tools(cache: Cache, archive: Archive) -> list[ToolStock]:
    found = []
    for name in TOOLS:
        tool = toolbox.find(cache, name)
        if name == "qemu" and (own := os.environ.get("PYKVM_LAB_QEMU")):
            found.append(ToolStock(name, "prepared", f"PYKVM_LAB_QEMU={own}", 0, 0, 0))
        elif tool is not None:
            found.append(ToolStock(name, "prepared", tool.version, 0, 0, size_of(tool.folder)))
        else:
            known = archive.remembered(f"tool {name}")
            download = known if isinstance(known, int) else None
            found.append(ToolStock(name, "available", "", download, 0, 0))
    built = bochs_build.find(cache)
    if built is not None:
        found.append(ToolStock("bochs", "prepared", built.version, 0, 0, size_of(built.folder)))
    else:
        found.append(
            ToolStock("bochs", "available", "", bochs_build.DOWNLOAD_BYTES, bochs_build.BUILD_SECONDS, 0)
        )
    return found
