"""KVM's binary statistics as a mapping (api.rst 4.133, KVM_GET_STATS_FD)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple


class StatisticType(IntEnum):
    """Bits 3:0 of a descriptor's flags."""

    CUMULATIVE = 0
    INSTANT = 1
    PEAK = 2
    LINEAR_HIST = 3
    LOG_HIST = 4


class StatisticUnit(IntEnum):
    """Bits 7:4 of a descriptor's flags."""

    NONE = 0
    BYTES = 1
    SECONDS = 2
    CYCLES = 3
    BOOLEAN = 4


class Statistic(NamedTuple):
    """One statistic: its values (one, or a histogram's buckets) and what they mean.

    The quantity is ``value * base ** exponent`` in ``unit``; ``bucket_size`` is a linear histogram's.
    """

    name: str
    values: tuple[int, ...]
    type: StatisticType | int
    unit: StatisticUnit | int
    base: int
    exponent: int
    bucket_size: int

    @property
    def value(self) -> int:
        """The single value, or the sum of a histogram's buckets."""
        return sum(self.values)


class Statistics(Mapping[str, Statistic]):
    """A snapshot, by name.  ``after - before`` gives what moved in between."""

    __slots__ = ("_by_name", "id")

    def __init__(self, id: str, statistics: Mapping[str, Statistic]) -> None:
        self.id = id
        self._by_name = dict(statistics)

    def __getitem__(self, name: str) -> Statistic:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def value(self, name: str) -> int:
        """The value of a statistic, 0 where this kernel does not have it."""
        statistic = self._by_name.get(name)
        return statistic.value if statistic else 0

    def __sub__(self, before: Statistics) -> dict[str, int]:
        """The statistics that differ, with how much they moved (instant values may go down)."""
        return {
            name: self.value(name) - before.value(name)
            for name in self
            if self.value(name) != before.value(name)
        }
