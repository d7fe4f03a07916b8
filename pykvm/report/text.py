"""Quantities as people read them: binary units and three digits."""

from __future__ import annotations


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def bytes_text(count: float) -> str:
    """``268435456`` as ``256 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{_three_digits(count)} {unit}"
        count /= 1024
    raise AssertionError


def rate_text(bytes_per_second: float) -> str:
    """Bytes per second, ``1.25 GiB/s``."""
    return f"{bytes_text(bytes_per_second)}/s"


def seconds_text(seconds: float) -> str:
    """``0.0123`` as ``12.3 ms``."""
    if seconds < 0.001:
        return f"{_three_digits(seconds * 1e6)} µs"
    if seconds < 1:
        return f"{_three_digits(seconds * 1e3)} ms"
    if seconds < 120:
        return f"{_three_digits(seconds)} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def count_text(count: int) -> str:
    """``1234567`` as ``1,234,567``."""
    return f"{count:,}"


def plural(count: int, noun: str) -> str:
    """``2 vCPUs``."""
    return f"{count_text(count)} {noun}{'' if count == 1 else 's'}"
