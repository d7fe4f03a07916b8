"""``pykvm dirty``: watch a workload write, collection by collection."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from rich.console import Group
from rich.live import Live
from rich.text import Text

from pykvm.cli.host_profile import open_machines, profile_option
from pykvm.cli.options import guest_config, guest_options, tracker_of, tracker_options
from pykvm.cli.parameters import duration_type
from pykvm.cli.session import Session, common_options
from pykvm.errors import GuestCorruptionError
from pykvm.guest.workloads import WorkloadGuest
from pykvm.machine import DirtyPages, Gfns, Machine
from pykvm.memory import PAGE_SIZE
from pykvm.profiles import Profile
from pykvm.report.heat import bin_pages, bin_sizes
from pykvm.report.terminal import heat_text
from pykvm.report.text import bytes_text, count_text, plural, rate_text, seconds_text
from pykvm.track import Tracker

_HISTORY = 16
_LABEL_COLUMNS = 40


@dataclass(frozen=True, slots=True)
class Interval:
    """One collection: when it ended, how long it covered, how long collecting took, what was dirty."""

    at: float
    seconds: float
    collect_seconds: float
    pages: int
    new_pages: int

    @property
    def rate(self) -> float:
        """Dirty bytes per second."""
        return self.pages * PAGE_SIZE / self.seconds if self.seconds > 0 else 0.0


def memory_pages(machine: Machine, pages: DirtyPages) -> Gfns:
    """The pages as numbers within the guest's memory, where no hole lies between slots."""
    parts = [
        pages.gfns(slot.id) + np.uint64(slot.memory_offset // PAGE_SIZE) - np.uint64(slot.gpa // PAGE_SIZE)
        for slot in machine.slots.values()
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)


class Watch:
    """Collects at intervals and shows the newest ones, one line each with its heat map."""

    def __init__(self, session: Session, guest: WorkloadGuest, tracker: Tracker, interval: float) -> None:
        self._session = session
        self._guest = guest
        self._tracker = tracker
        self._interval = interval
        self._lines: list[Text] = []
        self._last = self._begin = time.monotonic()
        self.all_pages = DirtyPages()
        self.intervals: list[Interval] = []

    def run(self, seconds: float) -> None:
        """Until ``seconds`` are over or the guest has finished.  Raises what the guest failed with."""
        console = self._session.progress
        runner = self._guest.runner
        with Live(console=console, auto_refresh=False, transient=False) as live:
            self._last = self._begin = time.monotonic()
            done = False
            while not done:
                left = self._begin + seconds - time.monotonic()
                ended = runner.wait(max(0.0, min(self._interval, left))) is not None
                done = ended or left <= self._interval
                if done:
                    runner.pause()
                line = self._collect(final=done, columns=max(8, console.width - _LABEL_COLUMNS))
                self._lines = [*self._lines, line][-_HISTORY:]
                if console.is_terminal:
                    live.update(Group(*self._lines), refresh=True)
                else:
                    console.print(line, soft_wrap=True)

    def _collect(self, *, final: bool, columns: int) -> Text:
        begin = time.monotonic()
        pages = self._tracker.collect(final=final)
        self._tracker.rearm(pages)
        now = time.monotonic()
        item = Interval(
            now - self._begin, now - self._last, now - begin, len(pages), len(pages - self.all_pages)
        )
        self._last = now
        self.all_pages |= pages
        self.intervals.append(item)
        total = self._guest.memory.size // PAGE_SIZE
        counts = bin_pages(memory_pages(self._guest.machine, pages), total, columns)
        label = f"{item.at:6.2f} s {count_text(item.pages):>11} pages {rate_text(item.rate):>13}  "
        return Text(label, no_wrap=True).append_text(heat_text(counts, bin_sizes(total, columns)))


def _document(guest: WorkloadGuest, tracker: Tracker, watch: Watch) -> dict[str, Any]:
    report = guest.report()
    return {
        "backend": guest.machine.backend,
        "workload": guest.config.workload,
        "tracker": tracker.name,
        "cpl": guest.config.cpl,
        "vcpus": guest.config.vcpus,
        "memory_bytes": guest.config.memory,
        "seconds": watch.intervals[-1].at,
        "intervals": [
            {
                "at_seconds": item.at,
                "seconds": item.seconds,
                "collect_seconds": item.collect_seconds,
                "pages": item.pages,
                "new_pages": item.new_pages,
                "bytes_per_second": item.rate,
            }
            for item in watch.intervals
        ],
        "pages_total": guest.memory.size // PAGE_SIZE,
        "pages_dirtied": len(watch.all_pages),
        "guest_visits": report.visits,
        "guest_checks": report.checks,
        "guest_corruptions": report.corruption_count,
    }


@click.command("dirty", short_help="Watch what a running workload writes.")
@click.argument("workload")
@click.option(
    "--seconds", type=duration_type(minimum=0.01), default="5s", show_default=True, help="How long to watch."
)
@click.option(
    "--interval",
    type=duration_type(minimum=0.001),
    default="100ms",
    show_default=True,
    help="Time between two collections.",
)
@guest_options
@tracker_options
@profile_option
@common_options
def command(
    session: Session, workload: str, seconds: float, interval: float, host: Profile | None, **options: Any
) -> None:
    """Run WORKLOAD and show, collection by collection, how much it writes and where.

    Each line is one collection: time, distinct dirty pages, dirty rate, and guest memory from left to right.
    'pykvm guests list' names the workloads.
    """
    config = guest_config(workload, options)
    tracker = tracker_of(options)
    with open_machines(session, host) as system:
        session.tell_choice(system)
        with WorkloadGuest.create(system, config, prepare=tracker.prepare) as guest:
            guest.runner.on_ring_full = tracker.on_ring_full
            tracker.arm(guest.machine)
            guest.runner.start()
            watch = Watch(session, guest, tracker, interval)
            try:
                watch.run(seconds)
            finally:
                # Also what is known when the user or an error ends it.
                guest.runner.stop()
                tracker.disarm()
                if watch.intervals:
                    session.document |= _document(guest, tracker, watch)
                    _print_summary(session)
    corruptions = session.document["guest_corruptions"]
    if corruptions:
        raise GuestCorruptionError(f"The guest found {plural(corruptions, 'corruption')} in its memory.")


def _print_summary(session: Session) -> None:
    document = session.document
    pages = document["pages_dirtied"]
    session.out.print(
        f"{count_text(pages)} of {count_text(document['pages_total'])} pages "
        f"({bytes_text(pages * PAGE_SIZE)}) "
        f"dirtied in {seconds_text(document['seconds'])}; the guest made "
        f"{count_text(document['guest_visits'])} visits and {count_text(document['guest_checks'])} checks "
        f"and found {plural(document['guest_corruptions'], 'corruption')}."
    )
