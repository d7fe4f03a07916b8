"""The support matrix as one self-contained HTML page, from the document that ``pykvm lab matrix`` makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pykvm.report.style import STYLE
from pykvm.report.text import plural, seconds_text

_STYLE = """
table.matrix th, table.matrix td { text-align: left; vertical-align: top; white-space: normal; }
table.matrix td:last-child, table.matrix th:last-child { width: auto; }
table.matrix b { display: block; font-weight: 650; }
table.matrix small { color: var(--soft); display: block; }
.cell-good { color: var(--good); } .cell-bad { color: var(--bad); } .cell-none { color: var(--soft); }
h3 { font-size: 14px; margin: 16px 0 4px; font-weight: 650; }
details summary { cursor: pointer; color: var(--soft); }
"""

_HEADINGS = {
    "unexplained": "Failures that nothing explains yet",
    "died": "Labs that died",
    "unfinished": "Labs without a result for every test",
    "finding": "What KVM does otherwise (expected failures)",
    "emulator": "Bugs of the emulators, not of KVM (expected failures)",
    "unexpected": "Expected failures that passed",
}


def matrix_page(document: Mapping[str, Any]) -> str:
    """The whole page as text; the same document always gives the same bytes."""
    cells = {(cell["series"], cell["kind"]): cell for cell in document["cells"]}
    ran = [cell for cell in document["cells"] if not cell["not_offered"]]
    tests = sum(sum(cell["counts"].values()) for cell in ran)
    bad = sum(cell["counts"]["failed"] + cell["counts"]["died"] for cell in ran)
    verdict = (
        f'<span class="verdict bad">{plural(bad, "test")} failed</span>'
        if bad
        else '<span class="verdict good">no unexplained failure</span>'
    )
    about = (
        f"{plural(len(ran), 'lab')}, {plural(tests, 'test')}. "
        + "".join(f"Selection {item['name']}: {item['about']}. " for item in document["selections"])
        + f"State {document['revision'] or 'unknown'}, {document['when']}."
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pykvm support matrix</title><style>{STYLE}{_STYLE}</style></head><body><main>"
        f"<header><h1>Support matrix</h1>{verdict if ran else ''}<p>{escape(about)}</p></header>"
        f"<section><h2>Kernels and kinds of KVM</h2>{_overview(document, cells)}</section>"
        f"<section><h2>Reasons</h2>{_reasons(document['groups'])}</section>"
        f"<section><h2>What KVM offers</h2>{_facts(document['facts'])}</section>"
        f"<section><h2>What changed between kernels</h2>{_changes(document['changes'])}</section>"
        "</main></body></html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already, headings are text."""
    return (
        '<table class="matrix"><thead><tr>'
        + "".join(f"<th>{escape(name)}</th>" for name in head)
        + "</tr></thead><tbody>"
        + "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        + "</tbody></table>"
    )


def _overview(document: Mapping[str, Any], cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    rows = [
        [
            f"<b>{escape(kind['name'])}</b><small>{escape(kind['about'])}</small>",
            *(_cell(cells.get((series, kind["name"]))) for series in document["series"]),
        ]
        for kind in document["kinds"]
    ]
    return _table(["KVM", *(f"Linux {series}" for series in document["series"])], rows)


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return '<span class="cell-none">not run</span>'
    if cell["not_offered"]:
        return f'<span class="cell-none">not offered<small>{escape(cell["not_offered"])}</small></span>'
    counts = cell["counts"]
    judged = sum(counts.values()) - counts["skipped"]
    good = not counts["failed"] and not counts["died"] and cell["state"] == "finished"
    rest = [f"{count} {name}" for name, count in counts.items() if count and name != "passed"]
    if cell["left"]:
        rest.append(f"{cell['left']} not run")
    boot = f"boot {seconds_text(cell['boot_seconds'])}, " if cell["boot_seconds"] else ""
    lines = [
        ", ".join(rest),
        cell["emulator"],
        f"{boot}run {seconds_text(cell['seconds'])}",
        f"older: {cell['revision'] or 'another state'}, {cell['when']}" if cell["older"] else "",
    ]
    small = "".join(f"<small>{escape(line)}</small>" for line in lines if line)
    return f'<b class="cell-{"good" if good else "bad"}">{counts["passed"]} of {judged}</b>{small}'


def _reasons(groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return '<p class="note">Every test passed or was skipped.</p>'
    parts = []
    for name, heading in _HEADINGS.items():
        rows = [
            [
                escape(group["reason"]),
                str(group["count"]) if group["tests"] else "",
                escape(", ".join(group["where"])),
                _tests(group["tests"]),
            ]
            for group in groups
            if group["class"] == name
        ]
        if rows:
            parts.append(f"<h3>{escape(heading)}</h3>{_table(['reason', 'times', 'where', 'tests'], rows)}")
    return "".join(parts)


def _tests(nodeids: Sequence[str]) -> str:
    if not nodeids:
        return ""
    lines = "<br>".join(f"<code>{escape(nodeid)}</code>" for nodeid in nodeids)
    return f"<details><summary>{plural(len(nodeids), 'test')}</summary>{lines}</details>"


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts["same"] and not facts["differ"]:
        return '<p class="note">No lab said what it offers.</p>'
    series = facts["series"]
    differ = [
        [escape(row["name"]), *(escape(row["values"].get(name, "")) for name in series)]
        for row in facts["differ"]
    ]
    same = [[escape(row["name"]), escape(row["value"])] for row in facts["same"]]
    parts = ['<p class="note">From pykvm info in the same boots.</p>']
    if differ:
        parts.append(_table(["", *(f"Linux {name}" for name in series)], differ))
    if same:
        parts.append(f"<h3>The same in every lab</h3>{_table(['', 'value'], same)}")
    return "".join(parts)


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    if not changes:
        return '<p class="note">Nothing that the labs could see, or there was only one kernel.</p>'
    rows = [
        [
            escape(f"{item['from']} to {item['to']}"),
            escape(", ".join(item["kinds"])),
            escape(item["what"]),
            ", ".join(f"<code>{escape(name)}</code>" for name in item["names"]),
        ]
        for item in changes
    ]
    return _table(["Linux", "KVM", "what", "names"], rows)
