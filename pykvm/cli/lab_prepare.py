"""``pykvm lab prepare``: fetch and build what labs need, so that running them needs no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pykvm.cli.lab_options import DEFAULT_KIND
from pykvm.cli.session import Session, output_options
from pykvm.errors import HostError
from pykvm.lab import bochs_build, kernels, toolbox
from pykvm.lab.archive import Archive
from pykvm.lab.cache import Cache, size_of
from pykvm.lab.kernels import DEFAULT_SERIES, PreparedKernel
from pykvm.lab.kinds import KINDS, Kind, kind
from pykvm.lab.qemu import why_not_kvm
from pykvm.lab.stock import emulator_of
from pykvm.report.text import bytes_text, plural


@click.command("prepare", short_help="Fetch kernels and emulators, once.")
@click.option(
    "--kernel",
    "texts",
    multiple=True,
    metavar="SERIES",
    help=f"Kernel series or release, or 'all'; may be repeated.  [default: {DEFAULT_SERIES}]",
)
@click.option(
    "--kvm",
    "names",
    multiple=True,
    type=click.Choice([*KINDS, "all"]),
    help=f"Kind of KVM whose emulator to prepare, or 'all'; may be repeated.  [default: {DEFAULT_KIND}]",
)
@click.option("--all", "everything", is_flag=True, help="Every kernel and every kind.")
@output_options
def command(session: Session, texts: tuple[str, ...], names: tuple[str, ...], everything: bool) -> None:
    """Fetch kernels and emulators from Debian's archive into the lab cache; build Bochs for Intel's kinds.

    Without options that is Linux 6.12 and QEMU, which emulates all of AMD's kinds. Of a series the newest
    kernel is fetched, and an older one of the same series is removed. What is prepared already costs nothing,
    and what was interrupted goes on where it was. Nothing is installed in the system and nothing needs root.

    \b
        pykvm lab prepare --kernel 6.1 --kernel 7.2 --kvm amd-npt --kvm intel-ept
    """
    for text in texts:
        if text != "all":
            kernels.check(text)
    cache = Cache()
    archive = Archive(cache, session.note)
    chosen = _kinds(("all",) if everything else names or (DEFAULT_KIND,))
    session.document |= {"cache": str(cache.root), "kernels": [], "tools": [], "left_out": []}
    for name, make in _tools(cache, archive, session, chosen):
        version, disk = make()
        _tell(session, "tools", {"name": name, "version": version, "disk": disk})
    for text in _series(session, archive, ("all",) if everything else texts or (DEFAULT_SERIES,)):
        kernel = _kernel(session, cache, archive, text)
        facts = {"name": "Linux", "version": kernel.release, "disk": size_of(kernel.folder)}
        _tell(session, "kernels", facts | {"series": kernel.series, "enforce": kernel.enforce})
    total = sum(cache.usage().values())
    session.document["bytes"] = total
    count = len(session.document["kernels"])
    session.out.print(f"{plural(count, 'kernel')} ready; {bytes_text(total)} in {cache.root}.", markup=False)


def _tell(session: Session, list_name: str, facts: dict[str, Any]) -> None:
    session.document[list_name].append(facts)
    line = f"{facts['name']} {facts['version']}: prepared, {bytes_text(facts['disk'])}"
    session.out.print(line, markup=False, soft_wrap=True)


def _kinds(names: tuple[str, ...]) -> list[Kind]:
    return list(KINDS.values()) if "all" in names else [kind(name) for name in dict.fromkeys(names)]


def _tools(
    cache: Cache, archive: Archive, session: Session, chosen: list[Kind]
) -> list[tuple[str, Callable[[], tuple[str, int]]]]:
    """What the kinds need, and a function for each that prepares it and returns version and size."""

    def busybox() -> tuple[str, int]:
        tool = toolbox.prepare_busybox(cache, archive, session.note)
        return tool.version, size_of(tool.folder)

    def qemu() -> tuple[str, int]:
        _, version = toolbox.qemu(cache, session.note, archive=archive)
        tool = toolbox.find(cache, "qemu")
        return version, size_of(tool.folder) if tool else 0

    def bochs() -> tuple[str, int]:
        built = bochs_build.prepare(cache, session.note, archive)
        return built.version, size_of(built.folder)

    makers = {"qemu": qemu, "bochs": bochs}
    needed = {emulator_of(kind) for kind in chosen}
    if any(not why_not_kvm(kind) for kind in chosen):
        needed.add("qemu")  # this machine's KVM can carry it
    return [("busybox", busybox), *((name, makers[name]) for name in makers if name in needed)]


def _series(session: Session, archive: Archive, texts: tuple[str, ...]) -> list[str]:
    if "all" not in texts:
        return list(dict.fromkeys(texts))
    found = []
    for offer in kernels.offered(archive):
        if offer.missing:
            session.document["left_out"].append({"series": offer.series, "reason": offer.missing})
            session.note(f"Linux {offer.series} is left out: {offer.missing}.")
        else:
            found.append(offer.series)
    return found


def _kernel(session: Session, cache: Cache, archive: Archive, text: str) -> PreparedKernel:
    """The newest of a series; a prepared older one where the archive is out of reach."""
    here = kernels.select(cache, text)
    if here is not None and text == here.release:
        return here
    try:
        offer = kernels.offer(archive, text)
    except HostError as error:
        if here is None:
            raise
        session.note(f"{error} Linux {here.release} is prepared and stays.")
        return here
    if remark := kernels.trust_remark(offer):
        session.note(f"Linux {offer.series}: {remark}.")
    return kernels.prepare(cache, archive, offer, session.note)
