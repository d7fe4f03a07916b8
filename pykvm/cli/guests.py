"""``pykvm guests``: the guests that come with the package."""

from __future__ import annotations

import click
from rich.table import Table

from pykvm.cli.session import Session, common_options
from pykvm.guest import catalog


@click.group("guests", short_help="The guests that come with pykvm.")
def command() -> None:
    """Show the guests that come with pykvm: workloads and mode tests."""


@command.command("list")
@common_options
def list_guests(session: Session) -> None:
    """List all guests: name, size, the modes they run in, and what they do."""
    guests = [catalog.load(name) for name in catalog.names()]
    workloads = catalog.workloads()
    session.document |= {
        "guests": [
            {
                "name": guest.name,
                "workload": guest.name in workloads,
                "bytes": len(guest.image),
                "modes": guest.modes,
                "summary": guest.summary,
            }
            for guest in guests
        ]
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("guest", "bytes", "modes", "what it does"):
        table.add_column(name, justify="right" if name == "bytes" else "left", no_wrap=name == "guest")
    for guest in guests:
        table.add_row(guest.name, str(len(guest.image)), guest.modes, guest.summary)
    session.out.print(table)


@command.command("show")
@click.argument("name")
@click.option("--listing", is_flag=True, help="Show the disassembled image instead of the source.")
@common_options
def show(session: Session, name: str, listing: bool) -> None:
    """Show the source of the guest NAME (GNU as, Intel syntax), or its listing."""
    guest = catalog.load(name)
    session.document |= {
        "name": guest.name,
        "modes": guest.modes,
        "summary": guest.summary,
        "load_address": guest.load_address,
        "bytes": len(guest.image),
        "source": guest.source,
        "listing": guest.disassembly,
    }
    click.echo(guest.disassembly if listing else guest.source.rstrip("\n"), err=session.json)
