"""The results as a table for people and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from measure import Row

HEADERS = ("what", "value", "quartiles", "target", "", "pykvm", "yardstick", "per", "rounds")


def amount(row: Row, value: float) -> str:
    """A median with its unit: nanoseconds in a readable size, or bytes."""
    if row.per == "bytes":
        return f"{value / (1 << 20):.1f} MiB"
    for limit, divisor, unit in ((1e3, 1, "ns"), (1e6, 1e3, "µs"), (1e9, 1e6, "ms")):
        if value < limit:
            return f"{value / divisor:.3g} {unit}"
    return f"{value / 1e9:.3g} s"


def cells(row: Row) -> tuple[str, ...]:
    unit = "x" if row.unit == "ratio" else f" {row.unit}"
    sign = "<=" if row.better == "lower" else ">="
    return (
        row.name,
        f"{row.value:.2f}{unit}",
        f"{row.low:.2f} - {row.high:.2f}",
        "" if row.target is None else f"{sign} {row.target:g}",
        {None: "", True: "met", False: "MISSED"}[row.met],
        amount(row, row.ours),
        amount(row, row.yardstick),
        "" if row.per == "bytes" else row.per,
        str(row.rounds),
    )


def render(rows: Sequence[Row]) -> str:
    """A table in columns: medians over the rounds of the ratios taken in each round."""
    lines = [HEADERS, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADERS))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def document(rows: Sequence[Row], *, quick: bool, seconds: float) -> dict[str, Any]:
    """The JSON object; its keys are documented in docs/benchmarks.md."""
    return {
        "quick": quick,
        "seconds": seconds,
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load": list(os.getloadavg()),
        "rows": [asdict(row) | {"met": row.met} for row in rows],
    }
