"""Who may touch the machine: one vCPU for some instructions, or one host thread for one operation.

The vCPUs' threads take turns.  A turn is a number of instructions drawn from a seeded generator, and the next
one goes to the next vCPU inside ``run``, so what several vCPUs do to each other depends on the seed only.  A
vCPU that left with an exit keeps its turn for a short while, since its host will answer and come back.

Host threads that collect dirty pages or change slots come in between two slices of a turn: never later than
one slice, and never twice before the guest had a slice in between, so neither side can keep the other out.
Collecting and executing exclude each other, hence no write falls between being seen and being logged.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Final

_SHORTEST_TURN: Final = 100
_LONGEST_TURN: Final = 2000
_HELD_SECONDS: Final = 0.05
"""How long a turn waits for a vCPU whose exit is being answered."""

_FIRST_SLICE: Final = 1000
_LONGEST_SLICE: Final = 1 << 20
_SLICE_SECONDS: Final = 0.005
"""What a slice of a vCPU that is alone should take."""


class Schedule:
    """The order of turns of one machine."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._changed = threading.Condition()
        self._inside: set[int] = set()
        self._turn: int | None = None
        self._left = 0
        self._busy = False
        self._begun = 0.0
        self._slice = _FIRST_SLICE
        self._away_until = 0.0
        self._away_thread = 0
        self._visitors = 0
        self._visitor = 0
        self._guest_is_next = False

    # --- vCPUs -------------------------------------------------------------------------------------------

    def begin(self, number: int, stop: Callable[[], bool]) -> int:
        """Wait for the vCPU's turn: how many instructions it may execute, 0 if ``stop`` came first."""
        with self._changed:
            if number not in self._inside:
                self._inside.add(number)
                if self._away_thread == threading.get_ident() and number != self._turn:
                    self._away_until = 0.0  # who would answer that exit is here
            while not stop():
                if self._may_run(number):
                    self._busy = True
                    self._guest_is_next = False
                    self._begun = time.perf_counter()
                    return self._slice if len(self._inside) == 1 else self._left
                left = self._away_until - time.monotonic()
                self._changed.wait(left if left > 0 else None)
            return 0

    def end(self, executed: int, limit: int) -> None:
        """The slice is over, after ``executed`` of ``limit`` instructions."""
        with self._changed:
            self._busy = False
            self._left -= max(1, executed)
            seconds = time.perf_counter() - self._begun
            if seconds > _SLICE_SECONDS:
                self._slice = max(_SHORTEST_TURN, limit // 2)
            elif executed >= self._slice and seconds < _SLICE_SECONDS / 4:
                self._slice = min(_LONGEST_SLICE, self._slice * 2)
            self._changed.notify_all()

    def leave(self, number: int, *, back_soon: bool) -> None:
        """The vCPU left ``run``; ``back_soon``: its host answers the exit and goes on."""
        with self._changed:
            self._inside.discard(number)
            if back_soon and self._turn == number and self._left > 0:
                self._away_until = time.monotonic() + _HELD_SECONDS
                self._away_thread = threading.get_ident()
            elif self._turn == number:
                self._left = 0
            self._changed.notify_all()

    def wake(self) -> None:
        """Have waiting vCPUs look at ``stop`` again."""
        with self._changed:
            self._changed.notify_all()

    def _may_run(self, number: int) -> bool:
        if self._busy or (self._visitors and not self._guest_is_next):
            return False
        return self._next() == number

    def _next(self) -> int | None:
        """Whose turn it is, or None while it is that of a vCPU outside."""
        if not self._inside:
            return None
        if self._turn is None or self._left <= 0 or not self._holds():
            after = [number for number in self._inside if self._turn is not None and number > self._turn]
            self._turn = min(after or self._inside)
            self._left = self._random.randint(_SHORTEST_TURN, _LONGEST_TURN)
        return self._turn if self._turn in self._inside else None

    def _holds(self) -> bool:
        return self._turn in self._inside or time.monotonic() < self._away_until

    # --- host threads ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def visit(self) -> Iterator[None]:
        """Have the machine to oneself; no vCPU executes meanwhile.  May be nested."""
        me = threading.get_ident()
        if self._visitor == me:
            yield
            return
        with self._changed:
            self._visitors += 1
            try:
                self._changed.wait_for(self._may_visit)
                self._busy = True
                self._visitor = me
            finally:
                self._visitors -= 1
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._visitor = 0
                self._guest_is_next = True
                self._changed.notify_all()

    def _may_visit(self) -> bool:
        return not self._busy and not (self._guest_is_next and self._next() is not None)
