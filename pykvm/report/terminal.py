"""Reports in a terminal: tables and heat maps for rich."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from pykvm.report.heat import bin_sizes, coarser, level
from pykvm.report.migration import MigrationReport, Round
from pykvm.report.text import bytes_text, count_text, plural, rate_text, seconds_text

# One mark and one colour for each level; the marks alone tell the levels apart without colours.
_MARKS = "·▁▂▄▆█▉"
HEAT_COLUMNS = 32
_STYLES = ("dim", "blue", "cyan", "green", "yellow", "red", "bold red")


def heat_text(counts: tuple[int, ...], sizes: tuple[int, ...]) -> Text:
    """A row of marks, one for each part of memory: how many of its pages (``sizes``) are in ``counts``."""
    text = Text(no_wrap=True)
    for count, size in zip(counts, sizes, strict=True):
        at = level(count, size)
        text.append(_MARKS[at], style=_STYLES[at])
    return text


def _heat(report: MigrationReport, item: Round) -> Text:
    sizes = bin_sizes(report.pages_total, max(1, len(item.heat)))
    return heat_text(coarser(item.heat, HEAT_COLUMNS), coarser(sizes, HEAT_COLUMNS)) if item.heat else Text()


def rounds_table(report: MigrationReport) -> Table:
    """The rounds, one a row, with a heat map of what was dirtied meanwhile."""
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for name in ("round", "pages", "zero", "sent", "time", "rate", "dirtied"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True)
    for item in report.rounds:
        table.add_row(
            "final" if item.final else str(item.number),
            count_text(item.pages),
            count_text(item.zero_pages),
            bytes_text(item.bytes),
            seconds_text(item.seconds),
            rate_text(item.rate),
            "" if item.final else count_text(item.pages_dirtied),
            Text() if item.final else _heat(report, item),
        )
    return table


def summary_table(report: MigrationReport) -> Table:
    """The outcome in a few lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    verdict = Text("verified", style="bold green") if report.verified else Text("FAILED", style="bold red")
    if report.problem:
        verdict.append(f": {report.problem}", style="not bold")
    table.add_row("verdict", verdict)
    table.add_row(
        "guest",
        f"{report.workload}, {bytes_text(report.memory)}, {plural(report.vcpus, 'vCPU')}, "
        f"tracker {report.tracker}, backend {report.backend}, {report.transport}",
    )
    if report.downtime_seconds is not None:
        table.add_row("downtime", seconds_text(report.downtime_seconds))
    if report.remark:
        table.add_row("", report.remark)
    total = f"{seconds_text(report.total_seconds)} in {plural(len(report.rounds), 'round')}"
    if report.digest_seconds is not None:
        total += f", of these {seconds_text(report.digest_seconds)} for the digests"
    table.add_row("total", total)
    table.add_row("sent", f"{bytes_text(report.bytes_sent)} at {rate_text(report.throughput)}")
    table.add_row(
        "digests",
        f"{report.digest_source[:16] or 'none'} at the source, "
        f"{report.digest_destination[:16] or 'none'} at the destination, "
        f"{count_text(report.pages_total)} pages",
    )
    table.add_row(
        "guest checks",
        f"{count_text(report.guest_checks)} at the destination, "
        f"{plural(report.guest_corruptions, 'corruption')}",
    )
    return table
