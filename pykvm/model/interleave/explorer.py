"""Every schedule of a few actors: breadth first over all states that they can reach together.

An actor is a small program of atomic steps.  A state is what all actors share plus one frame per actor
(where it is in its program, and its registers).  From each state every actor that can go on is let go on
by one step; a state that was met before is not looked at twice, which loses no behaviour, since a state
holds everything that decides what happens next.  Because the search is breadth first, the first broken
property comes with a shortest schedule.

Nothing here knows about KVM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pykvm.errors import UsageError


class BrokenProperty(Exception):
    """Raised by a step that breaks a property: what the step did, and what is lost by it."""

    def __init__(self, did: str, broken: str) -> None:
        super().__init__(f"{did}: {broken}")
        self.did = did
        self.broken = broken


class Record:
    """Base of states and frames: a dataclass whose values are immutable and hashable.

    ``copy`` and ``key`` go through the instance's dictionary, since a search makes millions of both.
    """

    def copy(self) -> Any:
        """A second record that can be changed without this one noticing."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def key(self) -> tuple[Any, ...]:
        """All values, in the order of the fields."""
        return tuple(self.__dict__.values())


V = TypeVar("V", bound=Record)
F = TypeVar("F", bound=Record)

Step = Callable[[V, F], "str | None"]
"""One atomic step.  It changes the shared state and the actor's frame, which are copies, and returns what
it did in words, or None if the actor cannot take it now (a lock is held, a reader is still inside)."""


class Actor(ABC, Generic[V, F]):
    """One thread of control; subclasses keep their registers in a frame and nothing in themselves."""

    def __init__(self, name: str, frame: F) -> None:
        self.name = name
        self.frame = frame

    @abstractmethod
    def steps(self, frame: F) -> Sequence[Step[V, F]]:
        """What it may do next: one step, several if hardware or compiler have a choice, none at its end."""

    def may_wait(self, frame: F) -> bool:
        """Whether it may stand where it is for ever; if not, a state where nobody can move is an error."""
        return not self.steps(frame)


@dataclass(frozen=True, slots=True)
class Line:
    """One step of a schedule: who did what, in words."""

    actor: str
    text: str


@dataclass(frozen=True, slots=True)
class Counterexample:
    """A shortest schedule to a broken property: the start in words, the steps, and what broke."""

    start: str
    lines: tuple[Line, ...]
    broken: str

    def __str__(self) -> str:
        width = max(len(line.actor) for line in self.lines)
        steps = [
            f"{number:3}. {line.actor:{width}}  {line.text}"
            for number, line in enumerate(self.lines, start=1)
        ]
        return "\n".join([f"Start: {self.start}.", *steps, f"Broken: {self.broken}."])


@dataclass(frozen=True, slots=True)
class Result:
    """What an exploration found.

    ``states`` and ``transitions`` count what was visited, ``ends`` the states where nobody can go on.
    ``schedules`` is the number of different complete schedules, None if it was not counted (a
    counterexample ended the search) or has no bound (states lie on a cycle).  ``longest`` is the number of
    steps of the longest complete schedule, None likewise.
    """

    states: int
    transitions: int
    ends: int
    schedules: int | None
    longest: int | None
    counterexample: Counterexample | None


@dataclass(frozen=True)
class Start(Generic[V]):
    """One state to begin from, and what it is in words."""

    words: str
    shared: V


_Node = tuple[Any, ...]
"""The shared record and one frame per actor; as a key, the values of each."""

LIMIT = 3_000_000


def explore(starts: Sequence[Start[V]], actors: Sequence[Actor[V, Any]], limit: int = LIMIT) -> Result:
    """Visit every state that ``actors`` reach from ``starts``; stop at the first broken property.

    Raises UsageError if there are more than ``limit`` states: a case that was meant to be small is not.
    """
    return _Search(starts, actors, limit).run()


class _Search(Generic[V]):
    """The states met so far, each with the step that first led to it."""

    def __init__(self, starts: Sequence[Start[V]], actors: Sequence[Actor[V, Any]], limit: int) -> None:
        self._starts = starts
        self._actors = actors
        self._limit = limit
        self._known: dict[_Node, int] = {}
        self._origins: list[tuple[int, str, str]] = []  # the state before, who moved, what it did
        self._following: list[tuple[int, ...]] = []
        self._waiting: deque[tuple[_Node, _Node]] = deque()

    def run(self) -> Result:
        for number, start in enumerate(self._starts, start=1):
            node: _Node = (start.shared, *(actor.frame for actor in self._actors))
            self._meet(node, tuple(record.key() for record in node), (-number, "", ""))
        roots = len(self._known)
        found: Counterexample | None = None
        while self._waiting and found is None:
            node, key = self._waiting.popleft()
            index = len(self._following)
            try:
                reached = tuple(self._successors(index, node, key))
            except _Found as broken:
                found = broken.counterexample
                break
            self._following.append(reached)
            if not reached:
                found = self._stuck(index, node)
        transitions = sum(map(len, self._following))
        ends = sum(not reached for reached in self._following)
        if found is not None:
            return Result(len(self._known), transitions, ends, None, None, found)
        schedules, longest = _count(self._following, roots)
        return Result(len(self._known), transitions, ends, schedules, longest, None)

    def _successors(self, index: int, node: _Node, key: _Node) -> Iterator[int]:
        """The states one step later; raises _Found at a broken property."""
        for place, actor in enumerate(self._actors, start=1):
            for step in actor.steps(node[place]):
                shared, frame = node[0].copy(), node[place].copy()
                try:
                    text = step(shared, frame)
                except BrokenProperty as broken:
                    last = Line(actor.name, broken.did)
                    raise _Found(self._schedule(index, last, broken.broken)) from None
                if text is None:
                    continue
                keys, records = list(key), list(node)
                keys[0], keys[place] = shared.key(), frame.key()
                records[0], records[place] = shared, frame
                yield self._meet(tuple(records), tuple(keys), (index, actor.name, text))

    def _meet(self, node: _Node, key: _Node, origin: tuple[int, str, str]) -> int:
        """The number of a state; a new one is queued."""
        index = self._known.setdefault(key, len(self._known))
        if index == len(self._origins):
            if index >= self._limit:
                raise UsageError(f"There are more than {self._limit} states; take a smaller case.")
            self._origins.append(origin)
            self._waiting.append((node, key))
        return index

    def _stuck(self, index: int, node: _Node) -> Counterexample | None:
        for actor, frame in zip(self._actors, node[1:], strict=True):
            if not actor.may_wait(frame):
                return self._schedule(index, None, f"nobody can go on, and {actor.name} is not at its end")
        return None

    def _schedule(self, index: int, last: Line | None, broken: str) -> Counterexample:
        lines = [last] if last else []
        before, actor, text = self._origins[index]
        while before >= 0:
            lines.append(Line(actor, text))
            before, actor, text = self._origins[before]
        return Counterexample(self._starts[-before - 1].words, tuple(reversed(lines)), broken)


class _Found(Exception):
    def __init__(self, counterexample: Counterexample) -> None:
        super().__init__()
        self.counterexample = counterexample


def _count(following: Sequence[Sequence[int]], roots: int) -> tuple[int | None, int | None]:
    """How many paths lead from the first ``roots`` states to an end, and the length of the longest.

    Two Nones if there is a cycle.
    """
    paths: list[int | None] = [None] * len(following)
    length = [0] * len(following)
    open_states: set[int] = set()
    stack = list(range(roots))
    while stack:
        index = stack[-1]
        if paths[index] is not None:
            stack.pop()
            continue
        if index not in open_states:
            open_states.add(index)
            unknown = [later for later in following[index] if paths[later] is None]
            if any(later in open_states for later in unknown):
                return None, None
            stack.extend(unknown)
            if unknown:
                continue
        stack.pop()
        open_states.discard(index)
        later_paths = [paths[later] or 0 for later in following[index]]
        paths[index] = sum(later_paths) if later_paths else 1
        length[index] = max((length[later] + 1 for later in following[index]), default=0)
    return sum(paths[root] or 0 for root in range(roots)), max(length[:roots], default=0)
