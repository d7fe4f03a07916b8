"""The profile of a host, as ``pykvm info`` shows it."""

from __future__ import annotations

from enum import Enum
from typing import Any

from rich.table import Table

from pykvm.probe import Detection, How


def plain(value: Any) -> Any:
    """A behaviour's value as JSON has it: enums by their words."""
    return value.value if isinstance(value, Enum) else value


def profile_document(detection: Detection) -> dict[str, Any]:
    """The JSON object."""
    return {
        "kind": detection.profile.name,
        "era": detection.profile.era,
        "equal": not detection.differences,
        "other_eras": list(detection.ties),
        "behaviours": [
            {
                "name": finding.behaviour,
                "value": plain(finding.value),
                "how": finding.how.value,
                "evidence": finding.evidence,
            }
            for finding in detection.findings.values()
        ],
        "differences": [
            {"name": name, "found": plain(found), "known": plain(known)}
            for name, (found, known) in detection.differences.items()
        ],
    }


def profile_summary(detection: Detection) -> str:
    """Which known host it is, or how it differs from the nearest one, in a sentence."""
    name = f"{detection.profile.name} {detection.profile.era}"
    assumed = sum(finding.how is How.ASSUMED for finding in detection.findings.values())
    found = len(detection.findings) - assumed
    if not detection.differences:
        text = f"{name}: all of {found} behaviours that were found"
    else:
        words = ", ".join(
            f"{behaviour} is {_text(value)} and not {_text(known)}"
            for behaviour, (value, known) in detection.differences.items()
        )
        text = f"nearest to {name}, but {words} ({found} behaviours were found)"
    if detection.ties:
        text += f"; {', '.join(detection.ties)} would fit as well"
    return f"{text}; {assumed} are assumed"


def _text(value: Any) -> str:
    value = plain(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def profile_table(detection: Detection) -> Table:
    """Every behaviour with its value and how it was found."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("behaviour", no_wrap=True)
    table.add_column("value", no_wrap=True)
    table.add_column("found by", no_wrap=True)
    table.add_column("evidence")
    for finding in detection.findings.values():
        style = "dim" if finding.how is How.ASSUMED else None
        if finding.behaviour in detection.differences:
            style = "yellow"
        table.add_row(
            finding.behaviour, _text(finding.value), finding.how.value, finding.evidence, style=style
        )
    return table
