"""Many random scenarios on two machines: how many, what they covered, and where the machines disagree."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from pykvm.crosscheck.compare import Agreement, Difference, Level, Result, compare
from pykvm.crosscheck.generate import RandomSource, random_scenario
from pykvm.crosscheck.run import TIME_LIMIT, run
from pykvm.crosscheck.scenario import CodeGuest, Scenario
from pykvm.crosscheck.shrink import shrink
from pykvm.crosscheck.trace import Trace
from pykvm.machine import System
from pykvm.x86.cpuid import CpuidEntry

LEVELS: Final = (Level.L4, Level.L0, Level.L1)
"""From the most telling to the most general."""
MOST_FAILURES: Final = 10
"""A run ends after so many: whatever comes then has the same cause as a rule."""
SHRINK_SECONDS: Final = 5.0


@dataclass(slots=True)
class ScenarioReport:
    """``cases`` scenarios in ``seconds``; ``partial`` of them could be compared in part only.

    ``disagreements`` are the first differences, each of a shrunk scenario that is saved in the ``file``
    of the difference.  ``coverage`` counts modes, trackers, kinds of steps and of exits, and refusals.
    """

    cases: int = 0
    partial: int = 0
    seconds: float = 0.0
    disagreements: list[Difference] = field(default_factory=list)
    coverage: Counter[str] = field(default_factory=Counter)


def common_cpuid(*systems: System) -> Sequence[CpuidEntry]:
    """The processor that the guests of all systems shall see: that of the first real KVM, if there is one."""
    system = min(systems, key=lambda each: each.backend == "model")
    with system.create_machine() as machine:
        return machine.supported_cpuid


def traces(
    scenario: Scenario,
    first: System,
    second: System,
    *,
    cpuid: Sequence[CpuidEntry] | None = None,
    seconds: float = TIME_LIMIT,
) -> tuple[Trace, Trace]:
    """``scenario`` on both, with the same processor for the guests.  Raises as ``run`` does."""
    if cpuid is None:
        cpuid = common_cpuid(first, second)
    return (
        run(scenario, first, cpuid=cpuid, seconds=seconds),
        run(scenario, second, cpuid=cpuid, seconds=seconds),
    )


def check(scenario: Scenario, first: System, second: System, *, seconds: float = TIME_LIMIT) -> Result:
    """Run ``scenario`` on both and compare at all levels: the first difference, or the agreement.

    Raises as ``run`` does.
    """
    return judge(*traces(scenario, first, second, seconds=seconds))


def judge(first: Trace, second: Trace) -> Result:
    """Compare at all levels: the first difference, or the agreement."""
    result: Result = Agreement(0)
    for level in LEVELS:
        result = compare(first, second, level)
        if isinstance(result, Difference):
            break
    return result


def run_scenarios(
    first: System,
    second: System,
    *,
    seconds: float,
    seed: int,
    directory: Path,
    progress: Callable[[ScenarioReport], None] = lambda report: None,
    most_failures: int = MOST_FAILURES,
) -> ScenarioReport:
    """Check random scenarios for ``seconds``; the same ``seed`` gives the same ones in the same order.

    ``progress`` hears after each.  A scenario that fails is shrunk (for up to SHRINK_SECONDS, which count)
    and saved in ``directory``; after ``most_failures`` the run ends.  Raises as ``run`` does, and OSError.
    """
    report = ScenarioReport()
    cpuid = common_cpuid(first, second)

    def fails(scenario: Scenario) -> bool:
        return isinstance(judge(*traces(scenario, first, second, cpuid=cpuid)), Difference)

    begin = time.monotonic()
    while time.monotonic() - begin < seconds and len(report.disagreements) < most_failures:
        name = f"seed {seed}, case {report.cases}"
        source = RandomSource(name)
        scenario = random_scenario(source, name)
        trace, other = traces(scenario, first, second, cpuid=cpuid)
        result = judge(trace, other)
        report.cases += 1
        _count(report.coverage, trace)
        if isinstance(result, Difference):
            small = shrink(source.choices, fails, name=name, seconds=SHRINK_SECONDS)
            report.disagreements.append(_saved(small, directory, check(small, first, second), result))
        elif result.note:
            report.partial += 1
        report.seconds = time.monotonic() - begin
        progress(report)
    return report


def _saved(scenario: Scenario, directory: Path, result: Result, first: Difference) -> Difference:
    """Save the shrunk scenario; the difference that it shows, or else the one it was shrunk for."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"scenario-{scenario.name.replace(', case ', '-').removeprefix('seed ')}.json"
    scenario.save(path)
    difference = result if isinstance(result, Difference) else first
    return replace(difference, file=str(path))


def _count(coverage: Counter[str], trace: Trace) -> None:
    guest = trace.scenario.guest
    if isinstance(guest, CodeGuest):
        coverage[f"mode {guest.vcpus[0].mode}, CPL {guest.vcpus[0].cpl}"] += 1
    coverage[f"tracker {trace.scenario.tracker}"] += 1
    for step in trace.steps:
        coverage[f"step {step.step.kind}"] += 1
        for reason in step.exits:
            coverage[f"exit {type(reason).__name__}"] += 1
        if step.refused:
            coverage[f"refusal {step.step.kind} {step.refused}"] += 1
