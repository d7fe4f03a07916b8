"""Many random scenarios of KVM's MMU on a real KVM and on its model: levels L2 and L3.

Fast, since one takes a few milliseconds on the real KVM: memories are used again and again, counters are
read from kept descriptors, memory is compared at the end only, and JSON is written for failures only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from pykvm.crosscheck.compare import Difference, Level, Result, compare
from pykvm.crosscheck.generate import RandomSource
from pykvm.crosscheck.mass import common_cpuid
from pykvm.crosscheck.mmu_generate import random_mmu_scenario
from pykvm.crosscheck.rig import MemoryPool
from pykvm.crosscheck.run import COUNTERS, EVERYTHING, Watch, run
from pykvm.crosscheck.scenario import Scenario
from pykvm.crosscheck.shrink_steps import shrink_steps
from pykvm.crosscheck.steps import Access
from pykvm.crosscheck.trace import Trace
from pykvm.machine import System
from pykvm.machine.emulation import emulator
from pykvm.x86.cpuid import CpuidEntry

MOST_FAILURES: Final = 10
SHRINK_SECONDS: Final = 10.0
TIME_LIMIT: Final = 5.0 if emulator() else 0.5
"""Seconds for a scenario, many times what most take: a guest that faults for ever is stopped and compared
as far as it came.  Under an emulator everything takes its time."""


@dataclass(slots=True)
class MmuReport:
    """``cases`` scenarios with ``steps`` steps in ``seconds``.

    ``partial`` ones could not be compared to their end.  ``unrepeatable`` ones differed once and then agreed:
    a host interrupt that ends a batch of emulated instructions early has requests served one entry sooner.
    ``entries``: ring entries, ``pages``: reported pages, ``counters``: values of counters that were compared.
    ``disagreements`` are the first differences, each of a shrunk scenario that is saved in the ``file`` of
    the difference; ``coverage`` counts trackers, snippets, kinds of steps and of exits, and how far the
    counters moved.
    """

    cases: int = 0
    partial: int = 0
    unrepeatable: int = 0
    seconds: float = 0.0
    steps: int = 0
    entries: int = 0
    pages: int = 0
    counters: int = 0
    disagreements: list[Difference] = field(default_factory=list)
    coverage: Counter[str] = field(default_factory=Counter)


class MmuCheck:
    """Runs scenarios on two systems and compares; a context manager that lets its memories go."""

    def __init__(
        self,
        first: System,
        second: System,
        *,
        level: Level = Level.L3,
        cpuid: Sequence[CpuidEntry] | None = None,
        seconds: float = TIME_LIMIT,
    ) -> None:
        self._systems = first, second
        self._level = level
        self._cpuid = common_cpuid(first, second) if cpuid is None else cpuid
        self._seconds = seconds
        self._pool = MemoryPool()

    def traces(self, scenario: Scenario, watch: Watch = COUNTERS) -> tuple[Trace, Trace]:
        """The scenario on both.  Raises as ``run`` does."""
        one, other = (
            run(scenario, system, cpuid=self._cpuid, seconds=self._seconds, watch=watch, pool=self._pool)
            for system in self._systems
        )
        return one, other

    def check(self, scenario: Scenario, watch: Watch = COUNTERS) -> Result:
        """The first difference or the agreement."""
        return compare(*self.traces(scenario, watch), self._level)

    def judge(self, one: Trace, other: Trace) -> Result:
        """Compare two traces at the level."""
        return compare(one, other, self._level)

    def close(self) -> None:
        """Let the memories go."""
        self._pool.close()

    def __enter__(self) -> MmuCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_mmu_scenarios(
    first: System,
    second: System,
    *,
    seconds: float,
    seed: int,
    directory: Path,
    level: Level = Level.L3,
    count: int | None = None,
    progress: Callable[[MmuReport], None] = lambda report: None,
    most_failures: int = MOST_FAILURES,
    shrink_seconds: float = SHRINK_SECONDS,
) -> MmuReport:
    """Check random scenarios for ``seconds``, or ``count`` of them; the same ``seed`` gives the same ones.

    ``progress`` hears after each.  A scenario that fails is shrunk (for up to ``shrink_seconds``, which
    count) and saved in ``directory``; after ``most_failures`` the run ends.  Raises as ``run`` does, and
    OSError.
    """
    report = MmuReport()
    with MmuCheck(first, second, level=level) as check:
        begin = time.monotonic()
        while time.monotonic() - begin < seconds and (count is None or report.cases < count):
            name = f"seed {seed}, case {report.cases}"
            scenario = random_mmu_scenario(RandomSource(name), name)
            trace, other = check.traces(scenario)
            result = check.judge(trace, other)
            report.cases += 1
            _count(report, trace, other)
            if isinstance(result, Difference) and not _repeats(check, scenario, result):
                report.unrepeatable += 1
            elif isinstance(result, Difference):
                report.disagreements.append(_shrunk(check, scenario, result, directory, shrink_seconds))
            elif result.note:
                report.partial += 1
            report.seconds = time.monotonic() - begin
            progress(report)
            if len(report.disagreements) >= most_failures:
                break
    return report


def _repeats(check: MmuCheck, scenario: Scenario, found: Difference) -> bool:
    """Whether the same difference shows twice more."""
    return all(_same(check.check(scenario), found) for _ in range(2))


def _same(result: Result, found: Difference) -> bool:
    return isinstance(result, Difference) and (result.level, result.what) == (found.level, found.what)


def _shrunk(
    check: MmuCheck, scenario: Scenario, found: Difference, directory: Path, seconds: float
) -> Difference:
    """Shrink and save; the difference that the small scenario shows."""

    def fails(candidate: Scenario) -> bool:
        return _same(check.check(candidate), found)

    small = shrink_steps(scenario, fails, seconds=seconds)
    result = check.check(small, EVERYTHING)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"mmu-{scenario.name.replace(', case ', '-').removeprefix('seed ')}.json"
    small.save(path)
    return replace(result if isinstance(result, Difference) else found, file=str(path))


def _count(report: MmuReport, trace: Trace, other: Trace) -> None:
    steps = min(len(trace.steps), len(other.steps))
    report.steps += steps
    coverage = report.coverage
    coverage[f"tracker {trace.scenario.tracker}"] += 1
    for step in trace.steps[:steps]:
        report.counters += len(step.counters)
        report.entries += len(step.pushed) + len(step.ring)
        report.pages += 0 if step.dirty is None else len(step.dirty)
        kind = step.step.kind
        coverage[f"snippet {step.step.snippet}" if isinstance(step.step, Access) else f"step {kind}"] += 1
        for reason in step.exits:
            coverage[f"exit {type(reason).__name__}"] += 1
        if step.refused:
            coverage[f"refusal {kind} {step.refused}"] += 1
    if trace.steps:
        for name, value in trace.steps[-1].counters.items():
            if value:
                coverage[f"counter {name.partition('.')[2]}"] += value
