"""What a worked example is, and whether a trace shows what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from pykvm.crosscheck.loss import lost_pages
from pykvm.crosscheck.scenario import Scenario
from pykvm.crosscheck.trace import StepTrace, Trace
from pykvm.machine import IoOut


class HostKind(Enum):
    """Which hosts an example's values are for."""

    EMULATES_KERNEL = "shadow paging, CPL 0 emulated"
    NATIVE_SHADOW = "shadow paging, CPL 0 native"
    NESTED = "nested paging in which every walk counts as a write of the tables, without PML"
    PML = "nested paging with PML"


@dataclass(frozen=True, slots=True)
class Expected:
    """What step number ``step`` shows.  None: not said.

    ``counters``: how far they move, of the first vCPU unless named with its source.  ``ring``: the entries
    pushed, by gfn.  ``harvested``: how many were taken out.  ``dirty``: what is collected, by gfn;
    ``unreported``: some of what is not.  ``exits``: their types.  ``refused``: the error, empty for none.
    ``outs``: port and value of each OUT.  ``changed`` and ``unchanged``: pages of memory 0 whose contents did
    and did not change.  ``lost``: written pages that no log names, by gfn.
    """

    step: int
    counters: Mapping[str, int] | None = None
    ring: tuple[int, ...] | None = None
    harvested: int | None = None
    dirty: tuple[int, ...] | None = None
    exits: tuple[str, ...] | None = None
    refused: str | None = None
    unreported: tuple[int, ...] = ()
    outs: tuple[tuple[int, int], ...] | None = None
    changed: tuple[int, ...] = ()
    unchanged: tuple[int, ...] = ()
    lost: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example: ``source`` is its row; the values are those of hosts of the kind ``host``."""

    name: str
    title: str
    source: str
    scenario: Scenario
    expected: tuple[Expected, ...]
    host: HostKind = HostKind.EMULATES_KERNEL


def mismatches(example: Example, trace: Trace) -> list[str]:
    """What the trace shows differently, in words."""
    found = []
    for expected in example.expected:
        if expected.step >= len(trace.steps):
            found.append(f"step {expected.step} was not reached")
            continue
        step = trace.steps[expected.step]
        before = trace.steps[expected.step - 1].counters if expected.step else trace.counters
        for name, moved in (expected.counters or {}).items():
            key = next(key for key in step.counters if name in {key, key.partition(".")[2]})
            if step.counters[key] - before[key] != moved:
                seen = step.counters[key] - before[key]
                found.append(f"step {expected.step}: {name} moved by {seen}, not by {moved}")
        seen_values: list[tuple[str, object, object]] = [
            ("ring", expected.ring, tuple(offset for _, _, offset in step.pushed)),
            ("entries taken", expected.harvested, len(step.ring)),
            ("exits", expected.exits, tuple(type(reason).__name__ for reason in step.exits)),
            ("refused", expected.refused, step.refused),
        ]
        if step.dirty is not None:
            reported = tuple(gfn for _, gfn in step.dirty)
            seen_values.append(("dirty", expected.dirty, reported))
            surplus = tuple(gfn for gfn in expected.unreported if gfn in reported)
            seen_values.append(("reported too much", (), surplus))
        if expected.outs is not None:
            seen_values.append(("OUTs", _flat(expected.outs), _flat(_outs(step))))
        if expected.lost is not None:
            lost = tuple(gfn for _, gfn in lost_pages(trace).get(expected.step, ()))
            seen_values.append(("lost", expected.lost, lost))
        for gfns, words in ((expected.changed, "stayed as it was"), (expected.unchanged, "changed")):
            wrong = [gfn for gfn in gfns if ((0, gfn) in step.changed) is (words == "changed")]
            found += [f"step {expected.step}: the page of gfn {gfn:x} {words}" for gfn in wrong]
        for what, wanted, seen_value in seen_values:
            if wanted is not None and wanted != seen_value:
                found.append(f"step {expected.step}: {what} {_words(seen_value)}, not {_words(wanted)}")
    return found


def _outs(step: StepTrace) -> tuple[tuple[int, int], ...]:
    outs = [reason for reason in step.exits if isinstance(reason, IoOut)]
    return tuple((out.port, int.from_bytes(out.data, "little")) for out in outs)


def _flat(pairs: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
    return tuple(f"{port:x}:{value:x}" for port, value in pairs)


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{each:x}" if isinstance(each, int) else str(each) for each in value) or "nothing"
    return str(value) or "nothing"
