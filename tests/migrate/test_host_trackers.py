"""Migrations with devices that write, by the host's page tables, and of guests with tracked pages."""

from __future__ import annotations

import time

import pytest

from pykvm.errors import VerificationError
from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.machine import Machine, System
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import Phase, Policy, Progress, pair, send
from pykvm.track import Tracker, make_tracker
from pykvm.track.carved import CarvedMachine
from tests.host_trackers import HOST_TRACKERS, host_tracker
from tests.migrate.fakes import wait_for
from tests.migrate.sides import Destination
from tests.migrate.test_guests import HOTSPOT, goes_on, move, running
from tests.rings import LEAST_RING


@pytest.mark.parametrize("name", HOST_TRACKERS)
def test_every_host_tracker_moves_a_guest_without_a_lost_page(system: System, name: str) -> None:
    move(system, HOTSPOT, host_tracker(name))


def move_beside_a_device(system: System, tracker: Tracker) -> bytes:
    """A device writes to page 0, where the guest has nothing, after the first round; what arrives there."""
    here, there = pair()
    with running(system, HOTSPOT, tracker) as guest:
        view = guest.memory.view()
        view[0] = 1

        def device(progress: Progress) -> None:
            if progress.phase is Phase.COPY and progress.completed is not None:
                view[:4] = 0x77

        destination = Destination(there, system, check_seconds=0.1)
        policy = Policy(downtime_limit=0, max_rounds=3)
        assert send(guest, tracker, here, policy, progress=device).verified
        received = destination.join()
        assert received is not None
        with received:
            return received.guest.memory.read(0, 4)


@pytest.mark.parametrize("name", HOST_TRACKERS)
def test_what_a_device_wrote_arrives_with_a_host_tracker(system: System, name: str) -> None:
    assert move_beside_a_device(system, host_tracker(name)) == b"\x77" * 4


def test_what_a_device_wrote_is_lost_with_kvms_log_and_the_proof_says_so(system: System) -> None:
    with pytest.raises(VerificationError, match="gfn 0x0 "):
        move_beside_a_device(system, make_tracker("bitmap"))


class TrackingSystem:
    """A system whose machines track pages."""

    def __init__(self, system: System) -> None:
        self.backend = system.backend
        self.description = system.description
        self._system = system

    def create_machine(self) -> Machine:
        return CarvedMachine(self._system.create_machine())

    def close(self) -> None:
        """The system is the test's."""

    def __enter__(self) -> TrackingSystem:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Replica:
    """A copy of one page that is made of what the write-tracker tells."""

    def __init__(self, gfn: int, contents: bytes) -> None:
        self.gfn = gfn
        self.page = bytearray(contents)
        self.writes = 0

    def track_write(self, gpa: int, new: bytes) -> None:
        if gpa // PAGE_SIZE == self.gfn:
            self.page[gpa % PAGE_SIZE : gpa % PAGE_SIZE + len(new)] = new
            self.writes += 1

    def track_remove_region(self, gfn: int, pages: int) -> None:
        raise AssertionError("no slot goes")


@pytest.mark.parametrize("name", ["bitmap", "manual", "ring"])
def test_a_guest_with_tracked_pages_moves(system: System, name: str) -> None:
    """Its tracked pages change all the time, by writes that KVM never logs: all must arrive."""
    tracker = make_tracker(name, ring_entries=LEAST_RING)
    config = WorkloadConfig("random", memory=HOTSPOT.memory, touch=64 * PAGE_SIZE)
    here, there = pair()
    with WorkloadGuest.create(TrackingSystem(system), config, prepare=tracker.prepare) as guest:
        guest.runner.start()
        wait_for(lambda: guest.report().visits > 100, 30)
        machine = guest.machine
        assert isinstance(machine, CarvedMachine)
        guest.runner.pause()
        before = guest.memory.read(0, guest.memory.size)
        guest.runner.resume()
        time.sleep(0.02)
        guest.runner.pause()
        after = guest.memory.read(0, guest.memory.size)
        at = range(0, len(after), PAGE_SIZE)
        changed = [n // PAGE_SIZE for n in at if before[n : n + PAGE_SIZE] != after[n : n + PAGE_SIZE]]
        replicas = [
            Replica(gfn, guest.memory.read(gfn * PAGE_SIZE, PAGE_SIZE)) for gfn in changed[-1:] + changed[:2]
        ]
        for replica in replicas:
            machine.register_track_notifier(replica)
            machine.track_add_gfn(replica.gfn)
        guest.runner.resume()
        wait_for(lambda: all(replica.writes for replica in replicas), 30)
        destination = Destination(there, system, check_seconds=0.1 if system.backend == "kvm" else 1)
        result = send(guest, tracker, here, Policy(downtime_limit=0, max_rounds=3))
        received = destination.join()
        assert received is not None
        with received:
            assert goes_on(received.guest)
        for replica in replicas:
            assert guest.memory.read(replica.gfn * PAGE_SIZE, PAGE_SIZE) == replica.page
    assert result.verified
    assert result.guest.corruptions == 0
