"""A mutation: KVM's rules with one of them broken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pykvm.model.interleave.cases import CASES
from pykvm.model.interleave.explorer import Result
from pykvm.model.interleave.rules import Rules


@dataclass(frozen=True, slots=True)
class Mutation:
    """``case`` is where it shows, ``changes`` are the knobs of ``Rules`` that it turns.

    ``change`` says in words what is different, ``outcome`` what is lost, or why nothing is if it is
    ``harmless``, and ``rule`` what KVM does about it, with the source.
    """

    name: str
    case: str
    changes: Mapping[str, Any] = field(repr=False)
    change: str
    outcome: str
    rule: str
    harmless: bool = False

    @property
    def rules(self) -> Rules:
        """KVM's rules but for the changes."""
        return replace(Rules(), **self.changes)

    def explore(self) -> Result:
        """Its case under its rules."""
        return CASES[self.case].explore(self.rules)
