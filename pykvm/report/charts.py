"""The charts of the migration page as inline SVG: a timeline of rates and a heat map of rounds.

Colours are CSS classes, so that one drawing serves light and dark.  Texts are escaped here.
"""

from __future__ import annotations

from html import escape

from pykvm.report.heat import bin_sizes, bin_width, level
from pykvm.report.migration import MigrationReport
from pykvm.report.text import bytes_text, count_text, rate_text, seconds_text

WIDTH = 960
_LEFT = 84


def _number(value: float) -> str:
    """A coordinate, short and the same on every platform."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    extra = f' class="{kind}"' if kind else ""
    return f'<text x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    shape = (
        f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}" '
        f'class="{kind}"'
    )
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return (
        f'<line x1="{_number(x1)}" y1="{_number(y1)}" x2="{_number(x2)}" y2="{_number(y2)}" class="{kind}"/>'
    )


def _svg(height: float, label: str, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {_number(height)}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def nice_steps(top: float, steps: int = 4) -> list[float]:
    """Round marks from 0 to at least ``top``: multiples of 1, 2 or 5 times a power of ten."""
    if top <= 0:
        return [0.0, 1.0]
    unit = 1e-12
    while True:
        for factor in (1.0, 2.0, 5.0):
            step = unit * factor
            if step * steps >= top:
                count = 1
                while step * count < top:
                    count += 1
                return [step * at for at in range(count + 1)]
        unit *= 10.0


def timeline(report: MigrationReport) -> str:
    """Rate on the wire over time, a block for each round: its area is the bytes that the round sent."""
    height, top, bottom = 240.0, 16.0, 200.0
    right = WIDTH - 12.0
    end = max((item.start + item.seconds for item in report.rounds), default=0.0) or 1.0
    mib = 1 << 20
    marks = nice_steps(max((item.rate for item in report.rounds), default=0.0) / mib)

    def x_of(seconds: float) -> float:
        return _LEFT + (right - _LEFT) * seconds / end

    def y_of(rate: float) -> float:
        return bottom - (bottom - top) * rate / (marks[-1] * mib)

    parts = []
    for mark in marks:
        y = y_of(mark * mib)
        parts.append(_line(_LEFT, y, right, y, "grid"))
        parts.append(_text(_LEFT - 8, y + 4, f"{mark:g}", "axis", "end"))
    parts.append(_text(0, top + 4, "MiB/s", "axis"))
    for mark in nice_steps(end, 6):
        if mark <= end:
            parts.append(_line(x_of(mark), bottom, x_of(mark), bottom + 5, "tick"))
            parts.append(
                _text(x_of(mark), bottom + 20, seconds_text(mark) if mark else "0", "axis", "middle")
            )
    for item in report.rounds:
        x, width = x_of(item.start), max(1.5, x_of(item.start + item.seconds) - x_of(item.start))
        y = y_of(item.rate)
        name = "final round, vCPUs paused" if item.final else f"round {item.number}"
        title = (
            f"{name}: {bytes_text(item.bytes)} in {seconds_text(item.seconds)}, {rate_text(item.rate)}, "
            f"{count_text(item.pages)} pages"
        )
        kind = "block final" if item.final else "block"
        parts.append(_rect(x, y, width, bottom - y, kind, title))
        if width > 16:
            parts.append(
                _text(
                    x + width / 2,
                    max(y - 4, top - 4),
                    "final" if item.final else str(item.number),
                    "label",
                    "middle",
                )
            )
    return _svg(height, "Rate on the wire over time, one block for each round", parts)


def heat_map(report: MigrationReport) -> str:
    """One row a round, guest memory from left to right: how many pages of each part were dirtied in it."""
    rows = [item for item in report.rounds if item.heat]
    if not rows:
        return ""
    bins = len(rows[0].heat)
    sizes, pages_in_bin = bin_sizes(report.pages_total, bins), bin_width(report.pages_total, bins)
    gap, row_height = 2.0, 18.0 if len(rows) <= 24 else 10.0
    width = (WIDTH - 12.0 - _LEFT) / bins
    height = len(rows) * (row_height + gap) + 28
    parts = []
    for at, item in enumerate(rows):
        y = at * (row_height + gap)
        parts.append(
            _text(
                _LEFT - 8,
                y + row_height / 2 + 4,
                "final" if item.final else f"round {item.number}",
                "axis",
                "end",
            )
        )
        parts.append(_rect(_LEFT, y, WIDTH - 12.0 - _LEFT, row_height, "h0"))
        for index, count in enumerate(item.heat):
            if not count:
                continue
            first = index * pages_in_bin
            last = first + sizes[index]
            title = (
                f"round {item.number}, {first << 12:#x} to {last << 12:#x}: "
                f"{count_text(count)} of {count_text(sizes[index])} pages"
            )
            # A hair wider than the bin, so that neighbours leave no seam between them.
            kind = f"h{level(count, sizes[index])}"
            parts.append(_rect(_LEFT + index * width, y, width + 0.3, row_height, kind, title))
    for page in report.wrong_pages[:64]:
        x = _LEFT + (WIDTH - 12.0 - _LEFT) * page / report.pages_total
        title = f"page {page:#x} differs between the two sides"
        parts.append(_rect(x - 1, 0, 2, len(rows) * (row_height + gap), "wrong", title))
    y = len(rows) * (row_height + gap) + 16
    parts.append(_text(_LEFT, y, "guest address 0", "axis"))
    parts.append(_text(WIDTH - 12.0, y, bytes_text(report.memory), "axis", "end"))
    return _svg(height, "Which parts of guest memory were dirtied in which round", parts)
