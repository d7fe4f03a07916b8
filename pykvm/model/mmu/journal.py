"""What the MMU did and by which rule: the material of ``pykvm explain``.

Mechanisms note what they do only while somebody listens (``Mmu.journal`` is not None), since most runs want
speed and no story.
"""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """One thing that happened: in words, and the rule that caused it (a section of a reference sheet)."""

    what: str
    rule: str

    def __str__(self) -> str:
        return f"{self.what} [{self.rule}]"


class Journal:
    """Events in order, until somebody takes them."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def note(self, what: str, rule: str) -> None:
        """``rule`` is a section, such as ``kvm-mmu.md 10.6``."""
        self._events.append(Event(what, rule))

    def take(self) -> tuple[Event, ...]:
        """The events since the last call."""
        events, self._events = tuple(self._events), []
        return events
