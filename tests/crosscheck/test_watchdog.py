"""The shared watchdog: it calls what is overdue, from another thread, and nothing else."""

from __future__ import annotations

import threading
import time

from pykvm.crosscheck.watchdog import Watchdog
from tests.patience import patient

LIMIT = patient(20)


def test_what_is_overdue_is_called_again_and_again_by_one_other_thread() -> None:
    threads: list[int] = []
    enough = threading.Event()

    def overdue() -> None:
        threads.append(threading.get_ident())
        if len(threads) >= 3:
            enough.set()

    dog = Watchdog()
    with dog.watch(0, overdue):
        assert enough.wait(LIMIT)
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_what_is_in_time_or_over_is_left_alone() -> None:
    calls: list[str] = []
    called = threading.Event()
    dog = Watchdog()
    with dog.watch(0, lambda: calls.append("over")):
        pass
    time.sleep(0.2)  # one last call may still come
    calls.clear()
    with dog.watch(LIMIT * 100, lambda: calls.append("in time")), dog.watch(0, called.set):
        assert called.wait(LIMIT)
    assert calls == []


def test_many_short_runs_start_one_thread() -> None:
    dog = Watchdog()
    before = threading.active_count()
    for _ in range(50):
        with dog.watch(LIMIT, lambda: None):
            pass
    assert threading.active_count() <= before + 1
