"""Paging cases on two machines, and in words how they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import NamedTuple

from pykvm.crosscheck.paging_cases import Features, PagingCase, first_legacy
from pykvm.crosscheck.paging_guest import CASES_PER_MACHINE, PagingOutcome, PagingRoom
from pykvm.crosscheck.paging_known import known
from pykvm.errors import UsageError
from pykvm.machine import System
from pykvm.x86.bits import PageFault, Pte
from pykvm.x86.cpuid import CpuidEntry

Explain = Callable[[PagingCase, Sequence[CpuidEntry]], str]
"""The architecture's answer to a case, in words."""


class PagingDifference(NamedTuple):
    """A case in which two machines differ: one sentence per observation.

    ``known`` says why both are right, and is empty otherwise.  ``walk`` is the explanation of what should
    happen, empty where nobody gave one.
    """

    case: PagingCase
    words: tuple[str, ...]
    known: str
    walk: str

    def __str__(self) -> str:
        lines = (self.case.describe(), *self.words, self.known, self.walk)
        return "\n".join(line for line in lines if line)


class PagingResult(NamedTuple):
    """How many cases ran, where the machines differ, and which dimensions the hosts leave out."""

    cases: int
    differences: tuple[PagingDifference, ...]
    left_out: tuple[str, ...]

    @property
    def disagreements(self) -> tuple[PagingDifference, ...]:
        """The differences that are not known to be legitimate."""
        return tuple(each for each in self.differences if not each.known)


class Subject(NamedTuple):
    """What both systems can run."""

    cpuid: Sequence[CpuidEntry]
    features: Features

    @classmethod
    def of(cls, *systems: System) -> Subject:
        """The guests get the CPUID of the first real KVM, or else of the first system."""
        offers = []
        legacy = True
        for system in sorted(systems, key=lambda each: each.backend != "kvm"):
            with system.create_machine() as machine:
                offers.append(machine.supported_cpuid)
            legacy = legacy and _can_page_outside_long_mode(system, offers[0])
        features = Features.of(offers[0])
        for other in offers[1:]:
            features = features.common(Features.of(other))
        return cls(offers[0], features._replace(legacy=legacy))


def _can_page_outside_long_mode(system: System, cpuid: Sequence[CpuidEntry]) -> bool:
    """Tried, since no CPUID bit says it: one access that has to succeed."""
    with PagingRoom(system, cpuid, cases=1) as room:
        return room.run(PagingCase.from_index(first_legacy())).end == "done"


def outcomes(
    system: System, cpuid: Sequence[CpuidEntry], cases: Iterable[PagingCase]
) -> Iterator[PagingOutcome]:
    """Run the cases one after another, on as many machines as it takes."""
    remaining = iter(cases)
    with ExitStack() as stack:
        room: PagingRoom | None = None
        for case in remaining:
            if room is None or not room.usable:
                stack.close()
                room = stack.enter_context(PagingRoom(system, cpuid))
            yield room.run(case)


def run_case(system: System, index: int) -> PagingOutcome:
    """One case on a machine of its own.  Raises UsageError where the system lacks what it needs."""
    subject = Subject.of(system)
    case = _runnable(index, subject.features)
    with PagingRoom(system, subject.cpuid, cases=1) as room:
        return room.run(case)


def run_paging(
    system_a: System,
    system_b: System,
    indices: Iterable[int],
    *,
    progress: Callable[[int], object] | None = None,
    explain: Explain | None = None,
) -> PagingResult:
    """Run the cases on both and compare.

    ``progress`` is told the number of cases so far.  Raises UsageError for a case that one of them lacks the
    features for.
    """
    subject = Subject.of(system_a, system_b)
    remaining = (_runnable(index, subject.features) for index in indices)
    count = 0
    differences = []
    while batch := list(islice(remaining, CASES_PER_MACHINE)):
        pairs = zip(
            batch,
            outcomes(system_a, subject.cpuid, batch),
            outcomes(system_b, subject.cpuid, batch),
            strict=True,
        )
        for case, a, b in pairs:
            words = compare(case, (system_a.backend, a), (system_b.backend, b))
            if words:
                walk = explain(case, subject.cpuid) if explain else ""
                expected, other = (b, a) if system_b.backend == "model" else (a, b)
                differences.append(PagingDifference(case, words, known(case, expected, other), walk))
        count += len(batch)
        if progress:
            progress(count)
    return PagingResult(count, tuple(differences), subject.features.left_out)


def replay(systems: Sequence[System], index: int, explain: Explain | None = None) -> str:
    """One case in words: what it is, what each system's machine does, and what should happen.

    Raises UsageError where a system lacks what it needs.
    """
    subject = Subject.of(*systems)
    case = _runnable(index, subject.features)
    lines = [case.describe()]
    for system in systems:
        with PagingRoom(system, subject.cpuid, cases=1) as room:
            lines.append(f"{system.backend}: {', '.join(_observations(case, room.run(case)))}")
    if explain:
        lines.append(explain(case, subject.cpuid))
    return "\n".join(lines)


def _runnable(index: int, features: Features) -> PagingCase:
    case = PagingCase.from_index(index)
    if missing := case.missing(features):
        raise UsageError(
            f"Paging case {index} needs {missing}, which a machine here lacks; choose another case."
        )
    return case


def compare(case: PagingCase, a: tuple[str, PagingOutcome], b: tuple[str, PagingOutcome]) -> tuple[str, ...]:
    """A sentence for each observation in which two outcomes, each with its machine's name, differ."""
    (name_a, first), (name_b, second) = a, b
    return tuple(
        f"{name_a}: {one}; {name_b}: {two}"
        for one, two in zip(_observations(case, first), _observations(case, second), strict=True)
        if one != two
    )


def _observations(case: PagingCase, outcome: PagingOutcome) -> Iterator[str]:
    yield _ending(outcome)
    yield f"the target holds {outcome.target:#x}"
    yield f"the register holds {outcome.register:#x}"
    names = ("PTE", "PDE", "PDPTE", "PML4E", "PML5E")[case.shape.levels - 1 :: -1]
    for name, changed in zip(names, outcome.flags, strict=False):
        yield f"{_bits(changed)} of the {name} changed"


def _ending(outcome: PagingOutcome) -> str:
    if outcome.end != "#PF" or outcome.error is None or outcome.cr2 is None:
        error = "" if outcome.error is None else f" with error code {outcome.error:#x}"
        return f"{outcome.end}{error}{outcome.at and f' at the {outcome.at}'}"
    names = " ".join(str(bit.name) for bit in PageFault if outcome.error & bit)
    return f"#PF at the {outcome.at} with error code {outcome.error:#x} ({names}), CR2 {outcome.cr2:#x}"


def _bits(changed: int) -> str:
    names = [str(bit.name) for bit in (Pte.A, Pte.D) if changed & bit]
    rest = changed & ~int(Pte.A | Pte.D)
    return ", ".join(names + ([hex(rest)] if rest else [])) or "nothing"
