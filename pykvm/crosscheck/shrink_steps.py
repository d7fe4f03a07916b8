"""From a failing scenario to a small one by its parts: fewer steps, emptier tables, simpler accesses.

Unlike ``shrink``, which works on the choices that made a scenario, this needs nothing but the scenario, so it
also serves for those written by hand or loaded from a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from pykvm.crosscheck.scenario import CodeGuest, Contents, Scenario, check
from pykvm.crosscheck.steps import Access
from pykvm.errors import UsageError

_T = TypeVar("_T")
_WORD: Final = 8


def shrink_steps(scenario: Scenario, fails: Callable[[Scenario], bool], *, seconds: float = 10.0) -> Scenario:
    """The smallest failing scenario found within ``seconds``; ``scenario`` itself must fail."""
    return _Shrinker(scenario, fails, time.monotonic() + seconds).run()


class _Shrinker:
    def __init__(self, scenario: Scenario, fails: Callable[[Scenario], bool], deadline: float) -> None:
        self._best = scenario
        self._fails = fails
        self._deadline = deadline

    def run(self) -> Scenario:
        while time.monotonic() < self._deadline:
            before = self._best
            self._fewer_steps()
            self._simpler_accesses()
            if isinstance(self._best.guest, CodeGuest):
                self._fewer_slots()
                self._less_contents()
            if self._best == before:
                break
        return self._best

    def _try(self, candidate: Scenario) -> bool:
        if time.monotonic() > self._deadline:
            return False
        try:
            check(candidate)
        except UsageError:
            return False
        if not self._fails(candidate):
            return False
        self._best = candidate
        return True

    def _drop(self, items: Callable[[], Sequence[_T]], make: Callable[[tuple[_T, ...]], Scenario]) -> None:
        """Leave out blocks of items, large ones first, from the end."""
        size = max(len(items()) // 2, 1)
        while size:
            at = len(items()) - size
            while at >= 0:
                now = tuple(items())
                self._try(make(now[:at] + now[at + size :]))
                at -= size
            size //= 2

    def _fewer_steps(self) -> None:
        self._drop(lambda: self._best.steps, lambda steps: replace(self._best, steps=steps))

    def _simpler_accesses(self) -> None:
        for number, step in enumerate(self._best.steps):
            if not isinstance(step, Access):
                continue
            for name in ("value", "count", "second"):
                now = self._best.steps[number]
                if isinstance(now, Access) and getattr(now, name):
                    simpler = replace(now, **{name: 0})  # type: ignore[arg-type]
                    steps = (*self._best.steps[:number], simpler, *self._best.steps[number + 1 :])
                    self._try(replace(self._best, steps=steps))

    # --- the guest -------------------------------------------------------------------------------

    def _guest(self) -> CodeGuest:
        guest = self._best.guest
        assert isinstance(guest, CodeGuest), "asked before"
        return guest

    def _with(self, **members: object) -> Scenario:
        return replace(self._best, guest=replace(self._guest(), **members))  # type: ignore[arg-type]

    def _fewer_slots(self) -> None:
        self._drop(lambda: self._guest().slots, lambda slots: self._with(slots=slots))

    def _less_contents(self) -> None:
        self._drop(lambda: self._guest().contents, lambda contents: self._with(contents=contents))
        for number in range(len(self._guest().contents)):
            self._fewer_words(number)

    def _fewer_words(self, number: int) -> None:
        """Zero the words of one part of the contents, in halves first."""
        words = len(self._guest().contents[number].data) // _WORD
        size = words
        while size:
            for at in range(0, words, size):
                part = self._guest().contents[number]
                begin, end = _WORD * at, _WORD * min(at + size, words)
                if any(part.data[begin:end]):
                    data = part.data[:begin] + bytes(end - begin) + part.data[end:]
                    self._try(self._with(contents=self._replaced(number, replace(part, data=data))))
            size //= 2

    def _replaced(self, number: int, part: Contents) -> tuple[Contents, ...]:
        contents = self._guest().contents
        return (*contents[:number], part, *contents[number + 1 :])
