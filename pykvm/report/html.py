"""A migration as one self-contained HTML page: no script, no font and no image from anywhere else.

The same report always gives the same bytes.
"""

from __future__ import annotations

from html import escape

from pykvm.report.charts import heat_map, timeline
from pykvm.report.heat import LEVELS
from pykvm.report.migration import MigrationReport, Round
from pykvm.report.text import bytes_text, count_text, plural, rate_text, seconds_text

_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #5b6572; --rule: #dfe3e8;
  --block: #3b6fb6; --final: #d9822b;
  --good: #18794e; --good-soft: #e2f3ea; --bad: #b42318; --bad-soft: #fdeae7;
  --h0: #eef0f3; --h1: #d3e2f4; --h2: #a9c8ea; --h3: #74a6da; --h4: #4381c4; --h5: #245b9c; --h6: #0f3568; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --card: #1c2026; --ink: #e6e9ed; --soft: #9aa4b1; --rule: #323a44;
  --block: #5b94de; --final: #e89a4d;
  --good: #5fd09a; --good-soft: #173527; --bad: #ff8f81; --bad-soft: #43201c;
  --h0: #262c34; --h1: #1d3a5c; --h2: #24558a; --h3: #3373b5; --h4: #5596d8; --h5: #8cbcec; --h6: #d2e6fb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 24px; margin: 0; font-weight: 650; }
h2 { font-size: 16px; margin: 0 0 4px; font-weight: 650; }
header { display: flex; flex-wrap: wrap; gap: 6px 16px; align-items: center; margin-bottom: 20px; }
header p { flex-basis: 100%; margin: 0; color: var(--soft); }
.verdict { font-weight: 650; padding: 3px 12px; border-radius: 999px; }
.good { color: var(--good); background: var(--good-soft); }
.bad { color: var(--bad); background: var(--bad-soft); }
.problem { border-left: 4px solid var(--bad); background: var(--bad-soft); padding: 10px 14px;
  margin: 0 0 20px; border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 12px; margin-bottom: 16px; }
section, .tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 21px; font-weight: 650; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile span, .note { color: var(--soft); font-size: 13px; }
.note { margin: 0 0 14px; }
section { padding: 18px 20px; margin-bottom: 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: 13px; }
tbody tr:last-child td { border-bottom: 0; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { text-align: left; padding-right: 0; width: 26%; }
.bar { height: 10px; border-radius: 3px; background: var(--block); min-width: 1px; }
.final .bar { background: var(--final); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
svg { display: block; width: 100%; min-width: 640px; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.axis { fill: var(--soft); } .label { fill: var(--ink); }
.grid { stroke: var(--rule); } .tick { stroke: var(--soft); }
.wrong { fill: var(--bad); }
.block { fill: var(--block); stroke: var(--card); } .block.final { fill: var(--final); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 8px;
  font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 14px; border-radius: 3px;
  margin-right: 6px; vertical-align: -2px; }
""" + "".join(f".h{n} {{ fill: var(--h{n}); }} i.h{n} {{ background: var(--h{n}); }}\n" for n in range(7))


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
        f"<style>{_STYLE}</style></head><body><main>"
        f"<header><h1>Live migration</h1>{verdict}<p>{escape(guest)}</p></header>"
        f'{problem}<div class="tiles">{tiles}</div>'
        f"<section><h2>Rounds</h2>{remark}{_rounds(report)}</section>"
        '<section><h2>Rate over time</h2><p class="note">The area of a block is what the round '
        f"sent; the final round, with paused vCPUs, stands out.</p>{timeline(report)}</section>"
        f"{heat_section if heat else ''}"
        f"<section><h2>Proof and parameters</h2>{_facts(report)}</section>"
        "</main></body></html>\n"
    )
