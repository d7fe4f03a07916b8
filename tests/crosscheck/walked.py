"""Real KVM against the reference machine's page walk, case by case of the page-table product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from pykvm.cli.walks import explain, walks
from pykvm.crosscheck.paging_cases import Features, Kind, PagingCase
from pykvm.crosscheck.paging_guest import FRAMES, TABLES, PagingOutcome
from pykvm.crosscheck.paging_known import known
from pykvm.crosscheck.paging_run import PagingDifference, Subject, compare, outcomes
from pykvm.machine import System
from pykvm.x86.cpuid import CpuidEntry

_LOW: Final = 0xFFFFFFFF
"""The half of the target that instructions access."""


def expected(case: PagingCase, cpuid: Sequence[CpuidEntry]) -> PagingOutcome:
    """What the case's instruction does to the guest, given the walks it makes."""
    bits = Features.of(cpuid).physical_bits
    entries = case.entries(TABLES, FRAMES[case.shape.page_shift], bits)
    flags = dict.fromkeys((at for at, _ in entries), 0)
    made = walks(case, cpuid)
    for each in made:
        for update in each.updates:
            flags[update.gpa] |= update.old ^ update.new
    segment = case.kind in {Kind.LOAD_SEGMENT, Kind.MARK_SEGMENT}
    register = 7 if segment else 0x11223344
    target = 0x00CFF2000000FFFF if segment else 0x04030201FEEB10E6
    accessed = 1 << 40
    if case.kind is Kind.LOAD_SEGMENT:
        target |= accessed
    error = made[-1].error
    if error is not None:
        at = "target" if case.kind is Kind.FETCH else "access"
        return PagingOutcome("#PF", error, case.linear, at, tuple(flags.values()), target, register)
    if case.kind is Kind.EXCHANGE:
        target, register = target & ~_LOW | register, target & _LOW
    elif case.kind is Kind.READ:
        register = target & _LOW
    elif case.kind is Kind.WRITE:
        target = target & ~_LOW | register
    elif case.kind is Kind.MARK_SEGMENT:
        target |= accessed
    return PagingOutcome("done", None, None, "", tuple(flags.values()), target, register)


def check(system: System, indices: Iterable[int]) -> Counter[tuple[Kind, int, str]]:
    """Run the cases on KVM and hold each against the walk; how often each kind should end how."""
    cpuid = Subject.of(system).cpuid
    cases = [PagingCase.from_index(index) for index in indices]
    seen: Counter[tuple[Kind, int, str]] = Counter()
    for case, seen_outcome in zip(cases, outcomes(system, cpuid, cases), strict=True):
        wanted = expected(case, cpuid)
        words = compare(case, ("walk", wanted), ("kvm", seen_outcome))
        reason = known(case, wanted, seen_outcome)
        assert not words or reason, str(PagingDifference(case, words, reason, explain(case, cpuid)))
        seen[case.kind, case.cpl, wanted.end] += 1
    return seen
