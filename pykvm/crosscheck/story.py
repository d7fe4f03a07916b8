"""A scenario told step by step: what happened, by which rule, and how far the counters moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Protocol

from pykvm.crosscheck.counters import DETERMINISTIC
from pykvm.crosscheck.loss import lost_pages
from pykvm.crosscheck.run import EVERYTHING, TIME_LIMIT, run
from pykvm.crosscheck.scenario import Scenario
from pykvm.crosscheck.steps import Step, describe
from pykvm.crosscheck.trace import Trace
from pykvm.machine import Machine, System
from pykvm.x86.cpuid import CpuidEntry

_MANY: Final = 8
"""So many equal ring entries in a row are counted instead of shown."""


class Event(Protocol):
    """What a machine's journal holds: something that happened, in words, and the rule that caused it."""

    @property
    def what(self) -> str: ...
    @property
    def rule(self) -> str: ...


class Listener(Protocol):
    """Hears what a machine does: asked before the first step (``step`` None) and after each."""

    def before(self, machine: Machine, step: Step) -> Sequence[str]:
        """Lines about what the step will meet."""

    def after(self, machine: Machine) -> Sequence[Event]:
        """What the machine did since the last call."""


@dataclass(frozen=True, slots=True)
class StepStory:
    """One step.  ``walks`` tell what the guest's tables say, ``events`` what the model did; ``shown`` is by
    backend what came of it; ``moved`` by counter and backend how far it moved."""

    number: int
    action: str
    walks: tuple[str, ...]
    events: tuple[tuple[str, str], ...]
    shown: Mapping[str, tuple[str, ...]]
    moved: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step": self.number,
            "action": self.action,
            "walks": list(self.walks),
            "events": [{"what": what, "rule": rule} for what, rule in self.events],
            "shown": {backend: list(lines) for backend, lines in self.shown.items()},
            "counters": {name: dict(values) for name, values in self.moved.items()},
        }


@dataclass(frozen=True, slots=True)
class Story:
    """All steps, and the traces that they were told from, by backend."""

    steps: tuple[StepStory, ...]
    traces: tuple[Trace, ...]


def tell(
    scenario: Scenario,
    systems: Sequence[System],
    listener: Listener,
    *,
    cpuid: Sequence[CpuidEntry] | None = None,
    seconds: float = TIME_LIMIT,
) -> Story:
    """Run ``scenario`` on all systems; ``listener`` hears the first one.  Raises as ``run`` does."""
    walks: list[tuple[str, ...]] = []
    events: list[tuple[tuple[str, str], ...]] = []

    def inspect(machine: Machine, step: int) -> None:
        heard = tuple((event.what, event.rule) for event in listener.after(machine))
        if step >= 0:
            events.append(heard)
        if step + 1 < len(scenario.steps):
            walks.append(tuple(listener.before(machine, scenario.steps[step + 1])))

    traces = [run(scenario, systems[0], cpuid=cpuid, seconds=seconds, watch=EVERYTHING, inspect=inspect)]
    traces += [
        run(scenario, system, cpuid=cpuid, seconds=seconds, watch=EVERYTHING) for system in systems[1:]
    ]
    steps = [
        StepStory(
            number,
            describe(scenario.steps[number]),
            walks[number] if number < len(walks) else (),
            events[number] if number < len(events) else (),
            {trace.backend: _shown(trace, number) for trace in traces if number < len(trace.steps)},
            _moved(traces, number),
        )
        for number in range(max(len(trace.steps) for trace in traces))
    ]
    return Story(tuple(steps), tuple(traces))


def _shown(trace: Trace, number: int) -> tuple[str, ...]:
    """What can be seen of a step from outside."""
    step = trace.steps[number]
    lines = [f"exit {reason}" for reason in step.exits]
    lines += [text for text in (step.message, step.impossible, "out of time" if step.overdue else "") if text]
    if step.pushed:
        lines.append("ring: " + _entries(step.pushed))
    if step.ring:
        lines.append("harvested: " + _entries(step.ring))
    if step.dirty is not None:
        lines.append("dirty: " + (" ".join(f"{slot}:{gfn:#x}" for slot, gfn in step.dirty) or "nothing"))
    if step.changed:
        lines.append("changed: " + " ".join(f"{memory}:{page:#x}" for memory, page in sorted(step.changed)))
    if lost := lost_pages(trace).get(step.number):
        lines.append("written and in no log: " + " ".join(f"{slot}:{gfn:#x}" for slot, gfn in lost))
    if step.translated is not None:
        lines.append(f"translated to {step.translated:#x}")
    return tuple(lines)


def _entries(entries: Sequence[tuple[int, int, int]]) -> str:
    several = len({vcpu for vcpu, _, _ in entries}) > 1
    words = []
    for (vcpu, slot, offset), same in groupby(entries):
        times = len(list(same))
        text = f"{f'vCPU{vcpu} ' if several else ''}{slot}:{offset:#x}"
        words += [text] * times if times < _MANY else [f"{text} ({times} times)"]
    return " ".join(words)


def _moved(traces: Sequence[Trace], number: int) -> dict[str, dict[str, int]]:
    """The counters that moved on some machine, with how far on each."""
    found: dict[str, dict[str, int]] = {}
    for trace in traces:
        if number >= len(trace.steps):
            continue
        before = trace.steps[number - 1].counters if number else trace.counters
        for name, value in trace.steps[number].counters.items():
            found.setdefault(name, {})[trace.backend] = value - before.get(name, 0)
    order = {name: place for place, name in enumerate(DETERMINISTIC)}
    return {
        name: values
        for name, values in sorted(found.items(), key=lambda item: order[item[0].partition(".")[2]])
        if any(values.values())
    }
