"""What a run of tests in a lab found: plain values, to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

OUTCOMES = ("passed", "failed", "xfailed", "xpassed", "skipped", "died")
"""``died``: the lab, or the process that runs the tests, ended while the test ran."""

BAD = ("failed", "died")
"""Outcomes that make a run fail."""

STATES = ("finished", "timeout", "died", "broken")
"""Whether every chosen test has an outcome, and if not: the time was over, the lab died too often, or pytest
could not collect or run."""

FORMAT = 1


class GarbledResult(ValueError):
    """A saved result is not what ``SuiteResult.to_json`` writes."""


@dataclass(frozen=True)
class Case:
    """One test.  ``reason`` is the first line of its failure, skip or expected failure, ``text`` the whole of
    a failure.

    ``kvm``: judged by a real KVM.  ``bug`` names the emulator's bug that an expected failure is put down to.
    """

    nodeid: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    text: str = ""
    kvm: bool = False
    bug: str = ""

    @property
    def bad(self) -> bool:
        """Whether it makes the run fail."""
        return self.outcome in BAD


@dataclass(frozen=True)
class SuiteResult:
    """The tests of one kernel and kind.

    ``series`` and ``release`` name the kernel (``6.1``, ``6.1.0-43-cloud-amd64``), ``running`` is what it
    calls itself. ``collected`` counts the chosen tests (0 if that was never known), ``boots`` the labs that
    were started; ``boot_seconds`` is the time of the last boot to its command, ``seconds`` that of
    everything.  ``problem`` is a sentence unless ``state`` is ``finished``.  ``facts`` is what ``pykvm info
    --json`` printed in the same boot.
    """

    series: str
    release: str
    kind: str
    emulator: str = ""
    slug: str = ""
    running: str = ""
    state: str = "finished"
    problem: str = ""
    collected: int = 0
    boots: int = 0
    boot_seconds: float = 0.0
    seconds: float = 0.0
    cases: tuple[Case, ...] = ()
    facts: Mapping[str, Any] | None = None

    def count(self, outcome: str) -> int:
        """How many tests ended so."""
        return sum(case.outcome == outcome for case in self.cases)

    @property
    def left(self) -> int:
        """Chosen tests that have no outcome."""
        return max(0, self.collected - len(self.cases))

    @property
    def bad(self) -> tuple[Case, ...]:
        """The tests that make the run fail."""
        return tuple(case for case in self.cases if case.bad)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the counts that readers want."""
        members = {item.name: getattr(self, item.name) for item in fields(self)}
        members["cases"] = [asdict(case) for case in self.cases]
        members["counts"] = {outcome: self.count(outcome) for outcome in OUTCOMES}
        return {"format": FORMAT, **members}

    @classmethod
    def from_json(cls, document: object) -> SuiteResult:
        """What ``to_json`` made; GarbledResult for anything else."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise GarbledResult("not a result of this version")
        members = {item.name: _checked(document, item.name) for item in fields(cls) if item.name != "cases"}
        if members["state"] not in STATES:
            raise GarbledResult(f"no such state: {members['state']!r}")
        cases = document.get("cases")
        if not isinstance(cases, list):
            raise GarbledResult("no list of tests")
        return cls(**members, cases=tuple(case_from_json(case) for case in cases))


_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("collected", "boots"), (int,)),
    **dict.fromkeys(("boot_seconds", "seconds"), (int, float)),
    "facts": (dict, type(None)),
    "kvm": (bool,),
}


def _checked(document: Mapping[str, Any], name: str) -> Any:
    value = document.get(name)
    if not isinstance(value, _TYPES.get(name, (str,))):
        raise GarbledResult(f"{name} is {value!r}")
    return value


def case_from_json(document: object) -> Case:
    """One test; GarbledResult for what is none.  A guest's own records are read by this, too."""
    if not isinstance(document, dict):
        raise GarbledResult("a test is an object")
    case = Case(**{item.name: _checked(document, item.name) for item in fields(Case)})
    if case.outcome not in OUTCOMES:
        raise GarbledResult(f"no such outcome: {case.outcome!r}")
    return case
