"""Explorations without the explorer: every schedule one by one, and a schedule played again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from pykvm.model.interleave import CASES, MUTATIONS, Result
from pykvm.model.interleave.explorer import Actor, BrokenProperty, Counterexample, Start

World = tuple[Sequence[Start[Any]], Sequence[Actor[Any, Any]]]
Schedule = tuple[tuple[str, str], ...]


@cache
def proof(case: str) -> Result:
    """A case under KVM's rules; explored once for all tests."""
    return CASES[case].explore()


@cache
def explored(mutation: str) -> Result:
    """A mutation's case under its rules; explored once for all tests."""
    return MUTATIONS[mutation].explore()


def moves(
    actors: Sequence[Actor[Any, Any]], shared: Any, frames: Sequence[Any]
) -> Iterator[tuple[str, str, Any, list[Any], str]]:
    """Everything that can happen next: who, what, the state after it, and what it broke, if anything."""
    for place, actor in enumerate(actors):
        for step in actor.steps(frames[place]):
            after, frame = shared.copy(), frames[place].copy()
            later = [*frames[:place], frame, *frames[place + 1 :]]
            try:
                text = step(after, frame)
            except BrokenProperty as broken:
                yield actor.name, broken.did, after, later, broken.broken
                continue
            if text is not None:
                yield actor.name, text, after, later, ""


def count_schedules(world: World) -> int:
    """All complete schedules, each walked from its beginning: nothing is remembered."""
    starts, actors = world

    def count(shared: Any, frames: Sequence[Any]) -> int:
        total = 0
        for _, text, after, later, broken in moves(actors, shared, frames):
            assert not broken, text
            total += count(after, later)
        return total or 1

    return sum(count(start.shared, [actor.frame for actor in actors]) for start in starts)


def breaks_within(world: World, steps: int) -> bool:
    """Whether any schedule of at most ``steps`` steps breaks something; nothing is remembered."""
    starts, actors = world

    def breaks(shared: Any, frames: Sequence[Any], left: int) -> bool:
        if not left:
            return False
        return any(
            broken or breaks(after, later, left - 1)
            for _, _, after, later, broken in moves(actors, shared, frames)
        )

    return any(breaks(start.shared, [actor.frame for actor in actors], steps) for start in starts)


def replay(world: World, found: Counterexample) -> str:
    """Take the steps of a schedule by name and text, and return what the last of them broke."""
    starts, actors = world
    (start,) = [start for start in starts if start.words == found.start]
    shared: Any = start.shared
    frames: list[Any] = [actor.frame for actor in actors]
    broken = ""
    for number, line in enumerate(found.lines, start=1):
        assert not broken
        ways = [
            (after, later, what)
            for name, text, after, later, what in moves(actors, shared, frames)
            if (name, text) == (line.actor, line.text)
        ]
        assert len(ways) == 1, f"step {number}: {line}"
        shared, frames, broken = ways[0]
    return broken
