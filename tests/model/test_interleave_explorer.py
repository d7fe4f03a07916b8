"""The explorer on toys whose answers are known by counting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from pykvm.errors import UsageError
from pykvm.model.interleave.explorer import Actor, BrokenProperty, Record, Result, Start, Step, explore
from tests.model.interleavings import breaks_within, count_schedules, replay


@dataclass
class Shared(Record):
    """A counter, a lock, and a counter for each actor that nobody else touches."""

    counter: int = 0
    lock: str = ""
    own: tuple[int, ...] = (0, 0, 0)


@dataclass
class Frame(Record):
    at: int = 0
    seen: int = -1


class Toy(Actor[Shared, Frame]):
    """Goes through named steps: ``own N``, ``load``, ``store``, ``lock``, ``unlock``, ``check N``."""

    def __init__(self, name: str, *program: str, loops: bool = False) -> None:
        super().__init__(name, Frame())
        self._program = program
        self._loops = loops

    def steps(self, frame: Frame) -> Sequence[Step[Shared, Frame]]:
        return (self._take,) if frame.at < len(self._program) else ()

    def _take(self, shared: Shared, frame: Frame) -> str | None:
        word, _, argument = self._program[frame.at].partition(" ")
        if word == "never" or (word == "lock" and shared.lock):
            return None
        if word == "own":
            place = int(argument)
            shared.own = (*shared.own[:place], shared.own[place] + 1, *shared.own[place + 1 :])
        elif word == "load":
            frame.seen = shared.counter
        elif word == "store":
            shared.counter = frame.seen + 1
        elif word == "lock":
            shared.lock = self.name
        elif word == "unlock":
            shared.lock = ""
        elif word == "check" and shared.counter != int(argument):
            raise BrokenProperty("looks", f"the counter is {shared.counter}, not {argument}")
        frame.at = 0 if self._loops else frame.at + 1
        return word


def run(*actors: Toy) -> Result:
    return explore([Start("all zero", Shared())], actors)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 3), (5, 5), (7, 2)])
def test_independent_steps_have_as_many_schedules_as_ways_to_interleave_them(first: int, second: int) -> None:
    result = run(Toy("a", *["own 0"] * first), Toy("b", *["own 1"] * second))
    assert result.schedules == math.comb(first + second, first)
    assert result.states == (first + 1) * (second + 1)
    assert result.transitions == first * (second + 1) + second * (first + 1)
    assert (result.ends, result.longest) == (1, first + second)


def test_three_actors() -> None:
    result = run(*(Toy(name, f"own {place}", f"own {place}") for place, name in enumerate("abc")))
    assert result.schedules == math.factorial(6) // 2**3
    assert result.states == 3**3


def test_several_starts_are_counted_together() -> None:
    other = Shared(counter=7)
    result = explore([Start("a", Shared()), Start("b", other), Start("b again", other)], [Toy("x", "own 0")])
    assert (result.states, result.schedules) == (4, 2)


class Waiter(Toy):
    """Looks at the counter when both others have stored."""

    def _take(self, shared: Shared, frame: Frame) -> str | None:
        return super()._take(shared, frame) if shared.own[0] + shared.own[1] == 2 else None


INCREMENT = ("load", "store")


def counters(*, locked: bool) -> tuple[list[Start[Shared]], list[Toy]]:
    around = (("lock",), ("unlock",)) if locked else ((), ())
    toys: list[Toy] = [
        Toy(name, *around[0], *INCREMENT, *around[1], f"own {place}") for place, name in enumerate("ab")
    ]
    return [Start("all zero", Shared())], [*toys, Waiter("c", "check 2")]


def test_the_lost_update_is_found_with_a_shortest_schedule() -> None:
    world = counters(locked=False)
    found = explore(*world).counterexample
    assert found is not None
    assert found.broken == "the counter is 1, not 2"
    # Both load, both store, both say so, and the third one looks: there is no shorter way.
    assert len(found.lines) == 7
    assert {line.text for line in found.lines[:2]} == {"load"}
    assert not breaks_within(world, 6)
    assert replay(world, found) == found.broken


def test_a_lock_prevents_it_and_every_schedule_was_looked_at() -> None:
    world = counters(locked=True)
    result = explore(*world)
    assert result.counterexample is None
    assert result.schedules == count_schedules(world)


def test_who_waits_for_ever_is_found() -> None:
    found = run(Toy("a", "lock", "own 0"), Toy("b", "lock", "unlock")).counterexample
    assert found is not None
    assert found.broken == "nobody can go on, and b is not at its end"
    assert [line.actor for line in found.lines] == ["a", "a"]


def test_who_may_wait_is_no_error() -> None:
    class Patient(Toy):
        def may_wait(self, frame: Frame) -> bool:
            return True

    result = run(Patient("a", "never"), Toy("b", "own 1"))
    assert (result.counterexample, result.ends) == (None, 1)


def test_a_cycle_has_no_number_of_schedules() -> None:
    result = run(Toy("a", "load", loops=True), Toy("b", "own 1"))
    assert (result.counterexample, result.schedules, result.longest) == (None, None, None)


def test_a_case_that_is_too_large_says_so() -> None:
    with pytest.raises(UsageError, match="more than 5 states"):
        explore([Start("zero", Shared())], [Toy("a", *["own 0"] * 10)], limit=5)


def test_a_schedule_reads_well() -> None:
    found = run(Toy("a", "load", "check 1"), Toy("long", "own 1")).counterexample
    assert str(found) == ("Start: all zero.\n  1. a  load\n  2. a  looks\nBroken: the counter is 0, not 1.")
