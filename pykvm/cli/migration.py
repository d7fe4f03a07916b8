"""What the three forms of ``pykvm migrate`` share: progress, documents, the report's values."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
from rich.live import Live
from rich.text import Text

from pykvm.cli.parameters import duration_type, number_type, rate_type
from pykvm.cli.session import Session
from pykvm.errors import GuestError, MigrationError, PykvmError, UsageError, VerificationError
from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.machine import System
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import (
    SABOTAGES,
    Channel,
    GuestChecks,
    MigrationResult,
    Phase,
    Policy,
    Progress,
    RoundResult,
    send,
)
from pykvm.report.html import migration_page
from pykvm.report.migration import MigrationReport, Round
from pykvm.report.terminal import rounds_table, summary_table
from pykvm.report.text import count_text, plural, rate_text, seconds_text
from pykvm.track import Tracker

Command = Callable[..., Any]

_PAUSE_SECONDS = 0.5
"""Between two attempts, for the receiver to come back."""

_PHASES = {
    Phase.CONNECT: "connecting",
    Phase.COPY: "copying",
    Phase.PAUSE: "pausing the guest",
    Phase.VERIFY: "comparing the digests of all pages",
    Phase.STATE: "moving the state of the vCPUs",
    Phase.HANDOVER: "handing over",
    Phase.CHECK: "the guest runs at the destination and checks its memory",
    Phase.DONE: "done",
}


def policy_options(command: Command) -> Command:
    """--bandwidth, --downtime-limit, --max-rounds, --warm-up, --attempts, --sabotage, --report."""
    for option in (
        click.option(
            "--report",
            "report_path",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Write a self-contained HTML page about the migration to this file.",
        ),
        click.option(
            "--sabotage",
            type=click.Choice(SABOTAGES),
            help="Drop a page on purpose; the proof must then fail and name it (status 10).",
        ),
        click.option(
            "--attempts",
            type=click.IntRange(1, 100),
            default=1,
            show_default=True,
            help="Try this often if a migration fails before the switch-over; the guest runs on in between.",
        ),
        click.option(
            "--warm-up",
            type=duration_type(),
            default="1s",
            show_default=True,
            help="Let the guest run for this long before the migration begins.",
        ),
        click.option(
            "--max-rounds",
            type=number_type(1, 100_000),
            default="30",
            show_default=True,
            help="Pause the guest after this many rounds, however much is left to send.",
        ),
        click.option(
            "--downtime-limit",
            type=duration_type(),
            default="300ms",
            show_default=True,
            help="Pause the guest once what is left is estimated to take no longer than this.",
        ),
        click.option(
            "--bandwidth",
            type=rate_type(),
            default="0",
            show_default=True,
            help="Most bytes per second on the wire, such as 100M; 0 means no limit.",
        ),
    ):
        command = option(command)
    return command


class ProgressDisplay:
    """The newest progress in one line of a terminal; elsewhere a line for each phase and finished round."""

    def __init__(self, session: Session) -> None:
        self._console = session.progress
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._phase: Phase | None = None
        self.rounds: list[RoundResult] = []

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.completed is not None:
            self.rounds.append(progress.completed)
        if self._console.is_terminal:
            done = progress.completed
            self._live.update(Text(_round_text(done) if done else _progress_text(progress)), refresh=True)
        elif progress.completed is not None:
            self._console.print(_round_text(progress.completed), markup=False)
        elif progress.phase is not self._phase and progress.phase is not Phase.COPY:
            self._console.print(_progress_text(progress), markup=False)
        self._phase = progress.phase


def _progress_text(progress: Progress) -> str:
    if progress.phase is not Phase.COPY:
        return f"{_PHASES[progress.phase]} …" if progress.phase is not Phase.DONE else "done"
    text = f"round {progress.round}: {count_text(progress.pages_done)}"
    if progress.pages_total:
        text += f" of {count_text(progress.pages_total)}"
    text += " pages"
    if progress.rate:
        text += f", {rate_text(progress.rate)}"
    if progress.estimate is not None:
        text += f", about {seconds_text(progress.estimate)} left"
    return text


def _round_text(done: RoundResult) -> str:
    text = (
        f"round {done.number}: {plural(done.pages + done.zero_pages, 'page')} in {seconds_text(done.seconds)}"
    )
    return text if done.final else f"{text}, {count_text(done.pages_dirtied)} dirtied meanwhile"


class Sending:
    """The source's side of a command: the guest, its migration, and what there is to say about it."""

    def __init__(
        self,
        session: Session,
        config: WorkloadConfig,
        tracker: Tracker,
        policy: Policy,
        *,
        transport: str,
        sabotage: str | None,
        report_path: Path | None,
    ) -> None:
        self._session = session
        self._config = config
        self._tracker = tracker
        self._policy = policy
        self._transport = transport
        self._sabotage = sabotage
        self._report_path = check_writable(report_path)
        self._rounds: list[RoundResult] = []
        self._backend = ""

    def start(self, system: System, warm_up: float) -> WorkloadGuest:
        """The guest, running for ``warm_up`` seconds already.  The caller closes it."""
        guest = WorkloadGuest.create(system, self._config, prepare=self._tracker.prepare)
        try:
            self._backend = guest.machine.backend
            self._session.document |= self._base_document()
            guest.runner.start()
            if guest.runner.wait(warm_up) is not None:
                raise GuestError("The guest ended by itself before the migration began.")
        except BaseException:
            guest.close()
            raise
        return guest

    def move(
        self, guest: WorkloadGuest, channel: Channel, *, fence: Callable[[], bool] | None = None
    ) -> MigrationResult:
        """Migrate the guest and fill the document; whatever ``send`` raises comes through."""
        with ProgressDisplay(self._session) as progress:
            self._rounds = progress.rounds
            return send(
                guest,
                self._tracker,
                channel,
                self._policy,
                progress=progress,
                sabotage=self._sabotage,
                fence=fence,
            )

    def attempt(self, guest: WorkloadGuest, attempts: int, once: Callable[[], MigrationResult]) -> None:
        """Migrate with ``once``, again while it fails with the guest still here, and tell how it went.

        Raises what the last attempt raised, or what the guest found at the destination.
        """
        for number in range(1, attempts + 1):
            self._session.document["attempts"] = number
            try:
                result = once()
            except PykvmError as error:
                if isinstance(error, MigrationError) and number < attempts:
                    self._session.note(f"attempt {number} failed: {error}")
                    guest.runner.wait(_PAUSE_SECONDS)
                    continue
                self.failed(error, guest)
                raise
            self.succeeded(result)
            return

    def succeeded(self, result: MigrationResult) -> None:
        """Print, write and judge a migration that went through.  Raises what the guest found."""
        intact = not result.guest.corruptions and not result.guest.failure
        self._session.document |= result.to_json() | {"verified": result.verified and intact}
        problem = "" if intact else "The guest found its memory damaged at the destination, or failed there."
        report = self._report(result, verified=intact, problem=problem)
        self._session.out.print(rounds_table(report))
        self._session.out.print()
        self._session.out.print(summary_table(report))
        self._write(report)
        result.guest.require_intact()

    def failed(self, error: Exception, guest: WorkloadGuest) -> None:
        """Write down what is known about a failed one, and how the guest fares at the source."""
        wrong = error.pages if isinstance(error, VerificationError) else ()
        self._session.document |= {
            "rounds": [item.to_json() for item in self._rounds],
            "wrong_pages": list(wrong),
            "guest_at_source": _fate(guest),
        }
        report = self._report(None, verified=False, problem=str(error), wrong=wrong)
        if report.rounds:
            self._session.progress.print(rounds_table(report))
        self._write(report)
        fate = self._session.document["guest_at_source"]
        if fate["running"]:
            self._session.note(
                f"The guest runs on at the source: {count_text(fate['checks'])} checks more, "
                f"{plural(fate['corruptions'], 'corruption')}."
            )

    # --- inside ----------------------------------------------------------------------------------

    def _base_document(self) -> dict[str, Any]:
        return {
            "verified": False,
            "backend": self._backend,
            "tracker": self._tracker.name,
            "workload": self._config.workload,
            "memory_bytes": self._config.memory,
            "vcpus": self._config.vcpus,
            "cpl": self._config.cpl,
            "seed": self._config.seed,
            "transport": self._transport,
            "sabotage": self._sabotage,
        }

    def _write(self, report: MigrationReport) -> None:
        if self._report_path is not None:
            write_text(self._report_path, migration_page(report))
            self._session.document["report"] = str(self._report_path)
            self._session.note(f"report: {self._report_path}")

    def _report(
        self, result: MigrationResult | None, *, verified: bool, problem: str, wrong: tuple[int, ...] = ()
    ) -> MigrationReport:
        rounds = timed_rounds(result.rounds if result else tuple(self._rounds))
        guest = result.guest if result else GuestChecks(0, 0)
        limit = self._policy.bandwidth
        return MigrationReport(
            verified=verified,
            backend=self._backend,
            tracker=self._tracker.name,
            workload=self._config.workload,
            memory=self._config.memory,
            vcpus=self._config.vcpus,
            transport=self._transport,
            rounds=rounds,
            total_seconds=result.total_seconds if result else sum(item.seconds for item in rounds),
            downtime_seconds=result.downtime_seconds if result else None,
            digest_seconds=result.digest_seconds if result else None,
            bytes_sent=result.bytes_sent if result else sum(item.bytes for item in rounds),
            pages_total=self._config.memory // PAGE_SIZE,
            digest_source=result.digest_source if result else "",
            digest_destination=result.digest_destination if result else "",
            guest_checks=guest.checks,
            guest_corruptions=guest.corruptions,
            converged=result.converged if result else True,
            problem=problem,
            wrong_pages=wrong,
            parameters={
                "Privilege level of the guest": f"CPL {self._config.cpl}",
                "Seed": str(self._config.seed),
                "Downtime limit": seconds_text(self._policy.downtime_limit),
                "Bandwidth limit": rate_text(limit) if limit else "none",
                "Rounds before the pause": f"at most {self._policy.max_rounds}",
                "Sabotage": self._sabotage or "none",
            },
        )


def timed_rounds(rounds: tuple[RoundResult, ...]) -> tuple[Round, ...]:
    """The rounds one after another, as the report draws them."""
    timed = []
    start = 0.0
    for item in rounds:
        timed.append(
            Round(
                item.number,
                item.pages + item.zero_pages,
                item.zero_pages,
                item.bytes,
                start,
                item.seconds,
                item.pages_dirtied,
                item.final,
                () if item.final else item.heat,
            )
        )
        start += item.seconds
    return tuple(timed)


def _fate(guest: WorkloadGuest) -> dict[str, Any]:
    """Whether the guest still runs here and what it finds in the next moment."""
    before = guest.report()
    running = guest.runner.running
    if running:
        guest.runner.wait(0.2)
    after = guest.report()
    return {
        "running": running,
        "checks": after.checks - before.checks,
        "corruptions": after.corruption_count,
    }


def check_writable(path: Path | None) -> Path | None:
    """The path, if a file can be made there.  Raises UsageError now rather than after the work."""
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UsageError(f"Cannot write {path}: '{path.parent}' is not a directory that you may write to.")
    return path


def write_text(path: Path, text: str) -> None:
    """Write the file.  Raises UsageError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}.") from error
