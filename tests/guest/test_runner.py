"""The runner's promises about threads, on vCPUs that do exactly what a test says."""

from __future__ import annotations

import random
import threading
import time

import pytest

from pykvm.errors import (
    ClosedError,
    EmulationError,
    GuestError,
    GuestTimeoutError,
    KvmError,
    RingOverflowError,
    UsageError,
)
from pykvm.guest.devices import Device, DeviceBus, GuestFinished
from pykvm.guest.runner import GuestRunner
from pykvm.machine import (
    DebugStop,
    DirtyRingFull,
    FailEntry,
    Halted,
    InternalError,
    InterruptWindow,
    IoOut,
    MemoryFault,
    Shutdown,
    SystemEvent,
    UnknownExit,
)

PORT = 0x10
BELL = IoOut(PORT, 1, b"\x07")


class Ender(Device):
    def port_out(self, vcpu, port, size, value):
        raise GuestFinished(value)


@pytest.fixture
def make(fake_vcpu, fake_machine):
    """Runner and vCPUs; every runner is stopped, and no thread may survive the test."""
    runners = []

    def build(*scripts, device=None, trace=None):
        vcpus = [fake_vcpu(number, script) for number, script in enumerate(scripts)]
        bus = DeviceBus()
        bus.attach_ports(device or Ender(), PORT)
        runner = GuestRunner(fake_machine(*vcpus), bus, trace=trace)
        runners.append(runner)
        return runner, *vcpus

    yield build
    for runner in runners:
        runner.stop(5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vcpu-")]


def test_device_ends_the_run_with_its_status(make):
    runner, one, _two = make([BELL], [])
    runner.start()
    assert runner.wait(5) == 7
    assert runner.finished
    assert not runner.running
    assert runner.error is None
    assert one.listened == {PORT}


def test_wait_times_out_while_the_guest_runs(make):
    runner, one = make([])
    runner.start()
    assert runner.wait(0.05) is None
    assert runner.running
    one.feed(BELL)
    assert runner.wait(5) == 7


def test_finish_from_outside_and_the_first_status_counts(make):
    runner, _ = make([])
    runner.start()
    runner.finish(3)
    runner.finish(4)
    assert runner.wait(5) == 3


def test_stop_reaches_every_vcpu_where_one_is_closed(make):
    runner, one, two = make([], [])
    runner.start()
    one.wait_inside()
    two.wait_inside()
    kick = one.kick

    def closed(wait=None):
        kick()  # closing a vCPU kicks it
        raise ClosedError("vCPU 0 is closed; create a new one.")

    one.kick = closed
    runner.stop(5)


def test_stop_ends_without_a_status_and_wait_returns(make):
    runner, _ = make([])
    runner.start()
    result = []
    waiter = threading.Thread(target=lambda: result.append(runner.wait(5)))
    waiter.start()
    runner.stop(5)
    waiter.join(5)
    assert result == [None]
    runner.stop(5)
    with pytest.raises(UsageError):
        runner.start()


@pytest.mark.parametrize(
    ("exit", "error", "words"),
    [
        (Shutdown(), GuestError, "triple fault at RIP 0x1234"),
        (InternalError(1, (), b"\x0f\x0b", "ud2"), EmulationError, "0x1234.*0f 0b: ud2"),
        (FailEntry(0x80000021, 3), EmulationError, "cannot go on"),
        (MemoryFault(0, 0x5000, 4096), GuestError, "0x5000"),
        (UnknownExit(77, b""), EmulationError, "77"),
        (DebugStop(1, 0, 0, 0), EmulationError, "nobody handles"),
        (SystemEvent(3, ()), EmulationError, "nobody handles"),
        (KvmError(14, "KVM_RUN"), KvmError, "KVM_RUN"),
        (DirtyRingFull(), RingOverflowError, "attach a tracker"),
        (ZeroDivisionError("bug"), ZeroDivisionError, "bug"),
    ],
)
def test_failures_surface_in_wait_pause_and_resume(make, exit, error, words):
    runner, _, _other = make([exit], [])
    runner.start()
    with pytest.raises(error, match=words):
        runner.wait(5)
    for call in (runner.pause, runner.resume):
        with pytest.raises(error, match=words):
            call()
    assert isinstance(runner.error, error)
    assert not runner.finished
    assert not runner.running


def test_device_failure_surfaces(make):
    class Broken(Device):
        def port_out(self, vcpu, port, size, value):
            raise GuestError("no ink")

    runner, _ = make([BELL], device=Broken())
    runner.start()
    with pytest.raises(GuestError, match="no ink"):
        runner.wait(5)


@pytest.mark.parametrize("event", [1, 2])
def test_shutdown_and_reset_events_end_the_run(make, event):
    runner, _ = make([SystemEvent(event, ())])
    runner.start()
    assert runner.wait(5) == 0


def test_run_ends_when_the_last_vcpu_halts(make):
    runner, _, two = make([Halted()], [])
    runner.start()
    assert runner.wait(0.05) is None
    two.feed(InterruptWindow(), Halted())
    assert runner.wait(5) == 0


def test_halted_vcpus_count_as_paused(make):
    runner, _, two = make([Halted()], [])
    runner.start()
    two.wait_inside()
    runner.pause(5)
    assert runner.paused
    runner.resume()
    two.wait_inside()


def test_pause_holds_every_vcpu_and_resume_lets_go(make):
    runner, one, two = make([], [])
    runner.start()
    for _ in range(20):
        runner.pause(5)
        assert runner.paused
        assert not one.running
        assert not two.running
        before = one.runs, two.runs
        runner.pause(5)
        one.feed(InterruptWindow())
        time.sleep(0.002)
        assert (one.runs, two.runs) == before
        runner.resume()
        one.wait_inside()
        two.wait_inside()
        assert runner.running


def test_exits_that_came_with_the_pause_are_handled(make):
    """A vCPU that leaves by itself just when it is paused must not lose that exit."""

    class Counter(Device):
        count = 0

        def port_out(self, vcpu, port, size, value):
            Counter.count += 1

    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    runner, one = make([], device=Counter())
    runner.start()
    for _ in range(200):
        one.feed(BELL)
        if chance.random() < 0.5:
            time.sleep(chance.random() / 5000)
        runner.pause(5)
        runner.resume()
    deadline = time.monotonic() + 5
    while Counter.count < 200 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert Counter.count == 200


def test_kick_storm_loses_no_pause(make):
    runner, one, two = make([], [])
    runner.start()
    over = threading.Event()

    def storm():
        while not over.wait(0.0002):
            one.kick()
            two.kick()

    stormer = threading.Thread(target=storm)
    stormer.start()
    try:
        for _ in range(50):
            runner.pause(5)
            assert runner.paused
            assert not one.running
            runner.resume()
    finally:
        over.set()
        stormer.join(5)


def test_full_ring_is_handled_while_others_run(make):
    runner, one, two = make([DirtyRingFull()], [])
    entered, release = threading.Event(), threading.Event()
    seen = []

    def collect(vcpu):
        seen.append(vcpu.id)
        entered.set()
        assert release.wait(5)

    runner.on_ring_full = collect
    runner.start()
    assert entered.wait(5)
    two.wait_inside()
    with pytest.raises(GuestTimeoutError, match="vCPU 0 did not stop"):
        runner.pause(0.05)
    assert runner.running
    two.wait_inside()
    release.set()
    runner.pause(5)
    assert runner.paused
    assert seen == [0]
    runner.resume()
    one.wait_inside()


def test_pause_during_a_full_ring_waits_for_the_collection(make):
    runner, _one = make([DirtyRingFull()])
    entered, release = threading.Event(), threading.Event()

    def collect(vcpu):
        entered.set()
        assert release.wait(5)

    runner.on_ring_full = collect
    runner.start()
    assert entered.wait(5)
    pauser = threading.Thread(target=runner.pause, args=(5,))
    pauser.start()
    time.sleep(0.02)
    assert pauser.is_alive()
    assert not runner.paused
    release.set()
    pauser.join(5)
    assert runner.paused


def test_finish_during_pause_lets_pause_return(make):
    """The device ends the run while another thread waits for the pause."""
    entered, release = threading.Event(), threading.Event()

    class Slow(Device):
        def port_out(self, vcpu, port, size, value):
            entered.set()
            assert release.wait(5)
            raise GuestFinished(9)

    runner, _, other = make([BELL], [], device=Slow())
    runner.start()
    assert entered.wait(5)
    pauser = threading.Thread(target=runner.pause, args=(5,))
    pauser.start()
    time.sleep(0.02)
    release.set()
    pauser.join(5)
    assert not pauser.is_alive()
    assert runner.wait(5) == 9
    runner.resume()
    assert not other.running
    assert runner.finished


def test_finish_while_paused(make):
    runner, _ = make([])
    runner.start()
    runner.pause(5)
    runner.finish(2)
    assert runner.wait(5) == 2


def test_failure_during_pause_surfaces_there(make):
    entered, release = threading.Event(), threading.Event()

    class Slow(Device):
        def port_out(self, vcpu, port, size, value):
            entered.set()
            assert release.wait(5)
            raise GuestError("late")

    runner, _ = make([BELL], device=Slow())
    runner.start()
    assert entered.wait(5)
    timer = threading.Timer(0.02, release.set)
    timer.start()
    with pytest.raises(GuestError, match="late"):
        runner.pause(5)
    timer.join()


def test_stuck_device_makes_stop_time_out_by_name(make):
    entered, release = threading.Event(), threading.Event()

    class Stuck(Device):
        def port_out(self, vcpu, port, size, value):
            entered.set()
            assert release.wait(5)

    runner, _ = make([BELL], device=Stuck())
    runner.start()
    assert entered.wait(5)
    with pytest.raises(GuestTimeoutError, match="vCPU 0"):
        runner.stop(0.05)
    release.set()


def test_calls_that_would_wait_for_themselves_are_refused(make):
    refusals = []

    class Curious(Device):
        def port_out(self, vcpu, port, size, value):
            for call in (runner.pause, runner.stop, runner.wait):
                try:
                    call()
                except UsageError as error:
                    refusals.append(str(error))
            raise GuestFinished(0)

    runner, _ = make([BELL], device=Curious())
    runner.start()
    assert runner.wait(5) == 0
    assert len(refusals) == 3


def test_calls_before_start_are_refused(make, fake_machine):
    runner, _ = make([])
    for call in (runner.pause, runner.resume, runner.wait):
        with pytest.raises(UsageError, match="start"):
            call()
    runner.start()
    with pytest.raises(UsageError):
        runner.start()
    with pytest.raises(UsageError, match="vCPU"):
        GuestRunner(fake_machine(), DeviceBus()).start()


def test_trace_sees_every_exit_and_listens_to_all_ports(make):
    seen = []
    runner, one = make([InterruptWindow(), BELL], trace=lambda vcpu, exit: seen.append((vcpu.id, exit)))
    runner.start()
    assert runner.wait(5) == 7
    assert seen == [(0, InterruptWindow()), (0, BELL)]
    assert one.listened is None


def test_leaving_the_context_stops(make):
    runner, one = make([])
    with runner:
        runner.start()
        one.wait_inside()
    assert not runner.running
    assert not one.running


def test_a_host_without_threads_leaves_nothing_running(make, monkeypatch):
    runner, _one, _two = make([], [])
    start = threading.Thread.start

    def second_fails(thread):
        if thread.name == "vcpu-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="new thread"):
        runner.start()
    runner.stop(5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vcpu-")]
