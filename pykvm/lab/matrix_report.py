"""The support matrix for readers: cells, why tests failed, what KVM offers where, and what changed between
kernels.

``report`` makes one document of plain values, which ``markdown`` here and the HTML page in pykvm.report write
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pykvm.lab.kinds import KINDS
from pykvm.lab.matrix import Saved, State, is_older, series_key
from pykvm.lab.matrix_facts import changes, facts
from pykvm.lab.results import OUTCOMES, Case, SuiteResult
from pykvm.lab.selections import SELECTIONS

CLASSES = {
    "unexplained": "Failures that nothing explains yet",
    "died": "Labs that died",
    "unfinished": "Labs without a result for every test",
    "finding": "What KVM does otherwise, as docs/kvm-findings.md has it (expected failures)",
    "emulator": "Bugs of the emulators, not of KVM (expected failures)",
    "unexpected": "Expected failures that passed",
}
"""Groups of reasons, worst first, and their headings."""

_NODEIDS = 12  # tests named in a group


def report(cells: Sequence[Saved], state: State, when: str) -> dict[str, Any]:
    """The document.  Cells of older states are in it and say so."""
    series = sorted({cell.series for cell in cells}, key=series_key)
    kinds = [name for name in KINDS if any(cell.kind == name for cell in cells)]
    ran = [cell for cell in cells if cell.result is not None]
    return {
        "when": when,
        "revision": state.revision,
        "selections": [
            {"name": item.name, "about": item.about}
            for item in SELECTIONS.values()
            if any(cell.selection == item.name for cell in ran)
        ],
        "series": series,
        "kinds": [{"name": name, "about": KINDS[name].about} for name in kinds],
        "cells": [_cell(cell, state) for cell in cells],
        "groups": groups(ran),
        "facts": facts(ran, series),
        "changes": changes(ran, series),
    }


def _cell(cell: Saved, state: State) -> dict[str, Any]:
    members: dict[str, Any] = {
        "series": cell.series,
        "release": cell.release,
        "kind": cell.kind,
        "not_offered": cell.not_offered,
        "older": cell.result is not None and cell.fingerprint != state.fingerprint,
        "revision": cell.revision,
        "when": cell.when,
        "selection": cell.selection,
    }
    result = cell.result
    if result is None:
        return members
    return members | {
        "emulator": result.emulator,
        "slug": result.slug,
        "running": result.running,
        "state": result.state,
        "problem": result.problem,
        "boots": result.boots,
        "boot_seconds": result.boot_seconds,
        "seconds": result.seconds,
        "collected": result.collected,
        "left": result.left,
        "counts": {outcome: result.count(outcome) for outcome in OUTCOMES},
    }


# --- reasons -------------------------------------------------------------------------------------


def classify(case: Case) -> str:
    """The group of a test that did not simply pass; empty for one that did, or was skipped."""
    if case.outcome == "failed":
        return "unexplained"
    if case.outcome == "died":
        return "died"
    if case.outcome == "xfailed":
        return "emulator" if case.bug else "finding"
    return "unexpected" if case.outcome == "xpassed" else ""


def groups(cells: Iterable[Saved]) -> list[dict[str, Any]]:
    """Tests by the reason why they did not pass: worst class first, the most frequent reason first."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for cell in cells:
        result = cell.result
        assert result is not None
        where = f"{cell.series} {cell.kind}"
        for case in result.cases:
            kind = classify(case)
            if kind:
                reason = case.bug or case.reason or "no reason given"
                found.setdefault((kind, reason), {}).setdefault(where, []).append(case.nodeid)
        if result.state != "finished":
            found.setdefault(("unfinished", result.problem), {}).setdefault(where, [])
    order = list(CLASSES)

    def weight(item: tuple[tuple[str, str], dict[str, list[str]]]) -> tuple[int, int, str]:
        (kind, reason), places = item
        return order.index(kind), -sum(map(len, places.values())), reason

    return [
        {
            "class": kind,
            "reason": reason,
            "count": sum(map(len, places.values())),
            "where": list(places),
            "tests": list(dict.fromkeys(nodeid for nodeids in places.values() for nodeid in nodeids)),
        }
        for (kind, reason), places in sorted(found.items(), key=weight)
    ]


# --- markdown ------------------------------------------------------------------------------------


def text_of(cell: Mapping[str, Any] | None) -> str:
    """A cell of the main table in a few words: what passed of what, and what did not."""
    if cell is None:
        return "not run"
    if cell["not_offered"]:
        return "not offered"
    counts = cell["counts"]
    judged = sum(counts.values()) - counts["skipped"]
    text = f"{counts['passed']} of {judged}" if judged else f"no result ({cell['state']})"
    text = f"{cell['selection']}: {text}"
    rest = [f"{counts[name]} {name}" for name in OUTCOMES[1:] if counts[name]]
    if cell["left"]:
        rest.append(f"{cell['left']} not run")
    text += f" ({', '.join(rest)})" if rest else ""
    return f"{text}, older" if cell["older"] else text


def escaped(text: str) -> str:
    """Text for a cell of a markdown table: one line, without what markdown would read."""
    for letter in "\\*_`<>[]":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.replace("|", "&#124;").split())


def code(text: str) -> str:
    """Text as code, in a table too: there a bar is escaped, and a backslash before it would undo that."""
    text = text.replace("`", "'").replace("\\|", "\\ |").replace("|", "\\|")
    return "`" + " ".join(text.split()) + "`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table; the cells are markdown already."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in rows] + [""]


def markdown(document: Mapping[str, Any]) -> str:
    """The document as the page docs/support-matrix.md."""
    cells = {(cell["series"], cell["kind"]): cell for cell in document["cells"]}
    series = document["series"]
    lines = [
        "# Support matrix",
        "",
        "What the real-KVM tests of this checkout said on KVM hosts of several kinds, each a Debian kernel "
        "in a [lab](labs.md). Written by `pykvm lab matrix`; not to be edited by hand.",
        "",
        f"State of the checkout: {code(document['revision'] or 'unknown')}, {document['when']}. "
        "The tests are those of the widest selection that was run:",
        "",
        *(f"* `{item['name']}`: {item['about']}." for item in document["selections"]),
        "",
        "A cell says how many of the tests passed that ran and were not skipped, and what the others did: "
        "`xfailed` is a failure with a known reason, `died` a test that ended its lab. `older` is a result "
        "for an earlier state of the checkout.",
        "",
    ]
    lines += table(
        ["KVM", *(f"Linux {name}" for name in series)],
        (
            [
                f"{code(kind['name'])}: {escaped(kind['about'])}",
                *(escaped(text_of(cells.get((name, kind["name"])))) for name in series),
            ]
            for kind in document["kinds"]
        ),
    )
    if not document["cells"]:
        return "\n".join([*lines, "No cell has been run yet.", ""])
    lines += ["## Reasons", ""]
    lines += _reasons(document["groups"])
    lines += ["## What KVM offers", ""]
    lines += _facts(document["facts"])
    lines += ["## What changed between kernels", ""]
    lines += _changes(document["changes"])
    lines += ["## Labs", ""]
    lines += _labs(document["cells"])
    return "\n".join(lines)


def _reasons(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return ["Every test passed or was skipped.", ""]
    lines = []
    for name, heading in CLASSES.items():
        rows = [
            [
                escaped(group["reason"]),
                str(group["count"]) if group["tests"] else "",
                escaped(", ".join(group["where"])),
                _tests(group["tests"]),
            ]
            for group in found
            if group["class"] == name
        ]
        if rows:
            lines += [f"### {heading}", "", *table(["reason", "times", "where", "tests"], rows)]
    return lines


def _tests(nodeids: Sequence[str]) -> str:
    short = list(dict.fromkeys(nodeid.rpartition("::")[2].partition("[")[0] for nodeid in nodeids))
    more = f" and {len(short) - _NODEIDS} more" if len(short) > _NODEIDS else ""
    return ", ".join(code(name) for name in short[:_NODEIDS]) + more


def _facts(document: Mapping[str, Any]) -> list[str]:
    if not document["differ"] and not document["same"]:
        return ["No lab said what it offers.", ""]
    lines = ["From `pykvm info` in the same boots.", ""]
    series = document["series"]
    if document["differ"]:
        rows = [
            [_named(row["name"]), *(escaped(row["values"].get(name, "")) for name in series)]
            for row in document["differ"]
        ]
        lines += table(["", *(f"Linux {name}" for name in series)], rows)
    if document["same"]:
        rows = [[_named(row["name"]), escaped(row["value"])] for row in document["same"]]
        lines += ["The same in every lab:", "", *table(["", "value"], rows)]
    return lines


def _named(name: str) -> str:
    """Names of capabilities and parameters as code, phrases as text."""
    return escaped(name) if " " in name else code(name)


def _changes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return ["Nothing that the labs could see, or there was only one kernel.", ""]
    rows = [
        [
            f"{item['from']} to {item['to']}",
            ", ".join(code(kind) for kind in item["kinds"]),
            escaped(item["what"]),
            ", ".join(code(name) for name in item["names"]),
        ]
        for item in found
    ]
    return table(["Linux", "KVM", "what", "names"], rows)


def _labs(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            escaped(cell["release"]),
            code(cell["kind"]),
            *(
                [escaped(f"not offered: {cell['not_offered']}"), "", "", "", ""]
                if cell["not_offered"]
                else [
                    escaped(cell["emulator"] or "unknown"),
                    code(cell["selection"]),
                    f"{cell['boot_seconds']:.0f} s" if cell["boot_seconds"] else "",
                    f"{cell['seconds']:.0f} s",
                    escaped(f"{cell['when']}, {cell['revision']}".rstrip(", ")),
                ]
            ),
        ]
        for cell in cells
    ]
    head = ["kernel", "KVM", "emulator", "selection", "boot", "whole run", "when, revision"]
    return table(head, rows)


def problems(cells: Iterable[Saved], state: State) -> tuple[list[SuiteResult], int]:
    """Results of the current state that are not all well, and how many cells are older."""
    bad = []
    older = 0
    for cell in cells:
        if cell.result is None:
            continue
        if is_older(cell, state, cell.release):
            older += 1
        elif not cell.complete:
            bad.append(cell.result)
    return bad, older
