"""Both sides against a fake machine: the course of events, without KVM."""

from __future__ import annotations

from typing import Any

import pytest

from pykvm.errors import (
    MigrationError,
    RingOverflowError,
    UsageError,
    VerificationError,
)
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import Acceptance, Phase, Policy, Progress, pair, send
from tests.migrate.fakes import FakeConfig, FakeGuest, FakeTracker, assert_goes_on, running_guest
from tests.migrate.sides import Destination


def test_a_running_guest_moves_and_goes_on_without_a_lost_page() -> None:
    here, there = pair()
    seen: list[Progress] = []
    with running_guest() as guest:
        destination = Destination(there)
        result = send(guest, FakeTracker(), here, Policy(), progress=seen.append)
        received = destination.join()
        assert received is not None
        with received:
            stopped = guest.count
            assert_goes_on(received.guest, lambda: received.guest.count)
            assert received.guest.count > stopped == guest.count
    assert result.verified
    assert result.digest_source == result.digest_destination == received.result.digest
    assert result.rounds[-1].final
    assert result.rounds[0].pages_dirtied == sum(result.rounds[0].heat)
    assert result.guest.checks > 0
    assert result.guest.corruptions == 0
    assert result.pages_total == guest.config.pages
    phases = list(dict.fromkeys(item.phase for item in seen))
    assert phases == [p for p in Phase if p in phases]
    assert phases[-1] is Phase.DONE


def test_a_display_that_fails_after_the_hand_over_does_not_end_the_guest() -> None:
    def broken(progress: Progress) -> None:
        if progress.phase in (Phase.CHECK, Phase.DONE):
            raise RuntimeError("the terminal is gone")

    here, there = pair()
    with running_guest() as guest:
        destination = Destination(there, progress=broken)
        result = send(guest, FakeTracker(), here)
        received = destination.join()
        assert received is not None
        with received:
            assert_goes_on(received.guest, lambda: received.guest.count)
    assert result.verified


def test_json_has_the_documented_keys() -> None:
    here, there = pair()
    with running_guest() as guest:
        destination = Destination(there)
        document = send(guest, FakeTracker(), here).to_json()
        received = destination.join()
        assert received is not None
        received.close()
    assert document.keys() >= {
        "verified", "backend", "tracker", "rounds", "total_seconds", "downtime_seconds", "bytes_sent",
        "throughput_bytes_per_second", "pages_total", "digest_source", "digest_destination",
        "guest_checks", "guest_corruptions",
    }  # fmt: skip
    assert document["rounds"][0].keys() >= {"pages", "bytes", "seconds", "pages_dirtied"}
    assert document["tracker"] == "fake"
    assert received.result.to_json()["guest_checks"] == document["guest_checks"]


def test_zero_pages_do_not_travel_and_pages_that_become_zero_arrive_as_zeros() -> None:
    here, there = pair()
    pages = 4096
    with running_guest(FakeConfig(pages=32), size=pages * PAGE_SIZE) as guest:
        guest.memory.write(100 * PAGE_SIZE, b"x" * PAGE_SIZE)
        guest.memory.write(101 * PAGE_SIZE, bytes(PAGE_SIZE))
        destination = Destination(there)

        def clear(progress: Progress) -> None:
            if progress.phase is Phase.PAUSE:
                guest.memory.write(100 * PAGE_SIZE, bytes(PAGE_SIZE))
                guest.machine.dirty.add((0, 100))

        result = send(guest, FakeTracker(), here, progress=clear)
        received = destination.join()
        assert received is not None
        with received:
            assert received.guest.memory.read(100 * PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert result.rounds[0].pages <= 34
    assert result.rounds[-1].zero_pages == 1
    assert result.bytes_sent < 100 * PAGE_SIZE


def test_a_lost_page_is_found_and_named_and_the_guest_stays() -> None:
    tracker = FakeTracker()
    with running_guest() as guest:
        for _ in range(5):
            here, there = pair()
            destination = Destination(there)
            with pytest.raises(VerificationError, match=r"^1 of 64 pages differ .*: gfn 0x[0-9a-f]+ "):
                send(guest, tracker, here, sabotage="lost-page")
            assert destination.join() is None
            assert isinstance(destination.error, VerificationError)
            assert destination.system.machines[0].closed
            assert_goes_on(guest, lambda: guest.count)
        here, there = pair()
        destination = Destination(there)
        assert send(guest, tracker, here).verified
        received = destination.join()
        assert received is not None
        received.close()


def test_the_state_arrives_before_the_guest_runs() -> None:
    here, there = pair()
    arrived: list[int] = []

    def adopt(machine: Any, memory: Any, description: Any) -> FakeGuest:
        arrived.append(machine.vcpus[0].state.registers.rax)
        return FakeGuest.adopt(machine, memory, description)

    with running_guest() as guest:
        destination = Destination(there, adopt=adopt)
        send(guest, FakeTracker(), here)
        assert arrived == [guest.count]
        received = destination.join()
        assert received is not None
        received.close()


def test_a_guest_that_went_away_cannot_be_moved_again() -> None:
    with running_guest() as guest:
        here, there = pair()
        destination = Destination(there)
        assert send(guest, FakeTracker(), here).verified
        received = destination.join()
        assert received is not None
        with received:
            here, there = pair()
            with there, pytest.raises(UsageError, match="lives at its destination"):
                send(guest, FakeTracker(), here)


def test_sabotage_of_an_unknown_kind_is_refused_at_once() -> None:
    here, there = pair()
    with there, running_guest() as guest:
        with pytest.raises(UsageError, match="lost-page"):
            send(guest, FakeTracker(), here, sabotage="lost-leg")
        assert_goes_on(guest, lambda: guest.count)


def test_a_tracker_that_overflows_ends_the_migration_and_not_the_guest() -> None:
    here, there = pair()
    with running_guest() as guest:
        destination = Destination(there)
        with pytest.raises(RingOverflowError, match="stays here, unharmed"):
            send(guest, FakeTracker(error=RingOverflowError("lost entries")), here)
        assert destination.join() is None
        assert "lost entries" in str(destination.error)
        assert_goes_on(guest, lambda: guest.count)


def test_an_interrupt_leaves_the_guest_running() -> None:
    here, there = pair()

    def interrupt(progress: Progress) -> None:
        if progress.phase is Phase.VERIFY:
            raise KeyboardInterrupt

    with running_guest() as guest:
        destination = Destination(there)
        with pytest.raises(KeyboardInterrupt):
            send(guest, FakeTracker(), here, progress=interrupt)
        assert destination.join() is None
        assert str(destination.error) == "The source gave up: It was interrupted."
        assert_goes_on(guest, lambda: guest.count)


def test_a_paused_guest_stays_paused_when_its_migration_fails() -> None:
    here, there = pair()
    there.close()
    with running_guest() as guest:
        guest.runner.pause()
        with pytest.raises(MigrationError):
            send(guest, FakeTracker(), here)
        assert guest.runner.paused


def test_a_guest_larger_than_the_limit_is_refused_with_the_reason() -> None:
    here, there = pair()
    with running_guest() as guest:
        destination = Destination(there, acceptance=Acceptance(max_memory=PAGE_SIZE))
        with pytest.raises(MigrationError, match="at most 0 MiB"):
            send(guest, FakeTracker(), here)
        assert destination.join() is None
        assert not destination.system.machines
        assert_goes_on(guest, lambda: guest.count)


def test_a_host_that_has_not_enough_memory_says_so() -> None:
    here, there = pair()
    with running_guest() as guest:
        destination = Destination(there, acceptance=Acceptance(max_resident=4 * PAGE_SIZE))
        with pytest.raises(MigrationError, match="raise the limit"):
            send(guest, FakeTracker(), here)
        assert destination.join() is None
        assert destination.system.machines[0].closed
        assert_goes_on(guest, lambda: guest.count)


def test_rounds_are_limited_and_the_result_says_that_it_did_not_converge() -> None:
    here, there = pair()
    with running_guest() as guest:
        destination = Destination(there)
        tracker = FakeTracker(always=frozenset({(0, 0)}))
        result = send(guest, tracker, here, Policy(downtime_limit=0, max_rounds=4))
        received = destination.join()
        assert received is not None
        received.close()
    assert len(result.rounds) == 5
    assert not result.converged
    assert [item.final for item in result.rounds] == [False] * 4 + [True]


def test_the_bandwidth_limit_holds_on_average() -> None:
    here, there = pair()
    rate = 1 << 20
    with running_guest(FakeConfig(pages=256)) as guest:
        destination = Destination(there)
        result = send(guest, FakeTracker(), here, Policy(bandwidth=rate, downtime_limit=10))
        received = destination.join()
        assert received is not None
        received.close()
    # The bucket lets 50 ms pass at once; everything else takes its time, however slow the machine is.
    assert result.bytes_sent <= rate * (result.total_seconds + 0.06)
