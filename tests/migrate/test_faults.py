"""The connection is cut or damaged at every place; the guest must survive on exactly one side."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from pykvm.errors import (
    ChannelError,
    DestinationLostError,
    HandoverUnknownError,
    HostError,
    MigrationError,
    PykvmError,
)
from pykvm.migrate import pair, send
from pykvm.migrate.wire import FrameType
from tests.migrate.fakes import FakeGuest, FakeTracker, assert_goes_on, running_guest
from tests.migrate.sides import Destination
from tests.migrate.streams import Filter, Proxy, cut_after_bytes, cut_after_frames, flip_bit, types_of

OUTWARD_FRAMES = 14
"""More than a short migration has at least: HELLO, two rounds of three, digests, states, HANDOVER."""


class Attempt:
    """A migration through a proxy, and which side has the guest in the end."""

    def __init__(self, guest: FakeGuest, **filters: Filter | bool) -> None:
        self.error: PykvmError | None = None
        with Proxy(**filters) as proxy:  # type: ignore[arg-type]
            self.destination = Destination(proxy.destination)
            try:
                send(guest, FakeTracker(), proxy.source)
            except (MigrationError, HandoverUnknownError, DestinationLostError) as error:
                self.error = error
            self.received = self.destination.join()
            self.sent, self.answered = bytes(proxy.sent), bytes(proxy.answered)
        self.here = guest.runner.running
        self.there = self.received is not None and self.received.guest.runner.running

    def check(self, guest: FakeGuest) -> None:
        """Never two, and one unless the source could not know."""
        assert not (self.here and self.there)
        if self.here:
            assert isinstance(self.error, MigrationError)
            assert "stays here, unharmed" in str(self.error)
            assert_goes_on(guest, lambda: guest.count)
            assert self.received is None
            assert all(machine.closed for machine in self.destination.system.machines)
        elif self.there:
            assert self.received is not None
            there = self.received.guest
            before = guest.count
            assert_goes_on(there, lambda: there.count)
            assert guest.count == before
        else:
            assert isinstance(self.error, HandoverUnknownError)
            assert guest.runner.paused
        if self.received is not None:
            self.received.close()


def move_away(guest: FakeGuest) -> None:
    """A second attempt, undisturbed."""
    here, there = pair()
    destination = Destination(there)
    assert send(guest, FakeTracker(), here).verified
    received = destination.join()
    assert received is not None
    with received:
        assert_goes_on(received.guest, lambda: received.guest.count)


def test_a_cut_after_any_frame_of_the_source_before_the_hand_over_leaves_the_guest_there() -> None:
    with running_guest() as guest:
        for count in range(1000):
            attempt = Attempt(guest, outward=cut_after_frames(count))
            passed = types_of(attempt.sent)
            if FrameType.HANDOVER in passed:
                break
            attempt.check(guest)
            if isinstance(attempt.error, HandoverUnknownError):
                # The last answer was faster than the cut: HANDOVER was sent, and lost on the way.
                assert passed[-1] is FrameType.MACHINE_STATE
                break
            assert attempt.here, f"cut after {count} frames"
        assert sum(kind is not FrameType.HANDOVER for kind in passed) >= OUTWARD_FRAMES - 3
        if attempt.received is not None:
            attempt.received.close()


def test_a_cut_after_any_answer_before_the_hand_over_leaves_the_guest_there() -> None:
    with running_guest() as guest:
        count = 0
        while True:
            attempt = Attempt(guest, backward=cut_after_frames(count))
            if FrameType.HANDOVER in types_of(attempt.sent):
                break
            attempt.check(guest)
            assert attempt.here, f"cut after {count} answers"
            count += 1
        assert count >= 4
        attempt.check(guest)
        assert not attempt.here


def test_after_a_failed_attempt_the_next_one_succeeds() -> None:
    with running_guest() as guest:
        for count in (0, 3, 8):
            Attempt(guest, outward=cut_after_frames(count)).check(guest)
        move_away(guest)


def cut_before(kind: FrameType) -> Filter:
    def change(piece: bytes) -> tuple[bytes, bool]:
        return (b"", True) if types_of(piece) == [kind] else (piece, False)

    return change


def test_a_hand_over_that_gets_lost_leaves_the_guest_paused_and_nowhere_running() -> None:
    with running_guest() as guest:
        attempt = Attempt(guest, outward=cut_before(FrameType.HANDOVER))
        assert not attempt.here
        assert not attempt.there
        attempt.check(guest)
        guest.runner.resume()
        move_away(guest)


def test_an_answer_that_gets_lost_leaves_the_guest_to_the_destination() -> None:
    with running_guest() as guest:
        attempt = Attempt(guest, backward=cut_before(FrameType.RUNNING))
        assert isinstance(attempt.error, HandoverUnknownError)
        assert attempt.there
        assert attempt.received is not None
        assert not attempt.received.result.source_informed
        attempt.check(guest)
        assert guest.runner.paused


def test_a_fence_brings_the_guest_back() -> None:
    with running_guest() as guest, Proxy(outward=cut_before(FrameType.HANDOVER)) as proxy:
        destination = Destination(proxy.destination)

        def fence() -> bool:
            return destination.join() is None

        with pytest.raises(MigrationError, match=r"certainly dead.*stays here"):
            send(guest, FakeTracker(), proxy.source, fence=fence)
        assert_goes_on(guest, lambda: guest.count)
        move_away(guest)


def test_a_fence_that_cannot_tell_does_not() -> None:
    with running_guest() as guest, Proxy(outward=cut_before(FrameType.HANDOVER)) as proxy:
        destination = Destination(proxy.destination)
        with pytest.raises(HandoverUnknownError, match="paused"):
            send(guest, FakeTracker(), proxy.source, fence=lambda: False)
        assert guest.runner.paused
        assert destination.join() is None


def test_a_damaged_hand_over_is_denied_by_the_destination_so_the_guest_goes_on() -> None:
    def damage(piece: bytes) -> tuple[bytes, bool]:
        if types_of(piece) == [FrameType.HANDOVER]:
            piece = piece[:-1] + bytes([piece[-1] ^ 1])
        return piece, False

    with running_guest() as guest:
        attempt = Attempt(guest, outward=damage)
        assert attempt.here
        attempt.check(guest)
        move_away(guest)


def test_a_start_that_fails_may_have_run_the_guest_so_the_source_keeps_it_paused() -> None:
    adopted: list[FakeGuest] = []

    def adopt(machine: Any, memory: Any, description: Any) -> FakeGuest:
        guest = FakeGuest.adopt(machine, memory, description)
        start = guest.runner.start

        def fail() -> None:
            start()
            raise HostError("no more threads")

        guest.runner.start = fail  # type: ignore[method-assign]
        adopted.append(guest)
        return guest

    here, there = pair()
    with running_guest() as guest:
        destination = Destination(there, adopt=adopt)
        with pytest.raises(HandoverUnknownError, match="no more threads"):
            send(guest, FakeTracker(), here)
        assert guest.runner.paused
        assert destination.join() is None
        assert isinstance(destination.error, HostError)
        before = adopted[0].count
        assert not adopted[0].runner.running
        time.sleep(0.02)
        assert adopted[0].count == before


def test_a_hand_over_that_cannot_be_sent_at_all_is_none() -> None:
    here, there = pair()

    class Broken:
        """Fails when HANDOVER is to be sent, before a byte has left."""

        def __call__(self, *args: object, **options: object) -> None:
            if args[0] is FrameType.HANDOVER:
                raise ChannelError("no route")
            original(*args, **options)  # type: ignore[arg-type]

    original = here.send
    here.send = Broken()  # type: ignore[method-assign]
    with running_guest() as guest:
        destination = Destination(there)
        with pytest.raises(ChannelError, match=r"no route.*stays here"):
            send(guest, FakeTracker(), here)
        assert destination.join() is None
        assert_goes_on(guest, lambda: guest.count)


@pytest.mark.parametrize("direction", ["outward", "backward"])
@pytest.mark.parametrize("fault", [cut_after_bytes, flip_bit])
def test_a_fault_at_any_byte(direction: str, fault: object) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    random_ = random.Random(seed)
    for _ in range(12):
        with running_guest() as guest:
            length = 250_000 if direction == "outward" else 600
            at = random_.randrange(length) if random_.random() < 0.7 else random_.randrange(600)
            change = flip_bit(at, random_.randrange(8)) if fault is flip_bit else cut_after_bytes(at)
            attempt = Attempt(guest, **{direction: change, "frames": False})
            attempt.check(guest)
            if attempt.here:
                move_away(guest)
