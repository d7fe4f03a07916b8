"""A migration as one self-contained HTML page: no script, no font and no image from anywhere else.

The same report always gives the same bytes.
"""

from __future__ import annotations

from html import escape

from pykvm.report.charts import heat_map, timeline
from pykvm.report.heat import LEVELS
from pykvm.report.migration import MigrationReport, Round
from pykvm.report.style import STYLE
from pykvm.report.text import bytes_text, count_text, plural, rate_text, seconds_text


def _seconds(seconds: float | None) -> str:
    return "none" if seconds is None else seconds_text(seconds)


def _tile(value: str, name: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _row(item: Round, most: int) -> str:
    name = "final, vCPUs paused" if item.final else f"{item.number}"
    cells = (
        name,
        count_text(item.pages),
        count_text(item.zero_pages),
        bytes_text(item.bytes),
        seconds_text(item.seconds),
        rate_text(item.rate),
        "" if item.final else count_text(item.pages_dirtied),
    )
    bar = f'<div class="bar" style="width:{100 * item.bytes / most if most else 0:.1f}%"></div>'
    kind = ' class="final"' if item.final else ""
    return f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + f"<td>{bar}</td></tr>"


def _rounds(report: MigrationReport) -> str:
    most = max((item.bytes for item in report.rounds), default=0)
    names = ("Round", "Pages", "of these zero", "Sent", "Time", "Rate", "Dirtied meanwhile", "Share of bytes")
    return (
        "<table><thead><tr>"
        + "".join(f"<th>{name}</th>" for name in names)
        + "</tr></thead><tbody>"
        + "".join(_row(item, most) for item in report.rounds)
        + "</tbody></table>"
    )


def _legend() -> str:
    names = ["no page", "some"]
    names += [f"over {threshold:.0%}" for threshold in LEVELS[1:]]
    return (
        '<div class="legend">'
        + "".join(f'<span><i class="h{n}"></i>{name}</span>' for n, name in enumerate(names))
        + "</div>"
    )


def _facts(report: MigrationReport) -> str:
    facts = {
        "Digest of all pages, source": report.digest_source or "none",
        "Digest of all pages, destination": report.digest_destination or "none",
        "Checks by the guest at the destination": count_text(report.guest_checks),
        "Corruptions it found": count_text(report.guest_corruptions),
    }
    if report.wrong_pages:
        facts["Pages that differ"] = ", ".join(f"{page:#x}" for page in report.wrong_pages[:64])
    facts |= report.parameters
    return (
        "<dl>"
        + "".join(
            f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>" for name, value in facts.items()
        )
        + "</dl>"
    )


def migration_page(report: MigrationReport) -> str:
    """The whole page as text."""
    verdict = (
        '<span class="verdict good">✓ verified</span>'
        if report.verified
        else '<span class="verdict bad">✗ failed</span>'
    )
    guest = (
        f"{report.workload}, {bytes_text(report.memory)}, {plural(report.vcpus, 'vCPU')}; "
        f"dirty pages by {report.tracker}, {report.transport} socket, backend {report.backend}"
    )
    problem = ""
    if report.problem:
        problem = f'<p class="problem">{escape(report.problem)}</p>'
    remark = f'<p class="note">{escape(report.remark)}</p>' if report.remark else ""
    tiles = (
        _tile(_seconds(report.downtime_seconds), "downtime")
        + _tile(seconds_text(report.total_seconds), "total time")
        + _tile(str(len(report.rounds)), "rounds")
        + _tile(bytes_text(report.bytes_sent), "sent")
        + _tile(rate_text(report.throughput), "throughput")
        + _tile(_seconds(report.digest_seconds), "digests, not in the downtime")
    )
    heat = heat_map(report)
    heat_section = (
        "<section><h2>Where the guest wrote</h2>"
        '<p class="note">Each row is a round, guest memory runs from left to right; a colour says how many '
        "of the pages there the guest dirtied while the round was being sent. They are what the next round "
        "sends again.</p>"
        f"{heat}{_legend()}</section>"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pykvm migration: {'verified' if report.verified else 'failed'}</title>"
        f"<style>{STYLE}</style></head><body><main>"
        f"<header><h1>Live migration</h1>{verdict}<p>{escape(guest)}</p></header>"
        f'{problem}<div class="tiles">{tiles}</div>'
        f"<section><h2>Rounds</h2>{remark}{_rounds(report)}</section>"
        '<section><h2>Rate over time</h2><p class="note">The area of a block is what the round '
        f"sent; the final round, with paused vCPUs, stands out.</p>{timeline(report)}</section>"
        f"{heat_section if heat else ''}"
        f"<section><h2>Proof and parameters</h2>{_facts(report)}</section>"
        "</main></body></html>\n"
    )
