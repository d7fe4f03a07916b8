"""Tests in labs as they end: a counter in a terminal, lines elsewhere, and the tables at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pykvm.errors import LabDiedError, LabTimeoutError, PykvmError
from pykvm.lab.results import Case, SuiteResult
from pykvm.report.text import plural, seconds_text

_COLUMNS = ("passed", "failed", "died", "xfailed", "xpassed", "skipped")
_STYLES = {"failed": "red", "died": "bold red", "xpassed": "yellow"}
_EVERY = 30.0  # seconds between two counters where there is no terminal


class SuiteProgress:
    """A watcher of one or several suites: each bad test gets a line, the others are counted."""

    def __init__(self, console: Console, label: str, *, verbose: bool = False) -> None:
        self._console = console
        self._label = label
        self._verbose = verbose
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._told = time.monotonic()
        self._counts: Counter[str] = Counter()
        self.cases: list[Case] = []
        self.collected = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """A line about the lab itself."""
        self._console.print(f"{self._label}: {text}", markup=False, soft_wrap=True)

    def case(self, case: Case, done: int, collected: int) -> None:
        """A test ended."""
        self.cases.append(case)
        self.collected = collected
        self._counts[case.outcome] += 1
        if case.bad or self._verbose:
            reason = f": {case.reason}" if case.reason else ""
            line = f"{case.outcome} {case.nodeid} ({seconds_text(case.seconds)}){reason}"
            self.note(line)
        counter = f"{done} of {collected} tests, {counts_text(self._counts)}"
        if self._console.is_terminal:
            self._live.update(Text(f"{self._label}: {counter}"), refresh=True)
        elif time.monotonic() - self._told > _EVERY or done == collected:
            self._told = time.monotonic()
            self.note(counter)


def counts_text(counts: Counter[str]) -> str:
    """``12 passed, 1 failed``."""
    return ", ".join(f"{counts[name]} {name}" for name in _COLUMNS if counts[name]) or "none yet"


def results_table(results: Iterable[SuiteResult]) -> Table:
    """Kernels by kinds, a row for each lab."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("kernel", "KVM"):
        table.add_column(name, no_wrap=True)
    table.add_column("emulator")
    for name in (*_COLUMNS, "left", "boot", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        counts = [
            Text(str(result.count(name) or "·"), style=_STYLES.get(name, "") if result.count(name) else "dim")
            for name in _COLUMNS
        ]
        table.add_row(
            result.running or result.release,
            result.kind,
            result.emulator or "?",
            *counts,
            str(result.left or "·"),
            f"{result.boot_seconds:.0f} s" if result.boot_seconds else "",
            f"{result.seconds:.0f} s",
        )
    return table


def bad_lines(results: Iterable[SuiteResult]) -> Iterable[str]:
    """Each bad test and each lab without a result for all tests, a line each."""
    for result in results:
        where = f"{result.kind}, Linux {result.release}"
        for case in result.bad:
            yield f"{case.outcome} {case.nodeid} ({where}): {case.reason}"
        if result.state != "finished":
            yield f"{result.state} ({where}): {result.problem}"


def summary(results: Iterable[SuiteResult]) -> str:
    """One sentence on all."""
    results = list(results)
    counts = Counter(case.outcome for result in results for case in result.cases)
    return f"{plural(sum(counts.values()), 'test')} in {plural(len(results), 'lab')}: {counts_text(counts)}."


def judge(results: Sequence[SuiteResult]) -> None:
    """Raise what the exit status is to say: a lab that died first, then one out of time, then failed
    tests.
    """
    for state, error in (("died", LabDiedError), ("timeout", LabTimeoutError), ("broken", PykvmError)):
        for result in results:
            if result.state == state:
                raise error(f"{result.kind} with Linux {result.release}: {result.problem}")
    bad = sum(len(result.bad) for result in results)
    if bad:
        raise PykvmError(f"{plural(bad, 'test')} failed; the lines above say which and why.")
