"""``pykvm migrate send``: the source of a live migration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pykvm.backends import open_system
from pykvm.cli.options import guest_config, guest_options, policy_options, tracker_of, tracker_options
from pykvm.cli.sending import Sending
from pykvm.cli.session import Session, common_options
from pykvm.migrate import Address, Policy, connect


@click.command("send", short_help="Start a guest here and move it to a receiver.")
@click.option("--address", required=True, help="Where the receiver listens: unix:PATH or tcp:HOST:PORT.")
@click.option(
    "--workload", default="hotspot", show_default=True, help="The guest; 'pykvm guests list' names them."
)
@guest_options
@tracker_options
@policy_options
@common_options
def command(
    session: Session,
    address: str,
    workload: str,
    attempts: int,
    bandwidth: int,
    downtime_limit: float,
    max_rounds: int,
    warm_up: float,
    sabotage: str | None,
    report_path: Path | None,
    **options: Any,
) -> None:
    """Start a guest here and move it, while it runs, to 'pykvm migrate receive' at ADDRESS."""
    where = Address.parse(address)
    sending = Sending(
        session,
        guest_config(workload, options),
        tracker_of(options),
        Policy(bandwidth or None, downtime_limit, max_rounds),
        transport="unix" if where.path else "tcp",
        sabotage=sabotage,
        report_path=report_path,
    )
    with open_system(session.backend) as system:
        session.tell_choice(system)
        with sending.start(system, warm_up) as guest:
            sending.attempt(guest, attempts, lambda: sending.move(guest, connect(where)))
