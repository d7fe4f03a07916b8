"""The source's side of ``pykvm migrate`` and ``pykvm migrate send``: documents, tables and the report."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pykvm.cli.progress import ProgressDisplay
from pykvm.cli.session import Session
from pykvm.errors import GuestError, MigrationError, PykvmError, UsageError, VerificationError
from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.machine import System
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import Channel, GuestChecks, MigrationResult, Policy, RoundResult, send
from pykvm.report.html import migration_page
from pykvm.report.migration import MigrationReport, Round
from pykvm.report.terminal import rounds_table, summary_table
from pykvm.report.text import count_text, plural, rate_text, seconds_text
from pykvm.track import Tracker

_PAUSE_SECONDS = 0.5
"""Between two attempts, for the receiver to come back."""


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
