"""``pykvm migrate``: a live migration between two processes, or one side of it."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pykvm.backends import open_system
from pykvm.cli import migrate_receive, migrate_send
from pykvm.cli.destination_process import DestinationProcess
from pykvm.cli.options import guest_config, guest_options, policy_options, tracker_of, tracker_options
from pykvm.cli.parameters import duration_type
from pykvm.cli.sending import Sending
from pykvm.cli.session import Session, common_options
from pykvm.migrate import Address, MigrationResult, Policy, connect

_GUEST_SECONDS = 60.0
"""What making a guest may take: KVM needs seconds for a memslot of 1 TiB."""


@click.group("migrate", invoke_without_command=True, short_help="Migrate a running guest and prove it.")
@click.option(
    "--workload", default="hotspot", show_default=True, help="The guest; 'pykvm guests list' names them."
)
@click.option(
    "--transport",
    type=click.Choice(["unix", "tcp"]),
    default="unix",
    show_default=True,
    help="The socket between the two processes; tcp uses the loopback.",
)
@click.option("--address", help="Where the destination listens, instead of a fresh address of --transport.")
@click.option(
    "--check-seconds",
    type=duration_type(),
    default="1s",
    show_default=True,
    help="How long the guest runs at the destination and checks its memory.",
)
@guest_options
@tracker_options
@policy_options
@common_options
@click.pass_context
def command(context: click.Context, session: Session, /, **options: Any) -> None:
    """Migrate a running guest from this process to another one, and prove that no page was lost.

    Without a subcommand both sides run on this host: this process is the source, a child the destination.
    The guest keeps writing while its memory is copied. Before it resumes at the destination the digests of
    all pages are compared; there it goes on checking its own memory.

    'send' and 'receive' are the two sides for two terminals or hosts.
    """
    if context.invoked_subcommand is None:
        _both(session, **options)
        return
    for name in options:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"Options go behind '{context.invoked_subcommand}'.", context)


def _both(
    session: Session,
    *,
    workload: str,
    transport: str,
    address: str | None,
    check_seconds: float,
    bandwidth: int,
    downtime_limit: float,
    max_rounds: int,
    warm_up: float,
    attempts: int,
    sabotage: str | None,
    report_path: Path | None,
    **options: Any,
) -> None:
    config = guest_config(workload, options)
    chosen = Address.parse(address) if address else None
    if chosen is not None:
        transport = "unix" if chosen.path else "tcp"
    sending = Sending(
        session,
        config,
        tracker_of(options),
        Policy(bandwidth or None, downtime_limit, max_rounds),
        transport=transport,
        sabotage=sabotage,
        report_path=report_path,
    )
    with contextlib.ExitStack() as cleanup:
        system = cleanup.enter_context(open_system(session.backend))
        session.tell_choice(system)
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="pykvm-"))

        def destination(attempt: int) -> DestinationProcess:
            # A path of its own for each attempt: a killed receiver leaves its socket behind.
            fresh = "tcp:0" if transport == "tcp" else f"unix:{folder}/{attempt}"
            return DestinationProcess(
                str(chosen or fresh),
                backend=session.backend,
                check_seconds=check_seconds,
                max_memory=config.memory,
                patience=warm_up + _GUEST_SECONDS,
            )

        # The first one starts before the guest: many busy vCPUs can keep a new process waiting for long.
        first = cleanup.enter_context(destination(1))
        first.settle()
        guest = cleanup.enter_context(sending.start(system, warm_up))

        def once() -> MigrationResult:
            attempt = session.document["attempts"]
            with first if attempt == 1 else destination(attempt) as receiver:
                result = sending.move(guest, connect(receiver.address()), fence=receiver.kill)
                session.document["destination"] = receiver.document()
                return result

        sending.attempt(guest, attempts, once)


command.add_command(migrate_send.command)
command.add_command(migrate_receive.command)
