"""``pykvm lab clean``: give the disk back."""

from __future__ import annotations

from pathlib import Path

import click

from pykvm.cli.session import Session, output_options
from pykvm.lab.cache import Cache
from pykvm.report.text import bytes_text

_PARTS = {
    "runs": "runs",
    "layers": "layers",
    "kernels": "kernels",
    "tools": "tools",
    "lists": "apt",
    "results": "results",
}


@click.command("clean", short_help="Free the disk that labs use.")
@click.option("--runs", is_flag=True, help="Logs kept of failed runs, and what dead runs left.")
@click.option("--layers", is_flag=True, help="Packed file systems; the next run packs them again.")
@click.option("--kernels", is_flag=True, help="Kernels; the next run fetches what it needs.")
@click.option("--tools", is_flag=True, help="QEMU, Bochs, busybox; fetched and built again when needed.")
@click.option("--lists", is_flag=True, help="The archive's lists, and what an interrupted download left.")
@click.option("--all", "everything", is_flag=True, help="All of these but --results.")
@click.option("--results", is_flag=True, help="Cells of 'pykvm lab matrix'; it would run them again.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@output_options
def command(session: Session, everything: bool, dry_run: bool, **chosen: bool) -> None:
    """Remove what labs keep in their cache, and say how much that freed.

    Without options: runs and layers, which come back without a network. What a running lab uses stays, and is
    named.
    """
    cache = Cache()
    parts = [
        part for option, part in _PARTS.items() if chosen[option] or (everything and option != "results")
    ] or ["runs", "layers"]
    cleaned = cache.clean(parts, dry_run=dry_run)
    left = sum(cache.usage().values())
    session.document |= {
        "cache": str(cache.root),
        "dry_run": dry_run,
        "freed": cleaned.freed,
        "left": left,
        "removed": [str(path) for path in cleaned.removed],
        "in_use": [str(path) for path in cleaned.in_use],
    }
    names = [path.relative_to(cache.root) for path in cleaned.removed]
    for name in dict.fromkeys(Path("apt") if name.parts[0] == "apt" else name for name in names):
        session.out.print(name, markup=False, soft_wrap=True)
    for path in cleaned.in_use:
        kept = path.relative_to(cache.root)
        session.note(f"{kept} stays: a running lab or another pykvm uses it, or it is not yours.")
    verb = "Would free" if dry_run else "Freed"
    session.out.print(
        f"{verb} {bytes_text(cleaned.freed)}; {bytes_text(left)} in {cache.root}.",
        markup=False,
        soft_wrap=True,
    )
