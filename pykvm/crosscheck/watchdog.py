"""Somebody who looks at the clock while others run guests that may never stop.

One thread for all: starting one for each of many short runs costs more than the runs, on a busy machine.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

_LOOK_SECONDS: Final = 0.05


class Watchdog:
    """Calls what is overdue, again and again, until its time is no longer watched."""

    def __init__(self) -> None:
        self._watched: dict[object, tuple[float, Callable[[], None]]] = {}
        self._wanted = threading.Event()
        self._starting = threading.Lock()
        self._process = 0

    @contextlib.contextmanager
    def watch(self, seconds: float, overdue: Callable[[], None]) -> Iterator[None]:
        """Have ``overdue`` called from another thread, every 50 ms or so, once ``seconds`` are over.

        It may still be called a last time while this returns.
        """
        key = object()
        self._watched[key] = time.monotonic() + seconds, overdue
        self._start()
        self._wanted.set()
        try:
            yield
        finally:
            del self._watched[key]

    def _start(self) -> None:
        """The thread lives as long as the process; a forked child has none yet."""
        if self._process == os.getpid():
            return
        with self._starting:
            if self._process != os.getpid():
                self._process = os.getpid()
                threading.Thread(target=self._look, name="scenario watchdog", daemon=True).start()

    def _look(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            while self._watched:
                time.sleep(_LOOK_SECONDS)
                now = time.monotonic()
                for deadline, overdue in tuple(self._watched.values()):
                    if now >= deadline:
                        overdue()


WATCHDOG: Final = Watchdog()
"""The one that everybody shares."""
