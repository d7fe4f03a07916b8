"""``pykvm lab list``: what labs there can be, what is prepared, and what the rest would cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import click
from rich.table import Table

from pykvm.cli.session import Session, output_options
from pykvm.lab.archive import Archive
from pykvm.lab.cache import Cache
from pykvm.lab.kernels import DEFAULT_SERIES
from pykvm.lab.kinds import KINDS, Kind
from pykvm.lab.qemu import why_not_kvm
from pykvm.lab.stock import KernelStock, Stock, ToolStock, emulator_of, take
from pykvm.report.text import bytes_text

_HOUR: Final = 3600.0
_ABOUT_TOOLS: Final = {
    "qemu": "emulates AMD's kinds, or carries a lab on KVM",
    "bochs": "emulates Intel's kinds",
    "busybox": "the lab's first commands",
}


@click.command("list", short_help="What labs there can be, and what is prepared.")
@click.option("--offline", is_flag=True, help="Ask only the cache, and what the archive offered last.")
@output_options
def command(session: Session, offline: bool) -> None:
    """List kinds of KVM and kernels, which are prepared, and what the others would fetch or build.

    The archive's lists (20 MB) are fetched if they are older than a day. Without a network you see what is
    prepared and what the archive offered last.
    """
    cache = Cache()
    archive = Archive(cache, session.note)
    stock = take(cache, archive, offline=offline)
    usage = cache.usage()
    kinds = [_kind_facts(kind, stock) for kind in KINDS.values()]
    session.document |= {
        "cache": str(cache.root),
        "usage": usage,
        "unreachable": stock.unreachable,
        "lists_age_seconds": archive.age,
        "kinds": kinds,
        "kernels": [asdict(kernel) for kernel in stock.kernels],
        "tools": [asdict(tool) for tool in stock.tools],
    }
    session.out.print(_kinds_table(kinds))
    session.out.print()
    if stock.kernels:
        session.out.print(_kernels_table(stock.kernels))
    else:
        session.out.print("No kernel is prepared, and what the archive offers is not known.")
    session.out.print()
    session.out.print(_tools_table(stock.tools))
    session.out.print()
    line = f"{bytes_text(sum(usage.values()))} in {cache.root}"
    downloads = [kernel.download for kernel in stock.kernels] + [tool.download for tool in stock.tools]
    if stock.kernels and (missing := sum(size or 0 for size in downloads)):
        line += f"; 'pykvm lab prepare --all' would fetch {bytes_text(missing)}"
    session.out.print(f"{line}.", markup=False, soft_wrap=True)
    if stock.unreachable:
        session.note(f"{stock.unreachable} {_as_of(archive.age)}")


def _as_of(age: float | None) -> str:
    if age is None:
        return "Its lists were never fetched."
    return f"What it offers is listed as it was {age / _HOUR:.0f} hours ago."


def _kind_facts(kind: Kind, stock: Stock) -> dict[str, Any]:
    here = not why_not_kvm(kind)
    tool = stock.tool("qemu" if here else emulator_of(kind))
    return {
        "name": kind.name,
        "about": kind.about,
        "emulator": "qemu-kvm" if here else {"qemu": "qemu-tcg"}.get(tool.name, tool.name),
        "prepared": all(item.state == "prepared" for item in (tool, stock.tool("busybox"))),
    }


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name == "disk" else "left", no_wrap=name != "")
    return table


_EMULATORS: Final = {"qemu-kvm": "QEMU on this KVM", "qemu-tcg": "QEMU", "bochs": "Bochs"}


def _kinds_table(kinds: list[dict[str, Any]]) -> Table:
    table = _table("kind of KVM", "runs in", "emulator", "")
    for kind in kinds:
        ready = "prepared" if kind["prepared"] else "to prepare"
        table.add_row(kind["name"], _EMULATORS[kind["emulator"]], ready, kind["about"])
    return table


def _kernels_table(kernels: tuple[KernelStock, ...]) -> Table:
    table = _table("kernel", "release", "state", "disk", "")
    for kernel in kernels:
        state = {
            "prepared": "prepared",
            "outdated": f"prepared; update {bytes_text(kernel.download)}",
            "available": f"fetch {bytes_text(kernel.download)}",
            "unavailable": "not to be had",
        }[kernel.state]
        remark = kernel.remark or ("default" if kernel.series == DEFAULT_SERIES else "")
        table.add_row(
            kernel.series, kernel.release, state, bytes_text(kernel.disk) if kernel.disk else "", remark
        )
    return table


def _tools_table(tools: tuple[ToolStock, ...]) -> Table:
    table = _table("tool", "version", "state", "disk", "")
    for tool in tools:
        if tool.state == "prepared":
            state = "prepared"
        else:
            state = f"fetch {bytes_text(tool.download)}" if tool.download else "to fetch"
            if tool.build_seconds:
                state += f", build about {max(1, round(tool.build_seconds / 60))} min"
        disk = bytes_text(tool.disk) if tool.disk else ""
        table.add_row(tool.name, tool.version, state, disk, _ABOUT_TOOLS[tool.name])
    return table
