"""The parts on their own: policy, rates, heat, slots and pages, the proof, the page transfer."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import MigrationError, UsageError
from pykvm.machine import DirtyPages, SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.migrate import Policy, pair
from pykvm.migrate.pages import PageReceiver, PageSender, SlotMap, allocated_pages, batches
from pykvm.migrate.policy import Decision, RateMeter
from pykvm.migrate.proof import Comparison, RootDigest, digest_range, digest_ranges
from pykvm.migrate.result import heat_of
from pykvm.migrate.wire import FRAME_PAGES
from tests.migrate.fakes import FakeSlot

MIB = 1 << 20

# --- policy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "dirty", "rate", "expected"),
    [
        (1, 300_000, 1e6, Decision.CONVERGED),
        (1, 300_001, 1e6, Decision.CONTINUE),
        (4, 300_001, 1e6, Decision.CONTINUE),
        (5, 300_001, 1e6, Decision.EXHAUSTED),
        (5, 0, 1e6, Decision.CONVERGED),
        (1, 0, 0.0, Decision.CONVERGED),
        (1, 1, 0.0, Decision.CONTINUE),
    ],
)
def test_the_guest_is_paused_when_the_rest_fits_the_downtime_limit(
    rounds: int, dirty: int, rate: float, expected: Decision
) -> None:
    assert Policy(downtime_limit=0.3, max_rounds=5).decide(rounds, dirty, rate) is expected


@pytest.mark.parametrize(
    ("bandwidth", "pages"),
    [(None, 128), (10**9, 128), (10 * MIB, 128), (5 * MIB, 64), (MIB, 12), (PAGE_SIZE, 1)],
)
def test_frames_are_small_where_the_bandwidth_is(bandwidth: int | None, pages: int) -> None:
    assert Policy(bandwidth=bandwidth).frame_pages == pages


@pytest.mark.parametrize("bandwidth", [PAGE_SIZE, 30_000, MIB, 10**9, None])
def test_no_frame_of_digests_outlasts_the_destinations_patience(bandwidth: int | None) -> None:
    """A sender waits after each frame until the bandwidth has paid for it; 24 bytes a digest."""
    most = Policy(bandwidth=bandwidth).digests_per_frame
    assert 1 <= most <= 16384
    assert bandwidth is None or most * 24 / bandwidth < 0.1
    with GuestMemory(64 * PAGE_SIZE) as memory:
        memory.view()[:] = 1
        ranges = list(digest_ranges(memory, most))
        assert max(len(part.records) for part in ranges) == min(most, 64)
        assert sum(len(part.records) for part in ranges) == 64
        assert [part.first for part in ranges] == [0] + [part.end for part in ranges[:-1]]


@pytest.mark.parametrize(
    "options",
    [
        {"bandwidth": 0},
        {"bandwidth": 4095},
        {"downtime_limit": -1},
        {"downtime_limit": float("nan")},
        {"max_rounds": 0},
    ],
)
def test_limits_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Policy(**options)  # type: ignore[arg-type]


def test_the_rate_is_that_of_the_last_round_that_was_large_enough() -> None:
    meter = RateMeter()
    meter.add(1000, 0.5)
    assert meter.rate == 2000
    meter.add(10 * MIB, 2)
    assert meter.rate == 5 * MIB
    meter.add(500, 1)
    assert meter.rate == 5 * MIB
    meter.add(2 * MIB, 4)
    assert meter.rate == MIB / 2


@given(
    total=st.integers(1, 100_000),
    fractions=st.lists(st.floats(0, 1, exclude_max=True), max_size=50),
)
def test_heat_counts_every_page_once_and_in_its_place(total: int, fractions: list[float]) -> None:
    pages = np.unique(np.array([int(f * total) for f in fractions], dtype=np.uint64))
    heat = heat_of(pages, total)
    assert 1 <= len(heat) <= min(256, total)
    assert sum(heat) == len(pages)
    width = -(-total // min(256, total))
    for page in pages.tolist():
        assert heat[page // width] > 0


# --- slots and pages -------------------------------------------------------------------------------


def slots_of(memory: GuestMemory) -> dict[int, FakeSlot]:
    """Slot 0 shows pages 0 to 7 at gfn 0; slot 3 pages 4 to 15 at gfn 0x100: pages 4 to 7 are in both."""
    return {
        0: FakeSlot(0, 0, 8 * PAGE_SIZE, memory, 0, SlotFlags.NONE),
        3: FakeSlot(3, 0x100 << 12, 12 * PAGE_SIZE, memory, 4 * PAGE_SIZE, SlotFlags.NONE),
    }


def test_gfns_of_several_slots_become_pages_of_the_memory_each_once() -> None:
    with GuestMemory(16 * PAGE_SIZE) as memory:
        slots = SlotMap(slots_of(memory), memory)  # type: ignore[arg-type]
        dirty = DirtyPages.of([(0, 0), (0, 5), (3, 0x101), (3, 0x10B)])
        assert slots.pages(dirty).tolist() == [0, 5, 15]
        assert slots.pages(DirtyPages()).tolist() == []
        assert slots.gfn(5) == 5
        assert slots.gfn(15) == 0x10B
        assert slots.gfn(16) is None


def test_memory_that_not_all_slots_share_is_refused() -> None:
    with GuestMemory(16 * PAGE_SIZE) as memory, GuestMemory(16 * PAGE_SIZE) as other:
        with pytest.raises(UsageError, match="one memory"):
            SlotMap(slots_of(memory), other)  # type: ignore[arg-type]


def test_a_slot_that_went_is_said_so() -> None:
    with GuestMemory(16 * PAGE_SIZE) as memory:
        shapes = slots_of(memory)
        slots = SlotMap(shapes, memory)  # type: ignore[arg-type]
        shapes[3].alive = False
        with pytest.raises(MigrationError, match="slot 3"):
            slots.pages(DirtyPages.of([(3, 0x100)]))
        with pytest.raises(MigrationError, match="slot 9"):
            slots.pages(DirtyPages.of([(9, 0)]))


@pytest.mark.parametrize("gfn", [0xFF, 0x10C])
def test_gfns_outside_their_slot_are_never_read(gfn: int) -> None:
    """The slot moved since they were collected; the page would be outside the memory, or another one."""
    with GuestMemory(16 * PAGE_SIZE) as memory:
        slots = SlotMap(slots_of(memory), memory)  # type: ignore[arg-type]
        with pytest.raises(MigrationError, match="moved"):
            slots.pages_of(3, np.array([gfn], dtype=np.uint64))


@given(
    written=st.sets(st.integers(0, 299), max_size=60),
    batch=st.integers(1, FRAME_PAGES),
)
def test_allocated_pages_come_in_full_batches_ascending(written: set[int], batch: int) -> None:
    with GuestMemory(300 * PAGE_SIZE) as memory:
        for page in written:
            memory.write(page * PAGE_SIZE, b"x")
        parts = list(allocated_pages(memory, batch))
        assert [page for part in parts for page in part.tolist()] == sorted(written)
        assert all(len(part) == batch for part in parts[:-1])
        again = list(batches(np.array(sorted(written), dtype=np.uint64), batch))
        assert [part.tolist() for part in again] == [part.tolist() for part in parts]


CONTENTS = {"zero": bytes(PAGE_SIZE), "one": b"\1" * PAGE_SIZE, "last": bytes(PAGE_SIZE - 1) + b"\1"}


@settings(deadline=None)
@given(
    before=st.dictionaries(st.integers(0, 99), st.sampled_from(sorted(CONTENTS)), max_size=20),
    after=st.dictionaries(st.integers(0, 99), st.sampled_from(sorted(CONTENTS)), min_size=1, max_size=20),
)
def test_pages_arrive_as_they_are_sent(before: dict[int, str], after: dict[int, str]) -> None:
    """Round 1 with what is there before, round 2 with what changed, as a dirty log would tell."""
    here, there = pair()
    with here, there, GuestMemory(100 * PAGE_SIZE) as ours, GuestMemory(100 * PAGE_SIZE) as theirs:
        sender, receiver = PageSender(ours, here), PageReceiver(theirs, MIB)
        for number, changes in enumerate((before, after)):
            for page, name in changes.items():
                ours.write(page * PAGE_SIZE, CONTENTS[name])
            if not changes:
                continue
            receiver.begin()
            full, zero = sender.send(np.array(sorted(changes), dtype=np.uint64), zeros=number > 0)
            assert zero == list(changes.values()).count("zero")
            assert full + zero == len(changes)
            while there.readable:
                receiver.store(there.receive())
            assert (receiver.pages, receiver.zeros) == (full, zero if number else 0)
        assert theirs.read(0, theirs.size) == ours.read(0, ours.size)


# --- the proof -------------------------------------------------------------------------------------


def test_digests_are_blake2b_of_the_pages_that_are_not_zero() -> None:
    with GuestMemory(10 * PAGE_SIZE) as memory:
        memory.write(3 * PAGE_SIZE, b"abc")
        memory.write(7 * PAGE_SIZE, bytes(PAGE_SIZE))
        page = b"abc".ljust(PAGE_SIZE, b"\0")
        record = struct.pack("<Q", 3) + hashlib.blake2b(page, digest_size=16).digest()
        ranges = list(digest_ranges(memory))
        root = RootDigest()
        for part in ranges:
            root.add(part.records)
        assert b"".join(part.records.tobytes() for part in ranges) == record
        assert root.hex() == hashlib.blake2b(record, digest_size=16).hexdigest()


@settings(deadline=None, max_examples=30)
@given(written=st.sets(st.integers(0, (1 << 28) - 1), max_size=8))
def test_ranges_cover_the_whole_memory_without_gaps(written: set[int]) -> None:
    """Of 1 TiB, in as many steps as there are pages in use, about."""
    with GuestMemory(1 << 40) as memory:
        for page in written:
            memory.write(page * PAGE_SIZE, b"x")
        ranges = list(digest_ranges(memory))
        assert [part.first for part in ranges] == [0] + [part.end for part in ranges[:-1]]
        assert ranges[-1].end == 1 << 28
        assert len(ranges) <= len(written) + 1
        assert [page for part in ranges for page in part.records["page"].tolist()] == sorted(written)


@settings(deadline=None)
@given(
    ours=st.dictionaries(st.integers(0, 49), st.sampled_from(sorted(CONTENTS)), max_size=10),
    theirs=st.dictionaries(st.integers(0, 49), st.sampled_from(sorted(CONTENTS)), max_size=10),
)
def test_exactly_the_pages_that_differ_are_named(ours: dict[int, str], theirs: dict[int, str]) -> None:
    with GuestMemory(50 * PAGE_SIZE) as here, GuestMemory(50 * PAGE_SIZE) as there:
        for memory, contents in ((here, ours), (there, theirs)):
            for page, name in contents.items():
                memory.write(page * PAGE_SIZE, CONTENTS[name])
        comparison = Comparison()
        comparison.add(digest_range(here, 0, 50), digest_range(there, 0, 50))
        expected = [page for page in range(50) if ours.get(page, "zero") != theirs.get(page, "zero")]
        assert comparison.pages == expected
        assert comparison.count == len(expected)


def test_many_differing_pages_are_counted_and_the_first_named() -> None:
    with GuestMemory(200 * PAGE_SIZE) as here, GuestMemory(200 * PAGE_SIZE) as there:
        here.write(0, b"x" * 200 * PAGE_SIZE)
        comparison = Comparison()
        comparison.add(digest_range(here, 0, 200), digest_range(there, 0, 200))
        assert comparison.count == 200
        assert comparison.pages == list(range(64))
