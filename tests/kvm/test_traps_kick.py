"""Running and kicking: no kick is lost, none is reported twice, signals and Ctrl-C get through.

docs/reference/hosts.md C.4 (signals, immediate_exit) and api.rst section 5 (immediate_exit).
"""

from __future__ import annotations

import inspect
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pykvm.errors import BusyError, GuestTimeoutError
from pykvm.kvm import KvmSystem, KvmVcpu
from pykvm.machine import IoIn, IoOut, Kicked
from pykvm.memory import PAGE_SIZE
from tests.patience import patient

from .tiny import COUNT_FOR_EVER, DATA, DONE, OUT_FOR_EVER, PORT, SPIN, Runner, Tiny, done, running

LIMIT = patient(20)
"""Seconds after which something that should come at once counts as lost."""
COUNT_IN_MEMORY = bytes.fromhex("48ff07 ebfb")
"""again: inc qword [rdi]; jmp again"""


@pytest.fixture(params=[3, 0], ids=["CPL3", "CPL0"])
def guest(system: KvmSystem, request: pytest.FixtureRequest) -> Iterator[Tiny]:
    with Tiny(system.create_machine(), cpl=request.param, pages=64) as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "this should have come at once"
        time.sleep(0.0005)


# --- one kick, one report ---------------------------------------------------------------------------


def test_a_kick_ends_a_guest_that_never_exits(guest: Tiny) -> None:
    guest.load(SPIN)
    with running(guest.vcpu) as runner:
        time.sleep(0.02)
        assert runner.exits == []
        guest.vcpu.kick()
        until(lambda: runner.exits == [Kicked()])
        time.sleep(0.02)
        assert runner.exits == [Kicked()]


def test_a_kick_before_the_run_ends_it_at_once(guest: Tiny) -> None:
    """C.4: immediate_exit; not one instruction of the guest is executed."""
    guest.load(COUNT_FOR_EVER)
    guest.vcpu.kick()
    assert guest.vcpu.run() == Kicked()
    assert guest.vcpu.get_registers().rcx == 0


def test_several_kicks_before_a_run_are_one(guest: Tiny) -> None:
    guest.load(DONE)
    for _ in range(5):
        guest.vcpu.kick()
    assert guest.vcpu.run() == Kicked()
    assert done(guest.vcpu.run())


def test_every_kick_that_was_seen_is_seen_once(guest: Tiny) -> None:
    """A thread kicks, waits for the report, kicks again: as many reports as kicks, none lost, none extra."""
    guest.load(SPIN)
    kicks = 400
    with running(guest.vcpu) as runner:
        for number in range(1, kicks + 1):
            guest.vcpu.kick()
            until(lambda number=number: len(runner.exits) >= number)  # type: ignore[misc]
            assert len(runner.exits) == number
        time.sleep(0.02)
        assert len(runner.exits) == kicks


@pytest.mark.parametrize("code", [SPIN, OUT_FOR_EVER], ids=["spinning", "exiting all the time"])
def test_kicks_from_many_threads_at_random_moments(guest: Tiny, code: bytes) -> None:
    """Each kick is covered by a report that comes after it, and there are no more reports than kicks."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    guest.load(code)
    per_thread, threads = 60, 4
    reports = 0

    def count(exit_: object) -> bool:
        nonlocal reports
        reports += isinstance(exit_, Kicked)
        return False

    runner = Runner(guest.vcpu, count)
    runner.wait_until_running()
    missed: list[int] = []

    def kick(number: int) -> None:
        choose = random.Random(seed + number)
        for _ in range(per_thread):
            before = reports
            guest.vcpu.kick()
            deadline = time.monotonic() + LIMIT
            while reports == before and time.monotonic() < deadline:
                time.sleep(choose.random() * 0.0005)
            if reports == before:
                missed.append(number)
                return

    kickers = [threading.Thread(target=kick, args=(i,)) for i in range(threads)]
    for kicker in kickers:
        kicker.start()
    for kicker in kickers:
        kicker.join()
    time.sleep(0.01)
    assert not missed
    assert 1 <= reports <= per_thread * threads
    runner.end()


def test_a_kick_during_an_exit_waits_for_the_next_run(guest: Tiny) -> None:
    guest.load(DONE + DONE)
    assert done(guest.vcpu.run())
    guest.vcpu.kick()
    assert guest.vcpu.run() == Kicked()
    assert done(guest.vcpu.run())


def test_a_kick_with_an_answer_pending_loses_neither(guest: Tiny) -> None:
    """C.4: immediate_exit completes the pending IN first; the answer arrives once, the kick too."""
    code = bytes([0xE4, PORT + 1]) + b"\x48\x89\xc3" + bytes([0xE4, PORT + 2]) + DONE
    guest.load(code)
    assert guest.vcpu.run() == IoIn(PORT + 1, 1)
    guest.vcpu.reply(b"\x5a")
    guest.vcpu.kick()
    assert guest.vcpu.run() == Kicked()
    assert guest.vcpu.run() == IoIn(PORT + 2, 1)
    assert guest.vcpu.get_registers().rbx & 0xFF == 0x5A
    guest.vcpu.reply(b"\xa5")
    assert guest.vcpu.run() == IoOut(PORT, 1, b"\xa5")


def test_no_exit_gets_lost_under_a_storm_of_kicks(system: KvmSystem) -> None:
    """A guest that counts 1, 2, 3 … out to a port: every value arrives once and in order."""
    count_out = bytes.fromhex("fec0") + DONE + b"\xeb\xfa"
    with Tiny(system.create_machine(), pages=64) as guest:
        guest.load(count_out)
        stop = threading.Event()

        def storm() -> None:
            while not stop.is_set():
                guest.vcpu.kick()
                time.sleep(0.0001)

        kicker = threading.Thread(target=storm)
        kicker.start()
        values: list[int] = []
        try:
            while len(values) < 1500:
                exit_ = guest.vcpu.run()
                if isinstance(exit_, IoOut):
                    values.append(exit_.value)
                else:
                    assert exit_ == Kicked()
        finally:
            stop.set()
            kicker.join()
        assert values == [n % 256 for n in range(1, len(values) + 1)]


# --- kick(wait) -------------------------------------------------------------------------------------


def test_kick_and_wait_returns_after_the_vcpu_left(guest: Tiny) -> None:
    """Left the guest, that is: its thread may still be on its way back, and ``running`` until then."""
    for _ in range(50):
        guest.load(COUNT_IN_MEMORY, rdi=DATA * PAGE_SIZE)
        with running(guest.vcpu) as runner:
            runner.stop = True
            guest.vcpu.kick(wait=LIMIT)
            state = getattr(guest.vcpu, "_state", None)  # the model has none
            assert state is None or not state.kick, "nobody took the kick yet"
            count = guest.memory.read(DATA * PAGE_SIZE, 8)
            time.sleep(0.001)
            assert guest.memory.read(DATA * PAGE_SIZE, 8) == count
            runner.thread.join(LIMIT)
            assert runner.exits == [Kicked()]


def test_kick_and_wait_leaves_an_idle_vcpu_alone(guest: Tiny) -> None:
    guest.load(DONE)
    guest.vcpu.kick(wait=LIMIT)
    assert done(guest.vcpu.run())


def test_kick_and_wait_gives_up_in_time(guest: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a hang: a vCPU that does not leave (here: the kick does not arrive) is an error."""
    guest.load(SPIN)
    with running(guest.vcpu):
        from pykvm.kvm import vcpu as module

        class Deaf:
            def __getattr__(self, name: str) -> object:
                return (lambda *_: 0) if name == "pykvm_vcpu_kick" else getattr(original, name)

        original = module.lib
        guest.vcpu._state.kick = 1
        with monkeypatch.context() as patch:
            patch.setattr(module, "lib", Deaf())
            with pytest.raises(GuestTimeoutError, match="did not leave"):
                guest.vcpu.kick(wait=0.05)
        guest.vcpu._state.kick = 0


# --- other signals ----------------------------------------------------------------------------------


def test_other_signals_never_look_like_a_kick(guest: Tiny) -> None:
    """C.4: EINTR of a signal that is no kick is handled inside; the guest runs on."""
    guest.load(COUNT_FOR_EVER)
    handled = 0

    def handler(*_: object) -> None:
        nonlocal handled
        handled += 1

    before = signal.signal(signal.SIGALRM, handler)
    kicker = threading.Timer(0.5, guest.vcpu.kick)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        started = time.monotonic()
        kicker.start()
        assert guest.vcpu.run() == Kicked()
        assert time.monotonic() - started > 0.4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        kicker.join()
    assert handled > 10
    assert guest.vcpu.get_registers().rcx > 1000


def test_signals_to_the_vcpu_thread_never_look_like_a_kick(guest: Tiny) -> None:
    """A storm straight at the thread inside KVM_RUN, with the very signal that a kick uses as well."""
    from pykvm.abi import lib

    guest.load(SPIN)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with running(guest.vcpu) as runner:
            thread = runner.thread.ident
            assert thread is not None
            for number in (signal.SIGUSR1, lib.pykvm_kick_signal()):
                for _ in range(200):
                    signal.pthread_kill(thread, number)
                    time.sleep(0.0002)
            assert runner.exits == []
            guest.vcpu.kick()
            until(lambda: runner.exits == [Kicked()])
    finally:
        signal.signal(signal.SIGUSR1, before)


class Alarm(Exception):
    """Raised by the handler below."""


def test_a_signal_at_any_moment_reaches_its_python_handler(guest: Tiny) -> None:
    """Also one that arrives between the interpreter's last look and KVM_RUN: its handler runs at once, not
    when the guest exits some day.  The alarm is aimed at that moment, again and again.
    """
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    guest.load(SPIN)
    missed = threading.Event()

    def handler(*_: object) -> None:
        raise Alarm

    def late(vcpu: KvmVcpu) -> None:
        missed.set()
        vcpu.kick()

    before = signal.signal(signal.SIGALRM, handler)
    watchdog = None
    try:
        for _ in range(500):
            watchdog = threading.Timer(LIMIT, late, (guest.vcpu,))
            watchdog.start()
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * choose.uniform(1, 40))
                exit_ = guest.vcpu.run()
            except Alarm:
                pass
            else:
                raise AssertionError(f"the alarm was not handled; the run ended with {exit_}")
            finally:
                watchdog.cancel()
            assert not missed.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if watchdog is not None:
            watchdog.cancel()


CTRL_C = """
import os, signal, sys, threading, time
from pykvm.kvm import KvmSystem
from tests.kvm.tiny import SPIN, Tiny
with KvmSystem() as system, Tiny(system.create_machine(), cpl=int(sys.argv[1]), pages=64) as guest:
    guest.load(SPIN)
    for _ in range(50):
        try:
            threading.Timer(0.003, os.kill, (os.getpid(), signal.SIGINT)).start()
            guest.vcpu.run()
        except KeyboardInterrupt:
            continue
        raise SystemExit("no KeyboardInterrupt")
print("fine")
"""


@pytest.mark.kvm
@pytest.mark.parametrize("cpl", [3, 0])
def test_ctrl_c_ends_a_run_of_the_main_thread(cpl: int) -> None:
    """In a process of its own, since SIGINT would stop pytest as well."""
    result = subprocess.run(
        [sys.executable, "-c", CTRL_C, str(cpl)],
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr


# --- one thread at a time ---------------------------------------------------------------------------


def vcpu_calls(vcpu: KvmVcpu) -> dict[str, Callable[[], object]]:
    """Every public way to issue a vCPU ioctl that needs no argument made up."""
    registers, special = vcpu.get_registers(), vcpu.get_special_registers()
    calls: dict[str, Callable[[], object]] = {
        "run": vcpu.run,
        "set_registers": lambda: vcpu.set_registers(registers),
        "set_special_registers": lambda: vcpu.set_special_registers(special),
        "translate": lambda: vcpu.translate(0x1000),
        "save_state": vcpu.save_state,
    }
    for name in dir(type(vcpu)):
        call = getattr(vcpu, name) if name.startswith("get_") else None
        if call is not None and not inspect.signature(call).parameters:
            calls[name] = call
    return calls


def test_another_thread_gets_busy_error_and_never_hangs(guest: Tiny) -> None:
    """KVM serialises vCPU ioctls on a mutex: without the guard these calls would wait for the guest."""
    guest.load(SPIN)
    calls = vcpu_calls(guest.vcpu)
    assert len(calls) >= 7
    outcomes: dict[str, object] = {}
    with running(guest.vcpu) as runner:
        for name, call in calls.items():

            def attempt(name: str = name, call: Callable[[], object] = call) -> None:
                try:
                    outcomes[name] = call()
                except Exception as error:
                    outcomes[name] = error

            thread = threading.Thread(target=attempt, daemon=True)
            thread.start()
            thread.join(LIMIT)
            assert not thread.is_alive(), f"{name} hangs while the vCPU runs"
        assert runner.exits == []
    for name, outcome in outcomes.items():
        assert isinstance(outcome, BusyError), f"{name}: {outcome!r}"
        assert "kick" in str(outcome)


def test_statistics_of_a_running_vcpu_do_not_wait(guest: Tiny) -> None:
    """hosts.md I: KVM_GET_STATS_FD on a running vCPU blocks; here it is BusyError or an answer."""
    guest.load(SPIN)
    with running(guest.vcpu):
        answer: list[object] = []

        def ask() -> None:
            try:
                answer.append(guest.vcpu.statistics())
            except BusyError as error:
                answer.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(LIMIT)
        assert answer


def test_the_vcpu_is_free_again_after_a_kick(guest: Tiny) -> None:
    guest.load(COUNT_FOR_EVER)
    last = 0
    for _ in range(30):
        for seconds in (0.002, 0.02, 0.2, 2):  # a slow host needs longer to enter the guest at all
            with running(guest.vcpu):
                time.sleep(seconds)
            now = guest.vcpu.get_registers().rcx
            if now > last:
                break
        assert now > last
        last = now


def test_entries_count_the_runs(guest: Tiny) -> None:
    before = guest.vcpu.entries
    assert done(guest.run(DONE))
    assert guest.vcpu.entries == before + 1
