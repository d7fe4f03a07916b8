"""Migration of real guests, on real KVM and on the model."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from pykvm.errors import GuestCorruptionError, MigrationError, RingOverflowError, VerificationError
from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.machine import DirtyPages, System
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import Acceptance, Phase, Policy, Progress, listen, pair, send, source
from pykvm.migrate.adoption import adopt_workload
from pykvm.migrate.channel import connect
from pykvm.migrate.sabotage import LostPage
from pykvm.track import Tracker, make_tracker
from tests.migrate.fakes import wait_for
from tests.migrate.sides import Destination
from tests.patience import patient
from tests.rings import LEAST_RING

MIB = 1 << 20


@contextmanager
def running(
    system: System, config: WorkloadConfig, tracker: Tracker, visits: int = 500
) -> Iterator[WorkloadGuest]:
    """A workload that has written something already."""
    with WorkloadGuest.create(system, config, prepare=tracker.prepare) as guest:
        guest.runner.start()
        wait_for(lambda: guest.report().visits > visits or guest.runner.finished, 30)
        yield guest


def goes_on(guest: Any) -> bool:
    """Whether the guest makes progress, without a corruption."""
    before = guest.report().visits
    wait_for(lambda: guest.report().visits > before, 10)
    return not guest.report().corruption_count


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "bitmap": lambda: make_tracker("bitmap"),
    "manual": lambda: make_tracker("manual"),
    "manual-chunks": lambda: make_tracker("manual", clear_chunk=256),
    "manual-initially-set": lambda: make_tracker("manual", initially_set=True),
    "ring": lambda: make_tracker("ring"),
    "smallest-ring": lambda: make_tracker("ring", ring_entries=LEAST_RING),
}
HOTSPOT = WorkloadConfig(memory=16 * MIB)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_every_tracker_moves_a_guest_without_a_lost_page(system: System, tracker: str) -> None:
    move(system, HOTSPOT, TRACKERS[tracker]())


@pytest.mark.parametrize(
    ("tracker", "config"),
    [
        ("bitmap", WorkloadConfig("random", memory=8 * MIB, cpl=0)),
        ("manual", WorkloadConfig("sequential", memory=8 * MIB, cpl=0)),
        ("bitmap", WorkloadConfig("smp", memory=16 * MIB, vcpus=2)),
        ("ring", WorkloadConfig("smp", memory=16 * MIB, vcpus=2)),
        ("ring", WorkloadConfig("strings", memory=16 * MIB)),
        ("manual", WorkloadConfig("stride", memory=16 * MIB)),
        ("ring", WorkloadConfig("burst", memory=16 * MIB)),
        ("bitmap", WorkloadConfig("idle", memory=16 * MIB, quiet=3000)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.workload}-cpl{value.cpl}",
)
def test_every_kind_of_guest_moves(system: System, tracker: str, config: WorkloadConfig) -> None:
    move(system, config, TRACKERS[tracker](), visits=5 if config.workload == "idle" else 500)


def move(system: System, config: WorkloadConfig, tracker: Tracker, visits: int = 500) -> None:
    """Migrate over three rounds or more, and see that exactly the destination runs the guest."""
    here, there = pair()
    with running(system, config, tracker, visits) as guest:
        # The model's guest checks a thousand times less in a second.
        destination = Destination(there, system, check_seconds=0.1 if system.backend == "kvm" else 1)
        result = send(guest, tracker, here, Policy(downtime_limit=0, max_rounds=3))
        received = destination.join()
        assert received is not None
        with received:
            stopped = guest.report()
            assert goes_on(received.guest)
            assert guest.report() == stopped
            assert received.guest.report().visits > stopped.visits
    assert result.verified
    assert result.digest_source == result.digest_destination
    assert result.guest.checks > 0
    assert result.guest.corruptions == 0
    result.guest.require_intact()


def test_over_tcp(system: System) -> None:
    tracker = make_tracker("ring")
    with listen("tcp:0") as listener, running(system, HOTSPOT, tracker) as guest:
        here = connect(listener.address)
        destination = Destination(listener.accept(5), system, check_seconds=0.1)
        assert send(guest, tracker, here).verified
        received = destination.join()
        assert received is not None
        with received:
            assert goes_on(received.guest)


@pytest.mark.parametrize("name", ["bitmap", "manual", "ring"])
def test_a_lost_page_is_found_and_named_and_a_second_attempt_succeeds(
    system: System, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[LostPage] = []

    class Spy(LostPage):
        def __init__(self, kind: str, memory: Any) -> None:
            super().__init__(kind, memory)
            lost.append(self)

    monkeypatch.setattr(source, "LostPage", Spy)
    tracker = make_tracker(name)
    with running(system, HOTSPOT, tracker) as guest:
        here, there = pair()
        destination = Destination(there, system)
        with pytest.raises(VerificationError) as caught:
            send(guest, tracker, here, sabotage="lost-page")
        assert f"1 of 4096 pages differ at the destination: gfn {lost[0].page:#x} (" in str(caught.value)
        assert destination.join() is None
        assert goes_on(guest)
        here, there = pair()
        destination = Destination(there, system, check_seconds=0.1)
        assert send(guest, tracker, here).verified
        received = destination.join()
        assert received is not None
        received.close()


class Forgetful:
    """A tracker that loses one page it should report, as a broken KVM would."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)

    def collect(self, *, final: bool = False) -> DirtyPages:
        pages = self._tracker.collect(final=final)
        victim = self.victim
        return DirtyPages({slot: pages.gfns(slot)[pages.gfns(slot) != victim] for slot in pages.slots})

    victim = np.uint64(0)


def test_a_tracker_that_loses_a_page_is_found_out(system: System) -> None:
    tracker = Forgetful(make_tracker("bitmap"))
    with running(system, HOTSPOT, tracker) as guest:  # type: ignore[arg-type]
        Forgetful.victim = np.uint64(guest.layout.blocks[0] // PAGE_SIZE)
        here, there = pair()
        destination = Destination(there, system)
        with pytest.raises(VerificationError, match=f"^1 of 4096 .* gfn {int(Forgetful.victim):#x} "):
            send(guest, tracker, here)  # type: ignore[arg-type]
        assert destination.join() is None
        assert goes_on(guest)


def test_what_the_guest_finds_corrupt_at_the_destination_is_reported(system: System) -> None:
    tracker = make_tracker("bitmap")
    here, there = pair()
    adopted: list[WorkloadGuest] = []

    def adopt(*args: Any) -> WorkloadGuest:
        adopted.append(adopt_workload(*args))
        return adopted[0]

    def corrupt(progress: Progress) -> None:
        if progress.phase is Phase.CHECK:
            region = adopted[0].layout.regions[0]
            for number in range(0, region.pages, 7):
                adopted[0].memory.write(region.page_address(number), b"\xa5" * PAGE_SIZE)

    with running(system, HOTSPOT, tracker, visits=100_000) as guest:
        destination = Destination(there, system, adopt=adopt, progress=corrupt, check_seconds=0.5)
        result = send(guest, tracker, here)
        received = destination.join()
        assert received is not None
        received.close()
    assert result.verified
    assert result.guest.corruptions > 0
    assert result.guest.examples[0].found == 0xA5A5A5A5A5A5A5A5
    assert result.to_json()["guest_corruptions"] == result.guest.corruptions
    with pytest.raises(GuestCorruptionError, match="gfn 0x"):
        result.guest.require_intact()


def test_a_guest_that_ends_before_it_is_moved_is_said_so(system: System) -> None:
    tracker = make_tracker("bitmap")
    with running(system, WorkloadConfig("sequential", memory=4 * MIB, passes=1), tracker) as guest:
        guest.runner.wait(patient(10))
        here, there = pair()
        destination = Destination(there, system)
        with pytest.raises(MigrationError, match="ended by itself"):
            send(guest, tracker, here)
        assert destination.join() is None


def test_a_description_with_odd_members_is_refused_before_anything_runs(system: System) -> None:
    tracker = make_tracker("bitmap")

    def adopt(machine: Any, memory: Any, description: Any) -> WorkloadGuest:
        return adopt_workload(machine, memory, description | {"seed": "1"})

    with running(system, HOTSPOT, tracker) as guest:
        here, there = pair()
        destination = Destination(there, system, adopt=adopt)
        with pytest.raises(MigrationError, match="seed is of the wrong type"):
            send(guest, tracker, here)
        assert destination.join() is None
        assert goes_on(guest)


def test_a_state_that_kvm_refuses_ends_the_migration_at_the_source_unharmed(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CR4 with a reserved bit: KVM_SET_SREGS gives EINVAL."""
    original = source.VcpuStateMessage.to_json

    def broken(self: Any) -> dict[str, Any]:
        document = original(self)
        document["state"]["special"]["cr4"] |= 1 << 63
        return document

    monkeypatch.setattr(source.VcpuStateMessage, "to_json", broken)
    tracker = make_tracker("bitmap")
    with running(system, HOTSPOT, tracker) as guest:
        here, there = pair()
        destination = Destination(there, system)
        with pytest.raises(MigrationError, match="does not accept the guest's state"):
            send(guest, tracker, here)
        assert destination.join() is None
        assert goes_on(guest)


@pytest.mark.parametrize("seed", range(4))
def test_a_guest_whose_reports_are_nonsense_does_not_upset_its_host(system: System, seed: int) -> None:
    adopted: list[WorkloadGuest] = []

    def adopt(*args: Any) -> WorkloadGuest:
        adopted.append(adopt_workload(*args))
        return adopted[0]

    def scramble(progress: Progress) -> None:
        if progress.phase is Phase.CHECK:
            at = adopted[0].layout.blocks[0]
            adopted[0].memory.write(at, random.Random(seed).randbytes(PAGE_SIZE))

    tracker = make_tracker("bitmap")
    with running(system, HOTSPOT, tracker) as guest:
        here, there = pair()
        destination = Destination(there, system, adopt=adopt, progress=scramble, check_seconds=0.05)
        result = send(guest, tracker, here)
        received = destination.join()
        assert received is not None
        received.close()
    assert result.guest.corruptions > 0 or result.guest.failure


@pytest.mark.parametrize("workload", ["random", "strings"])
def test_an_overflowing_ring_ends_the_migration_and_not_the_guest(system: System, workload: str) -> None:
    """docs/reference/hosts.md D.7: only hosts that emulate CPL 0 in batches overflow; others may not."""
    tracker = make_tracker("ring", ring_entries=LEAST_RING)
    config = WorkloadConfig(workload, memory=16 * MIB, cpl=0, throttle=0)
    with running(system, config, tracker, visits=20) as guest:
        here, there = pair()
        destination = Destination(there, system, check_seconds=0.1)
        try:
            send(guest, tracker, here, Policy(downtime_limit=0, max_rounds=20))
        except RingOverflowError as error:
            words = str(error)
        else:
            received = destination.join()
            assert received is not None
            with received:
                assert goes_on(received.guest)
            return
        assert destination.join() is None
        assert "Use the bitmap" in words
        assert goes_on(guest)


def test_a_sparse_guest_costs_what_it_uses(system: System) -> None:
    """64 GiB of which 1000 pages are in use: the bytes sent follow the pages."""
    config = WorkloadConfig("random", memory=64 << 30, touch=1000 * PAGE_SIZE)
    tracker = make_tracker("ring")
    here, there = pair(timeout=patient(30))
    with running(system, config, tracker) as guest:
        destination = Destination(there, system, check_seconds=0.1)
        result = send(guest, tracker, here, Policy(max_rounds=3, downtime_limit=0))
        received = destination.join(60)
        assert received is not None
        with received:
            assert received.guest.memory.allocated < 32 * MIB
            assert goes_on(received.guest)
    assert result.pages_total == 1 << 24
    assert result.bytes_sent < 64 * MIB
    assert result.guest.corruptions == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitmap", "ring", "manual"])
def test_a_tebibyte_guest_moves(system: System, name: str) -> None:
    config = WorkloadConfig("random", memory=1 << 40, touch=1000 * PAGE_SIZE)
    tracker = make_tracker(name)
    here, there = pair(timeout=patient(60))
    with running(system, config, tracker) as guest:
        destination = Destination(there, system, acceptance=Acceptance(max_memory=1 << 40), check_seconds=0.1)
        result = send(guest, tracker, here, Policy(max_rounds=3, downtime_limit=0))
        received = destination.join(120)
        assert received is not None
        received.close()
    assert result.bytes_sent < 64 * MIB


def test_many_migrations_leave_no_thread_behind(system: System) -> None:
    before = threading.active_count()
    for _ in range(3):
        tracker = make_tracker("ring")
        with running(system, HOTSPOT, tracker) as guest:
            here, there = pair()
            destination = Destination(there, system, check_seconds=0)
            send(guest, tracker, here)
            received = destination.join()
            assert received is not None
            received.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
