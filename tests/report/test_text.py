"""Quantities as text."""

from __future__ import annotations

import pytest

from pykvm.report.text import bytes_text, count_text, plural, rate_text, seconds_text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (256 << 20, "256 MiB"), (1 << 50, "1024 TiB")],
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (0.0000125, "12.5 µs"),
        (0.0123, "12.3 ms"),
        (0.1, "100 ms"),
        (0.0999999, "100 ms"),
        (1.5, "1.5 s"),
        (185, "3 min 5 s"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_rates_and_counts() -> None:
    assert rate_text(1.25 * (1 << 30)) == "1.25 GiB/s"
    assert count_text(1234567) == "1,234,567"
    assert plural(1, "vCPU") == "1 vCPU"
    assert plural(2, "vCPU") == "2 vCPUs"
