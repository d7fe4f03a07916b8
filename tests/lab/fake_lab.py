"""A lab that boots nothing: it plays scripts of records, deaths and exit statuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pykvm.lab.kernels import PreparedKernel
from pykvm.lab.kinds import kind
from pykvm.lab.results import Case
from pykvm.lab.session import RunResult, RunSpec, Sinks
from pykvm.lab.suite import SuiteSpec

KERNEL = PreparedKernel("6.1", "6.1.0-43-cloud-amd64", Path("/k/vmlinuz"), Path("/k/modules"), False)


def suite_spec(**changes: Any) -> SuiteSpec:
    """A suite for one kernel and kind."""
    return SuiteSpec(**{"kernel": KERNEL, "kind": kind("amd-npt"), "root": Path("/checkout"), **changes})


def record(event: str, **members: Any) -> bytes:
    """A line as the plugin in the guest writes it."""
    return json.dumps({"event": event, **members}).encode()


def session(collected: int) -> bytes:
    return record("session", kernel="6.1.0-43-cloud-amd64", collected=collected)


def start(nodeid: str) -> bytes:
    return record("start", nodeid=nodeid)


def result(nodeid: str, outcome: str = "passed", **members: Any) -> bytes:
    known = {"seconds": 0.5, "reason": "", "text": "", "kvm": True, "bug": ""}
    return record("result", nodeid=nodeid, outcome=outcome, **known | members)


def ran(nodeid: str, outcome: str = "passed", **members: Any) -> list[bytes]:
    """A test from its start to its end."""
    return [start(nodeid), result(nodeid, outcome, **members)]


def end(status: int = 0) -> bytes:
    return record("end", status=status)


@dataclass
class Watch:
    """What a watcher was told."""

    notes: list[str] = field(default_factory=list)
    cases: list[tuple[Case, int, int]] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def case(self, case: Case, done: int, collected: int) -> None:
        self.cases.append((case, done, collected))


Step = bytes | BaseException | Callable[[], None]


class FakeLab:
    """Plays one script for each boot: records to send, things to do, and an exception or a status to end
    with.
    """

    def __init__(self, *boots: list[Any], boot_seconds: float = 9.5) -> None:
        self.boots = list(boots)
        self.boot_seconds = boot_seconds
        self.specs: list[RunSpec] = []
        self.left_out: list[list[str]] = []

    def __call__(self, spec: RunSpec, sinks: Sinks) -> RunResult:
        self.specs.append(spec)
        self.left_out.append(spec.put[0].read_text().splitlines())
        status = 0
        for step in self.boots.pop(0):
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, bytes):
                sinks.record(step)
            elif isinstance(step, str):
                sinks.stdout(step.encode())
            elif isinstance(step, int):
                status = step
            else:
                step()
        return RunResult(status, "QEMU 10.0, TCG", "qemu-tcg", KERNEL.release, self.boot_seconds, 60.0)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> Callable[[], None]:
        def step() -> None:
            self.now += seconds

        return step
