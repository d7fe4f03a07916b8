"""Page walks and page faults in each mode and under each protection that only some hosts can run.

The cases are those of the page-table product (pykvm.crosscheck.paging_cases): what the access does, its error
code, CR2, and the A and D flags are the reference walk's, or differ as the architecture allows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest

from pykvm.crosscheck.paging_cases import PagingCase, Runnable
from pykvm.crosscheck.paging_run import Subject
from pykvm.kvm import KvmSystem
from tests.crosscheck.walked import check

SEED = 4
CASES = 120
Chosen = Callable[[PagingCase], bool]


def _shape(levels: int, shift: int) -> Chosen:
    return lambda case: case.shape[:2] == (levels, shift)


SHAPES: dict[str, Chosen] = {
    "32-bit paging, 4 KiB pages": _shape(2, 12),
    "32-bit paging, 4 MiB pages": _shape(2, 22),
    "PAE paging, 4 KiB pages": _shape(3, 12),
    "PAE paging, 2 MiB pages": _shape(3, 21),
    "4 levels, 4 KiB pages": _shape(4, 12),
    "4 levels, 2 MiB pages": _shape(4, 21),
    "4 levels, 1 GiB pages": _shape(4, 30),
    "5 levels, 4 KiB pages": _shape(5, 12),
    "5 levels, 2 MiB pages": _shape(5, 21),
    "5 levels, 1 GiB pages": _shape(5, 30),
}
PROTECTIONS: dict[str, Chosen] = {
    "CR4.SMEP": lambda case: case.control.smep,
    "CR4.SMAP": lambda case: case.control.smap,
    "CR4.PKE": lambda case: case.control.pke,
    "EFER.NXE": lambda case: case.control.nxe,
    "CR0.WP = 0": lambda case: not case.control.wp,
}


def some(system: KvmSystem, chosen: Chosen, what: str) -> list[int]:
    """Indices of cases that this host can run, or a skip that says which it cannot."""
    features = Subject.of(system).features
    runnable = Runnable(features)
    found = (index for index in islice(runnable.shuffled(SEED), 40_000))
    cases = list(islice((index for index in found if chosen(PagingCase.from_index(index))), CASES))
    if not cases or ("1 GiB" in what and not features.pages_1g):
        pytest.skip(f"this KVM cannot run cases of {what}; what it lacks: {', '.join(features.left_out)}")
    return cases


@pytest.mark.parametrize("shape", SHAPES)
def test_accesses_in_each_mode_are_those_of_the_walk(system: KvmSystem, shape: str) -> None:
    seen = check(system, some(system, SHAPES[shape], shape))
    assert {end for _, _, end in seen} == {"done", "#PF"}


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_accesses_under_each_protection_are_those_of_the_walk(system: KvmSystem, protection: str) -> None:
    seen = check(system, some(system, PROTECTIONS[protection], protection))
    assert {end for _, _, end in seen} == {"done", "#PF"}
