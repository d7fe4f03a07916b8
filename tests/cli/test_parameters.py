"""Sizes, rates, durations and numbers, and the sentences that refuse them."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.cli.parameters import (
    duration_type,
    number_type,
    parse_duration,
    parse_number,
    parse_size,
    rate_type,
    size_type,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4k", 4096),
        ("1.5M", 3 << 19),
        ("256M", 256 << 20),
        ("256MiB", 256 << 20),
        ("2 GB", 2 << 30),
        ("1T", 1 << 40),
        ("0.0009765625k", 1),
        ("9007199254740993", 9007199254740993),  # 2^53 + 1: floats cannot hold it
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 2**40), st.sampled_from(["", "K", "M", "k", "m"]))
def test_whole_sizes_are_exact(number: int, suffix: str) -> None:
    factor = {"": 1, "k": 1024, "m": 1024**2}[suffix.lower()]
    assert parse_size(f"{number}{suffix}") == number * factor


@pytest.mark.parametrize("text", ["", "M", "-1", "1.0000001k", "12Q", "1e6", "0x10", "99999999T", "1 2", "½"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a .*\.$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2", 2.0), ("1.5s", 1.5), ("300ms", 0.3), ("20us", 20e-6), ("2m", 120.0), ("0", 0.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "-1s", "1h", "inf", "nan", "1 s 2"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_numbers() -> None:
    assert parse_number("0x3f8") == 0x3F8
    assert parse_number("42") == 42
    with pytest.raises(ValueError, match="is not a number"):
        parse_number("four")


@pytest.mark.parametrize(
    ("convert", "text", "complaint"),
    [
        (size_type(minimum=4096), "1k", "too small"),
        (size_type(multiple=4096), "5000", "not a multiple of 4096"),
        (rate_type(), "fast", "is not a size"),
        (duration_type(minimum=0.001), "1us", "too short"),
        (number_type(0, 0xFFFF), "0x10000", "outside 0x0 to 0xffff"),
        (number_type(0, 0xFFFF), "-1", "outside"),
    ],
)
def test_values_out_of_range(convert: object, text: str, complaint: str) -> None:
    assert callable(convert)
    with pytest.raises(click.BadParameter, match=complaint):
        convert(text)


def test_rates_take_a_per_second() -> None:
    assert rate_type()("100M/s") == rate_type()("100M") == 100 << 20
