"""Guests in every paging mode under every tracker: what KVM reports is what the reference walk writes.

What the contract leaves open is only this: with two-dimensional paging, and in guests without paging, a page
that is read or fetched may be reported, as may a table that is walked (docs/reference/kvm-mmu.md, 5 and 5.1).
"""

from __future__ import annotations

import random

import pytest

from pykvm.cli.host import read_host
from pykvm.machine import IoOut, System
from pykvm.model.paging import Access
from pykvm.track import TRACKERS, Tracker, make_tracker
from pykvm.x86.bits import PAGE_SHIFT
from pykvm.x86.exceptions import Vector
from tests.backends import on_kvm
from tests.paged import (
    DATA,
    DONE,
    HANDLER_PORT,
    LAYOUTS,
    PAGED,
    READ_ONLY,
    Layout,
    PagedGuest,
    Prediction,
    Touch,
    why_not,
)
from tests.rings import LEAST_RING

ROUNDS = 4
WRITABLE = range(READ_ONLY)


@pytest.fixture(params=TRACKERS)
def tracker(request: pytest.FixtureRequest) -> Tracker:
    return make_tracker(request.param, ring_entries=LEAST_RING)


def paged_guest(system: System, layout: Layout, tracker: Tracker) -> PagedGuest:
    """The guest, or a skip that says what the host lacks."""
    reason = why_not(system, layout)
    if reason is not None:
        pytest.skip(reason)
    return PagedGuest(system, layout, tracker)


def some_touches(choose: random.Random) -> list[Touch]:
    """Up to 30 accesses, pages coming more than once."""
    pages = choose.sample(WRITABLE, 15)
    return [
        Touch(choose.choice(("store", "load")), choose.choice(pages)) for _ in range(choose.randrange(1, 30))
    ]


def check(guest: PagedGuest, expected: Prediction, reported: set[int]) -> None:
    """Nothing lost, nothing beyond what may be reported, and every A and D flag as it should be."""
    may = set(expected.read_of_dirty)
    if guest.reads_are_marked:
        may |= expected.read | expected.tables
    assert expected.written - reported == set()
    assert reported - expected.written - may == set()
    for (gpa, size), value in expected.entries.items():
        assert int.from_bytes(guest.memory.read(gpa, size), "little") == value


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_reported_is_what_the_walk_writes(system: System, layout: Layout, tracker: Tracker) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    with paged_guest(system, layout, tracker) as guest:
        tracker.arm(guest.machine)
        for _ in range(ROUNDS):
            touches = some_touches(choose)
            expected = guest.predict(touches)
            ended = guest.run(touches)
            assert isinstance(ended, IoOut), ended
            assert ended.port == DONE, f"vector {ended.port - HANDLER_PORT}"
            check(guest, expected, guest.reported())
        assert guest.reported() == set()
        tracker.disarm()


@pytest.mark.parametrize("layout", [each for each in PAGED if each.page_size == 4096], ids=str)
def test_a_store_that_faults_is_not_reported(system: System, layout: Layout, tracker: Tracker) -> None:
    """The page stays out of the log, and error code and CR2 are those of the reference walk."""
    with paged_guest(system, layout, tracker) as guest:
        user = Access.USER if layout.cpl else Access(0)
        wanted = guest.walk(layout.linear(READ_ONLY), Access.WRITE | user)
        tracker.arm(guest.machine)
        ended = guest.run([Touch("store", 3), Touch("store", READ_ONLY), Touch("store", 4)])
        assert isinstance(ended, IoOut)
        assert ended.port == HANDLER_PORT + Vector.PF
        word = 4 if layout.name in {"paged32", "pae"} else 8
        stack = guest.vcpu.get_registers().rsp
        assert int.from_bytes(guest.memory.read(stack, word), "little") == wanted.error
        assert guest.vcpu.get_special_registers().cr2 == wanted.linear
        data = {gfn - (DATA >> PAGE_SHIFT) for gfn in guest.reported()}
        assert data & set(range(READ_ONLY + 1)) == {3}
        tracker.disarm()


@on_kvm
@pytest.mark.parametrize("layout", PAGED, ids=str)
def test_walks_under_nested_paging_count_as_writes(system: System, layout: Layout) -> None:
    """kvm-mmu.md 13.4: under NPT every table that a walk reads is reported, changed or not, each time anew.

    PAE's root is left out: processors may keep its four entries.
    """
    if read_host().two_dimensional_paging != "NPT":
        pytest.skip("this host has no nested paging")
    tracker = make_tracker("bitmap")
    touches = [Touch("store", 1), Touch("load", 2)]
    with paged_guest(system, layout, tracker) as guest:
        tracker.arm(guest.machine)
        for _ in range(3):
            expected = guest.predict(touches)
            guest.run(touches)
            tables = expected.tables
            if layout.name == "pae":
                tables = tables - {guest.paging.tables[0]} if guest.paging else tables
            assert tables - guest.reported() == set()
        tracker.disarm()


@on_kvm
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_with_two_dimensional_paging_fetched_code_is_reported_once(system: System, layout: Layout) -> None:
    """kvm-mmu.md 5.1: the fault of the first fetch maps the page writable, which marks it, no later one."""
    if read_host().two_dimensional_paging not in {"NPT", "EPT"}:
        pytest.skip("this host has no two-dimensional paging")
    tracker = make_tracker("bitmap")
    with paged_guest(system, layout, tracker) as guest:
        (code,) = guest.predict([]).read
        tracker.arm(guest.machine)
        guest.run([])
        assert code in guest.reported()
        for _ in range(2):
            guest.run([])
            assert code not in guest.reported()
        tracker.disarm()
