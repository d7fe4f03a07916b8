"""Cases in files: every kind of case that the cross-check saves, told apart by the member ``kind``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from pykvm.crosscheck import scenario
from pykvm.crosscheck.instructions import case as instruction
from pykvm.crosscheck.instructions.case import InstructionCase
from pykvm.crosscheck.scenario import Scenario
from pykvm.errors import UsageError
from pykvm.machine.codec import choice, record, unsigned

PAGING: Final = "paging"
LARGEST_FILE: Final = 64 << 20
"""Bytes of a file."""


@dataclass(frozen=True, slots=True)
class SavedPaging:
    """A case of the page-table product by its index (pykvm.crosscheck.paging_cases)."""

    index: int

    def to_json(self) -> dict[str, Any]:
        """The case as JSON values."""
        return {"kind": PAGING, "index": self.index}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The inverse.  Raises UsageError, naming the member."""
        members: dict[str, Any] = record(dict, {"kind": choice(PAGING), "index": unsigned(64)})(data, PAGING)
        return cls(members["index"])


Case = Scenario | InstructionCase | SavedPaging
_KINDS: Final[dict[str, Callable[[Any], Case]]] = {
    scenario.KIND: Scenario.from_json,
    instruction.KIND: InstructionCase.from_json,
    PAGING: SavedPaging.from_json,
}


def save_case(case: Case, path: Path) -> None:
    """Write a case into a file.  Raises OSError."""
    path.write_text(json.dumps(case.to_json(), indent=1) + "\n")


def load_case(path: Path) -> Case:
    """The case in a file.  Raises UsageError for a file that cannot be read or holds none."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    if len(text) > LARGEST_FILE:
        raise UsageError(f"{path} is longer than {LARGEST_FILE >> 20} MiB; is it a case?")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}); give a file that pykvm crosscheck saved.") from error
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UsageError(f"{path} is no saved case: its member 'kind' must be one of {', '.join(_KINDS)}.")
    return _KINDS[kind](data)
