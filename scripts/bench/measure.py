"""Paired measurements: both sides in turns within one run, so that a ratio survives a noisy machine."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

Sample = Callable[[], float]
"""Makes one measurement and returns nanoseconds; preparing the ground is its own, unmeasured business."""


@dataclass(frozen=True)
class Effort:
    """How much of everything: rounds of an item are its own number times ``rounds``."""

    quick: bool

    def rounds(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``value`` is the median over the rounds of what is held against ``target`` (a ratio unless ``unit`` says
    otherwise), ``low`` and ``high`` its quartiles.  ``ours`` and ``yardstick`` are medians in nanoseconds
    per ``per``.  ``better`` says which side of the target is good; None where nothing was promised.
    """

    item: str
    name: str
    value: float
    low: float
    high: float
    ours: float
    yardstick: float
    rounds: int
    per: str = ""
    unit: str = "ratio"
    target: float | None = None
    better: str = "lower"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


def paired(rounds: int, ours: Sample, yardstick: Sample, warm_up: int = 1) -> list[tuple[float, float]]:
    """(ours, yardstick) of each round; who goes first alternates, since the first one finds colder caches."""
    pairs = []
    for number in range(-warm_up, rounds):
        if number % 2:
            mine = ours()
            theirs = yardstick()
        else:
            theirs = yardstick()
            mine = ours()
        if number >= 0:
            pairs.append((mine, theirs))
    return pairs


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio_row(
    item: str, name: str, pairs: list[tuple[float, float]], *, count: float = 1, **rest: Any
) -> Row:
    """A row of ours/yardstick ratios, taken per round; times are divided by ``count``."""
    low, middle, high = quartiles([mine / theirs for mine, theirs in pairs])
    return Row(
        item=item,
        name=name,
        value=middle,
        low=low,
        high=high,
        ours=statistics.median(mine for mine, _ in pairs) / count,
        yardstick=statistics.median(theirs for _, theirs in pairs) / count,
        rounds=len(pairs),
        **rest,
    )


def timed(function: Callable[[], object]) -> float:
    """Nanoseconds that one call takes."""
    start = perf_counter_ns()
    function()
    return perf_counter_ns() - start


@contextmanager
def quiet() -> Iterator[None]:
    """This thread on one CPU, and no garbage collection, while something is measured."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        if collecting:
            gc.enable()
