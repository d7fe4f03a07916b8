"""The real-KVM tests in a lab: results that come in one by one, and a lab started again when a test killed
it.

The guest runs ``pytest -p tests.lab_plugin``, which sends a record as each test begins and ends
(tests/lab_plugin.py has the format).  When the guest dies, the test that had begun and not ended is the one
that killed it: it gets the outcome ``died``, and a new lab runs the rest.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pykvm.errors import LabDiedError, LabTimeoutError
from pykvm.lab.kernels import PreparedKernel
from pykvm.lab.kinds import Kind
from pykvm.lab.results import Case, GarbledResult, SuiteResult, case_from_json
from pykvm.lab.selections import REAL_KVM
from pykvm.lab.session import RunResult, RunSpec, Sinks

FACTS_NODEID = "pykvm info"
LEAVE_OUT = "tests-done"
_KEPT_OUTPUT = 65_536
_PYTEST_FINE = (0, 1, 5)  # all passed, some failed, none chosen

Runner = Callable[[RunSpec, Sinks], RunResult]


class Watcher(Protocol):
    """Who wants to see the tests as they end."""

    def note(self, text: str) -> None:
        """A line about the lab itself."""

    def case(self, case: Case, done: int, collected: int) -> None:
        """A test ended; ``done`` of ``collected`` have."""


@dataclass(frozen=True)
class SuiteSpec:
    """What to run where.

    ``root`` is the checkout; ``paths`` (relative to it), ``keyword`` and ``marker`` choose the tests.
    ``timeout`` bounds everything, ``test_timeout`` one test (in seconds of the guest's clock), ``silence``
    the time until a guest that says nothing is taken for dead.  After ``most_deaths`` deaths the rest is
    given up.  ``emulator`` and ``slug`` name what is expected to run it, for a lab that never says so.
    """

    kernel: PreparedKernel
    kind: Kind
    root: Path
    paths: tuple[str, ...] = ("tests",)
    keyword: str = ""
    marker: str = REAL_KVM
    timeout: float = 1800.0
    test_timeout: float = 240.0
    silence: float = 660.0
    emulator: str = ""
    slug: str = ""
    facts: bool = True
    most_deaths: int = 6


def run_suite(
    spec: SuiteSpec,
    watcher: Watcher,
    runner: Runner,
    clock: Callable[[], float] = time.monotonic,
) -> SuiteResult:
    """Run the tests until each has an outcome, the time is over or the lab died too often.

    ``runner`` is ``session.run`` with its cache and emulator.  Raises what ``runner`` raises, but for a lab
    that died or took too long, which the result tells.
    """
    return _Suite(spec, watcher, runner, clock).run()


class _Suite:
    """One call of ``run_suite``: what is known so far."""

    def __init__(self, spec: SuiteSpec, watcher: Watcher, runner: Runner, clock: Callable[[], float]) -> None:
        self.spec = spec
        self.watcher = watcher
        self.runner = runner
        self.clock = clock
        self.result = SuiteResult(
            spec.kernel.series, spec.kernel.release, spec.kind.name, emulator=spec.emulator, slug=spec.slug
        )
        self.cases: dict[str, Case] = {}
        self.deaths = 0
        self.facts_wanted = spec.facts
        self.forget()

    def forget(self) -> None:
        """Start a boot with nothing known of it."""
        self.running = ""
        self.running_since = 0.0
        self.ended: int | None = None
        self.broken = ""
        self.seen = 0
        self.output = bytearray()

    def run(self) -> SuiteResult:
        start = self.clock()
        deadline = start + self.spec.timeout
        problem: tuple[str, str] | None = None
        with tempfile.TemporaryDirectory(prefix="pykvm-lab-test-") as folder:
            while problem is None:
                self.forget()
                left_out = Path(folder) / LEAVE_OUT
                left_out.write_text("".join(f"{nodeid}\n" for nodeid in self.cases), encoding="utf-8")
                problem = self.boot(left_out, deadline - self.clock())
        state, text = problem
        cases = tuple(self.cases.values())
        return replace(self.result, state=state, problem=text, cases=cases, seconds=self.clock() - start)

    def boot(self, left_out: Path, seconds: float) -> tuple[str, str] | None:
        """One lab.  The state and the problem that the run ends with, or None: once more."""
        if seconds <= 0:
            return "timeout", self.over()
        self.result = replace(self.result, boots=self.result.boots + 1)
        spec = RunSpec(
            kernel=self.spec.kernel,
            kind=self.spec.kind,
            command=self.command(),
            timeout=seconds,
            silence=self.spec.silence,
            put=(left_out,),
            environment=self.environment(),
            directory=str(self.spec.root),
        )
        sinks = Sinks(
            stdout=self.take_output, stderr=self.take_output, record=self.take, note=self.watcher.note
        )
        try:
            done = self.runner(spec, sinks)
        except LabTimeoutError as error:
            self.watcher.note(str(error))
            return "timeout", self.over()
        except LabDiedError as error:
            return self.after_death(error)
        self.result = replace(
            self.result, emulator=done.emulator, slug=done.slug, boot_seconds=done.boot_seconds
        )
        return self.after_return(done)

    def after_death(self, error: LabDiedError) -> tuple[str, str] | None:
        """The lab died: blame the test that ran, and go on if there are not too many deaths.

        The diagnosis goes into the result.  The whole sentence names files of this machine, so it is for
        those who watch and for the test's text.
        """
        why = error.diagnosis.rstrip(".") or str(error)
        alone = not self.running
        self.died(why, f"{error}\n{self.tail()}")
        if alone and self.ended is not None:
            return self.finished()
        self.deaths += 1
        if self.deaths >= self.spec.most_deaths or (alone and not self.seen and self.deaths > 1):
            return "died", f"The lab died: {why}. That was death number {self.deaths}.{self.rest()}"
        self.watcher.note(f"{error} Another one runs the rest.")
        return None

    def after_return(self, done: RunResult) -> tuple[str, str] | None:
        """The command ended by itself; pytest may have, too."""
        if self.ended is not None:
            return self.finished()
        if self.running:
            # os._exit, a signal, or the limit of one test: the process is gone, the kernel is well.
            why = f"the process of the tests ended with status {done.status}"
            if "Timeout (" in self.tail():
                why = f"it took longer than its {self.spec.test_timeout:.0f} s"
            self.died(why, self.tail())
            self.deaths += 1
            if self.deaths < self.spec.most_deaths:
                return None
            return "died", f"In the last test {why}. That was death number {self.deaths}.{self.rest()}"
        lines = self.tail().strip().splitlines()
        last = f" It said: {lines[-1].strip()}" if lines else ""
        return "broken", f"pytest ended with status {done.status} before it ran a test.{last}"

    def over(self) -> str:
        """The sentence for a run whose time is over."""
        return f"The time of {self.spec.timeout:.0f} s is over.{self.rest()}"

    def finished(self) -> tuple[str, str]:
        """pytest came to its end, though perhaps without all tests."""
        if self.broken:
            return "broken", f"Some tests could not be collected: {self.broken}"
        if self.ended not in _PYTEST_FINE:
            return "broken", f"pytest ended with status {self.ended}."
        if self.result.collected > len(self.cases):
            return "broken", f"pytest ended too early.{self.rest()}"
        return "finished", ""

    def rest(self) -> str:
        """A sentence on the tests without an outcome, after a blank; empty if there are none."""
        if not self.result.collected:
            return " No test ran."
        left = self.result.collected - len(self.cases)
        return f" {left} of {self.result.collected} tests did not run." if left > 0 else ""

    def died(self, why: str, text: str) -> None:
        """The test that runs gets the outcome; the look at the host is given up instead."""
        if self.running == FACTS_NODEID:
            self.facts_wanted = False
            self.result = replace(self.result, facts={"error": why})
        elif self.running:
            seconds = round(self.clock() - self.running_since, 3)
            self.add(Case(self.running, "died", seconds, reason=why, text=text, kvm=True))
        self.running = ""

    def tail(self) -> str:
        """The end of what the guest's command printed."""
        return bytes(self.output).decode(errors="replace")

    def add(self, case: Case) -> None:
        if case.nodeid not in self.cases:
            self.cases[case.nodeid] = case
            self.watcher.case(case, len(self.cases), self.result.collected)

    # --- what goes into the lab

    def command(self) -> tuple[str, ...]:
        options = "-p tests.lab_plugin -p no:cacheprovider -q --tb=short --no-header"
        # A file that cannot be imported there must not keep the others from running.
        command = [sys.executable, "-m", "pytest", *options.split(), "--continue-on-collection-errors"]
        if self.spec.marker:
            command += ["-m", self.spec.marker]
        if self.spec.keyword:
            command += ["-k", self.spec.keyword]
        return (*command, "--", *self.spec.paths)

    def environment(self) -> Mapping[str, str]:
        facts = {"PYKVM_LAB_FACTS": "1"} if self.facts_wanted else {}
        return facts | {
            "PYKVM_LAB_LEAVE_OUT": f"/lab/work/{LEAVE_OUT}",
            "PYKVM_LAB_TEST_TIMEOUT": f"{self.spec.test_timeout:g}",
        }

    # --- what comes out of it

    def take_output(self, data: bytes) -> None:
        self.output += data
        del self.output[:-_KEPT_OUTPUT]

    def take(self, line: bytes) -> None:
        """One record.  A guest may be dying while it writes, so garbage is no reason to stop."""
        try:
            record = json.loads(line)
            event = record["event"]
            handle = {
                "facts": self.take_facts,
                "session": self.take_session,
                "start": self.take_start,
                "result": self.take_result,
                "broken": self.take_broken,
                "collected": lambda record: None,  # a sign of life
                "end": self.take_end,
            }[event]
            handle(record)
        except (ValueError, KeyError, TypeError) as error:
            self.watcher.note(f"A record from the lab is garbled ({error!r}): {line[:200]!r}")

    def take_facts(self, record: Mapping[str, object]) -> None:
        facts = record["facts"]
        self.running = ""
        if isinstance(facts, dict):
            self.facts_wanted = False
            self.result = replace(self.result, facts=facts)

    def take_session(self, record: Mapping[str, object]) -> None:
        collected = record["collected"]
        if not isinstance(collected, int):
            raise GarbledResult(f"collected is {collected!r}")
        self.seen += 1
        self.result = replace(
            self.result, running=str(record["kernel"]), collected=collected + len(self.cases)
        )

    def take_start(self, record: Mapping[str, object]) -> None:
        self.running = str(record["nodeid"])
        self.running_since = self.clock()

    def take_result(self, record: Mapping[str, object]) -> None:
        case = case_from_json({name: value for name, value in record.items() if name != "event"})
        if case.nodeid == self.running:
            self.running = ""
        self.seen += 1
        self.add(case)

    def take_broken(self, record: Mapping[str, object]) -> None:
        lines = [line for line in str(record["text"]).splitlines() if line.strip()]
        self.broken = (
            self.broken or f"{record['nodeid']}: {lines[-1].strip() if lines else 'no reason given'}"
        )

    def take_end(self, record: Mapping[str, object]) -> None:
        self.ended = int(str(record["status"]))
