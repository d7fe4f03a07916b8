"""Two processes, one of them killed (SIGKILL) at a random moment; the other must behave."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pykvm.errors import DestinationLostError, HandoverUnknownError, MigrationError
from pykvm.guest.workloads import WorkloadGuest
from pykvm.kvm import KvmSystem
from pykvm.migrate import Channel, Phase, Progress, receive, send
from pykvm.track import make_tracker
from tests.migrate.fakes import wait_for
from tests.migrate.peer import CHECK_SECONDS, CONFIG, POLICY
from tests.patience import patient

FEW, MANY = 6, 50


class Peer:
    """The other process and the channel to it."""

    def __init__(self, side: str) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.migrate.peer", side, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.channel = Channel(ours, timeout=patient(60))
        self._timer: threading.Timer | None = None

    def kill(self) -> bool:
        """Kill it for certain; a fence."""
        self.process.kill()
        return self.process.wait(patient(10)) is not None

    def kill_after(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self.process.kill)
        self._timer.start()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        self.kill()
        assert self.process.stderr is not None
        words = self.process.stderr.read().decode()
        self.process.stderr.close()
        self.channel.close()
        assert "Traceback" not in words, words


@contextlib.contextmanager
def peers(side: str) -> Iterator[Callable[[], Peer]]:
    """Other processes one by one, each ready when it is wanted since it started while the last one lived."""
    alive: list[Peer] = [Peer(side)]

    def following() -> Peer:
        alive.append(Peer(side))
        return alive[-2]

    try:
        yield following
    finally:
        for other in alive:
            other.close()


def moments(count: int, whole: float) -> list[float]:
    """Random moments in the ``whole`` seconds that a migration takes from its first page on."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}, a migration takes {whole:.3f} s")
    random_ = random.Random(seed)
    return [random_.uniform(0, whole) for _ in range(count)]


class Trigger:
    """A progress callback that has the other side killed some time after the first page, if at all."""

    def __init__(self, other: Peer, delay: float | None) -> None:
        self.began: float | None = None
        self._other = other
        self._delay = delay

    def __call__(self, progress: Progress) -> None:
        if self.began is None and progress.phase is Phase.COPY:
            self.began = time.monotonic()
            if self._delay is not None:
                self._other.kill_after(self._delay)

    @property
    def elapsed(self) -> float:
        assert self.began is not None
        return time.monotonic() - self.began


def goes_on(guest: Any) -> bool:
    before = guest.report().visits
    wait_for(lambda: guest.report().visits > before, 10)
    return not guest.report().corruption_count


class Source:
    """A guest here that is to be moved again and again; a new one when the last one went away."""

    def __init__(self, system: KvmSystem) -> None:
        self._system = system
        self.outcomes: Counter[str] = Counter()
        self._renew()

    def _renew(self) -> None:
        self.tracker = make_tracker("bitmap")
        self.guest = WorkloadGuest.create(self._system, CONFIG, prepare=self.tracker.prepare)
        self.guest.runner.start()
        wait_for(lambda: self.guest.report().visits > 0)

    def attempt(self, other: Peer, delay: float | None, *, fence: bool = True) -> float:
        """Migrate while the other side is killed; the seconds since the first page."""
        trigger = Trigger(other, delay)
        try:
            send(
                self.guest, self.tracker, other.channel, POLICY,
                progress=trigger, fence=other.kill if fence else None,
            )  # fmt: skip
        except MigrationError as error:
            self._kept(str(error))
        except HandoverUnknownError:
            assert not fence
            assert self.guest.runner.paused
            self.outcomes["unknown"] += 1
            self._gone()
        except DestinationLostError:
            self.outcomes["lost"] += 1
            self._gone()
        else:
            self.outcomes["moved"] += 1
            elapsed = trigger.elapsed
            self._gone()
            return elapsed
        return trigger.elapsed

    def _kept(self, message: str) -> None:
        assert "stays here, unharmed" in message
        assert goes_on(self.guest)
        self.outcomes["kept"] += 1

    def _gone(self) -> None:
        """Nothing runs here any more."""
        assert not self.guest.runner.running
        before = self.guest.report()
        time.sleep(0.01)
        assert self.guest.report() == before
        self.guest.close()
        self._renew()


def kill_destinations(system: KvmSystem, count: int) -> Counter[str]:
    source = Source(system)
    try:
        with peers("destination") as following:
            whole = source.attempt(following(), None)
            assert source.outcomes == {"moved": 1}
            for number, delay in enumerate(moments(count, whole)):
                source.attempt(following(), delay, fence=number % 2 == 0)
            assert send(source.guest, source.tracker, following().channel, POLICY).verified
    finally:
        source.guest.close()
    print(dict(source.outcomes))
    return source.outcomes


def kill_sources(system: KvmSystem, count: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    with peers("source") as following:
        outcome, whole = receive_from(system, following(), None)
        assert outcome == "moved"
        for delay in moments(count, whole):
            outcome, _ = receive_from(system, following(), delay)
            outcomes[outcome] += 1
    print(dict(outcomes))
    return outcomes


def receive_from(system: KvmSystem, other: Peer, delay: float | None) -> tuple[str, float]:
    """Receive while the source is killed: what became of it, and the seconds since the first page."""
    trigger = Trigger(other, delay)
    try:
        received = receive(system, other.channel, check_seconds=CHECK_SECONDS, progress=trigger)
    except MigrationError:
        return "nothing here", 0.0
    elapsed = trigger.elapsed
    with received:
        other.kill()
        assert goes_on(received.guest)
        assert received.result.guest.corruptions == 0
    return "moved", elapsed


@pytest.mark.kvm
def test_a_few_kills_of_the_destination(system: KvmSystem) -> None:
    kill_destinations(system, FEW)


@pytest.mark.kvm
def test_a_few_kills_of_the_source(system: KvmSystem) -> None:
    kill_sources(system, FEW)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_kills_of_the_destination(system: KvmSystem) -> None:
    outcomes = kill_destinations(system, MANY)
    assert outcomes["kept"]
    assert len(outcomes) > 1, "every kill came before the hand-over"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_kills_of_the_source(system: KvmSystem) -> None:
    outcomes = kill_sources(system, MANY)
    assert outcomes["nothing here"]
    assert outcomes["moved"], "every kill came before the hand-over"


def test_a_destination_that_nobody_talks_to_ends_by_itself(system: KvmSystem) -> None:
    other = Peer("destination")
    other.channel.close()
    assert other.process.wait(patient(20)) == MigrationError.exit_status
    other.close()
