"""Scenarios that once showed a difference between a real KVM and the model, with what the real KVM showed.

``python -m tests.crosscheck.recorded NAME SCENARIO WHY`` records one on the KVM of this host.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykvm.cli.mmu import host_profile
from pykvm.crosscheck.run import COUNTERS, run
from pykvm.crosscheck.scenario import Scenario
from pykvm.crosscheck.trace import Trace
from pykvm.kvm import KvmSystem

FOLDER = Path(__file__).parent / "found"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@dataclass(frozen=True)
class Found:
    """``host`` is the kind and era of the KVM that was recorded, ``why`` what the difference taught."""

    scenario: Scenario
    host: tuple[str, str]
    why: str
    steps: list[dict[str, Any]]


def load(name: str) -> Found:
    data = json.loads((FOLDER / f"{name}.json").read_text())
    return Found(Scenario.from_json(data["scenario"]), tuple(data["host"]), data["why"], data["steps"])


def shown(trace: Trace) -> list[dict[str, Any]]:
    """What counts of a trace, as JSON values: exits, pushes, reported pages and how far counters moved."""
    found = []
    before = trace.counters
    for step in trace.steps:
        moved = {name: value - before[name] for name, value in step.counters.items() if value != before[name]}
        found.append(
            {
                "exits": [type(reason).__name__ for reason in step.exits],
                "refused": step.refused,
                "ring": [list(entry) for entry in step.pushed],
                "dirty": None if step.dirty is None else [list(page) for page in step.dirty],
                "counters": dict(sorted(moved.items())),
                "rsp": [view.registers.rsp for view in step.vcpus],
                "cr2": [view.special.cr2 for view in step.vcpus],
            }
        )
        before = step.counters
    return found


def record(name: str, scenario: Scenario, why: str) -> None:
    """Run on this host's KVM and write the file."""
    with KvmSystem() as system:
        profile = host_profile(system)
        steps = shown(run(scenario, system, watch=COUNTERS))
    document = {
        "why": why,
        "host": [profile.name, profile.era],
        "steps": steps,
        "scenario": scenario.to_json(),
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    record(sys.argv[1], Scenario.from_json(json.loads(Path(sys.argv[2]).read_text())), sys.argv[3])
