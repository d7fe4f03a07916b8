"""Who may touch the machine: one vCPU for some instructions, or one host thread for one operation.

The vCPUs' threads take turns.  A turn is a number of instructions from a seeded generator, and the next one
goes to the next vCPU inside ``run``, so what several vCPUs do to each other depends on the seed only.  The
first turn waits a short while until all of them are inside, and a vCPU that left with an exit keeps its turn
for as long, since its host will answer and come back.

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
from typing import Final, NamedTuple

_SHORTEST_TURN: Final = 100
_LONGEST_TURN: Final = 2000
_HELD_SECONDS: Final = 0.05
"""How long a turn waits for a vCPU whose exit is being answered."""

_FIRST_SLICE: Final = 1000
_LONGEST_SLICE: Final = 1 << 20
_SLICE_SECONDS: Final = 0.005
"""What a slice of a vCPU that is alone should take."""


class _Absence(NamedTuple):
    """A vCPU's host answers its exit: which thread, and until when its turn waits."""

    until: float
    thread: int


class Schedule:
    """The order of turns of one machine."""

    def __init__(self, seed: int) -> None:
        self.gathers = True
        """Whether the first turn waits for all vCPUs."""
        self._random = Random(seed)
        self._changed = threading.Condition()
        self._inside: set[int] = set()
        self._expected: set[int] = set()
        self._gathered_by = 0.0
        self._turn: int | None = None
        self._left = 0
        self._busy = False
        self._executing: int | None = None
        self._begun = 0.0
        self._slice = _FIRST_SLICE
        self._away: dict[int, _Absence] = {}
        self._visitors = 0
        self._visitor = 0
        self._guest_is_next = False

    # --- vCPUs -------------------------------------------------------------------------------------------

    def expect(self, number: int) -> None:
        """A vCPU was made: the first turn waits for it."""
        with self._changed:
            if self.gathers:
                self._expected.add(number)

    def begin(self, number: int, stop: Callable[[], bool]) -> int:
        """Wait for the vCPU's turn: how many instructions it may execute, 0 if ``stop`` came first: then
        nobody waits for it any more."""
        with self._changed:
            if number not in self._inside:
                self._inside.add(number)
                me = threading.get_ident()  # and so not busy with the exit of another vCPU
                self._away = {n: each for n, each in self._away.items() if n != number and each.thread != me}
                self._expected.discard(number)
                self._gathered_by = self._gathered_by or time.monotonic() + _HELD_SECONDS
                self._changed.notify_all()
            while not stop():
                if self._may_run(number):
                    self._executing = number
                    self._busy = True
                    self._visitor = threading.get_ident()
                    self._guest_is_next = False
                    self._begun = time.perf_counter()
                    return self._slice if len(self._inside) + len(self._away) == 1 else self._left
                left = (
                    max(self._gathered_by, *(each.until for each in self._away.values()), 0)
                    - time.monotonic()
                )
                self._changed.wait(left if left > 0 else None)
            self._inside.discard(number)
            self._changed.notify_all()
            return 0

    def end(self, number: int, executed: int, limit: int) -> None:
        """The slice is over, after ``executed`` of ``limit`` instructions.  Harmless if none had begun."""
        with self._changed:
            if self._executing != number:
                return
            self._visitor = 0  # first: Ctrl-C may strike in between
            self._executing = None
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
            if self._executing == number:  # Ctrl-C struck within ``end``
                self._visitor = 0
                self._executing = None
                self._busy = False
            self._inside.discard(number)
            if back_soon:
                self._away[number] = _Absence(time.monotonic() + _HELD_SECONDS, threading.get_ident())
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
        now = time.monotonic()
        if not self._inside or (self._expected and now < self._gathered_by):
            return None
        self._expected.clear()
        self._away = {number: each for number, each in self._away.items() if now < each.until}
        members = self._inside | self._away.keys()
        if len(members) == 1:
            (self._turn,) = members
        elif self._turn not in members or self._left <= 0:
            after = [number for number in members if self._turn is not None and number > self._turn]
            self._turn = min(after or members)
            self._left = self._random.randint(_SHORTEST_TURN, _LONGEST_TURN)
        return self._turn if self._turn in self._inside else None

    # --- host threads ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def visit(self) -> Iterator[None]:
        """Have the machine to oneself; no vCPU executes meanwhile.  May be nested.

        A thread amid a slice has it already: what it calls back may act on the machine.
        """
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
