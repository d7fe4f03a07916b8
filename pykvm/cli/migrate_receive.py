"""``pykvm migrate receive``: the destination of a live migration."""

from __future__ import annotations

from typing import Any

import click

from pykvm.backends import open_system
from pykvm.cli.destination_process import LISTENING
from pykvm.cli.parameters import duration_type, size_type
from pykvm.cli.progress import ProgressDisplay
from pykvm.cli.session import Session, common_options
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import Acceptance, ReceivedGuest, listen, receive
from pykvm.report.text import bytes_text, count_text, plural, seconds_text


@click.command("receive", short_help="Take over one guest.")
@click.option(
    "--address",
    default="tcp:0",
    show_default=True,
    help="Where to listen: unix:PATH, tcp:HOST:PORT, or tcp:PORT on the loopback; port 0 means any free one.",
)
@click.option(
    "--check-seconds",
    type=duration_type(),
    default="1s",
    show_default=True,
    help="How long the guest runs here and checks its memory before the result is told.",
)
@click.option(
    "--max-memory",
    type=size_type(minimum=PAGE_SIZE),
    default="64G",
    show_default=True,
    help="Refuse guests with more memory than this.",
)
@click.option(
    "--accept-timeout", type=duration_type(minimum=0.001), help="Give up if nobody connects for this long."
)
@click.option(
    "--keep-running", is_flag=True, help="Afterwards let the guest run on until it ends, or Ctrl-C."
)
@common_options
def command(
    session: Session,
    address: str,
    check_seconds: float,
    max_memory: int,
    accept_timeout: float | None,
    keep_running: bool,
) -> None:
    """Wait for 'pykvm migrate send', take over its guest, compare every page, and run the guest.

    The line 'listening at ADDRESS' on standard error says that a sender can connect.
    """
    with open_system(session.backend) as system, listen(address) as listener:
        session.tell_choice(system)
        session.note(f"{LISTENING}{listener.address}")
        channel = listener.accept(accept_timeout)
        with ProgressDisplay(session) as progress:
            received = receive(
                system,
                channel,
                acceptance=Acceptance(max_memory=max_memory),
                check_seconds=check_seconds,
                progress=progress,
            )
        with received:
            session.document |= received.result.to_json()
            _tell(session, received)
            received.result.guest.require_intact()
            if keep_running:
                _run_on(session, received)


def _tell(session: Session, received: ReceivedGuest) -> None:
    result = received.result
    session.out.print(
        f"Received {count_text(result.pages_received)} pages ({bytes_text(result.bytes_received)}) in "
        f"{plural(result.rounds, 'round')} and {seconds_text(result.total_seconds)}; all "
        f"{count_text(result.pages_total)} pages verified. The guest made {count_text(result.guest.checks)} "
        f"checks here and found {plural(result.guest.corruptions, 'corruption')}."
    )


def _run_on(session: Session, received: ReceivedGuest) -> None:
    session.note("The guest runs on; Ctrl-C ends it.")
    try:
        received.guest.runner.wait()
    except KeyboardInterrupt:
        session.note("Ending the guest.")
    report: Any = received.guest.report()
    session.document |= {"guest_checks": report.checks, "guest_corruptions": report.corruption_count}
    session.out.print(
        f"In all it made {count_text(report.checks)} checks and found "
        f"{plural(report.corruption_count, 'corruption')}."
    )
