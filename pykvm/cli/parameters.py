"""Sizes, rates, durations and numbers as people write them.

Each function below makes a converter for ``click.option(type=…)``; click shows the converter's name in
--help, and adds the option's name to the BadParameter that it raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import TypeVar

import click

_T = TypeVar("_T")

_SUFFIXES = "kmgtp"
_SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*([{_SUFFIXES}]?)(?:i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|)", re.IGNORECASE)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "": 1.0}


def parse_size(text: str) -> int:
    """``256M`` as bytes; the suffixes K, M, G, T and P are powers of 1024.  Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"'{text}' is not a size; write a number with K, M, G or T, such as 256M.")
    size = Fraction(match[1]) * 1024 ** (_SUFFIXES.find(match[2].lower()) + 1 if match[2] else 0)
    if size.denominator != 1 or size > 2**62:
        raise ValueError(f"'{text}' is not a whole number of bytes up to 2^62.")
    return int(size)


def parse_duration(text: str) -> float:
    """``300ms`` as seconds; a bare number is seconds.  Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"'{text}' is not a duration; write a number with us, ms, s or m, such as 300ms.")
    return float(match[1]) * _SECONDS[match[2].lower()]


def parse_number(text: str) -> int:
    """``4096`` or ``0x1000``.  Raises ValueError."""
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(
            f"'{text}' is not a number; write it in decimal, or in hexadecimal with 0x."
        ) from None


def size_type(*, minimum: int = 0, multiple: int = 1) -> Callable[[str], int]:
    """Bytes, at least ``minimum``, a multiple of ``multiple``."""

    def size(text: str) -> int:
        value = _parsed(parse_size, text)
        if value < minimum:
            raise click.BadParameter(f"'{text}' is too small; the least size is {minimum} bytes.")
        if value % multiple:
            raise click.BadParameter(f"'{text}' is not a multiple of {multiple} bytes.")
        return value

    return size


def rate_type() -> Callable[[str], int]:
    """Bytes per second, with or without ``/s``; 0 means no limit."""

    def rate(text: str) -> int:
        return _parsed(parse_size, text.removesuffix("/s"))

    return rate


def duration_type(*, minimum: float = 0.0) -> Callable[[str], float]:
    """Seconds, at least ``minimum``."""

    def duration(text: str) -> float:
        value = _parsed(parse_duration, text)
        if value < minimum:
            raise click.BadParameter(f"'{text}' is too short; the least duration is {minimum:g} s.")
        return value

    return duration


def number_type(minimum: int = 0, maximum: int = 2**64 - 1) -> Callable[[str], int]:
    """An integer within [minimum, maximum], in decimal or hexadecimal."""

    def number(text: str) -> int:
        value = _parsed(parse_number, text)
        if not minimum <= value <= maximum:
            raise click.BadParameter(f"'{text}' is outside {minimum:#x} to {maximum:#x}.")
        return value

    return number


def _parsed(parse: Callable[[str], _T], text: str) -> _T:
    try:
        return parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
