"""A bandwidth limit as a token bucket."""

from __future__ import annotations

import time
from collections.abc import Callable

BURST_SECONDS = 0.05


class TokenBucket:
    """Lets ``rate`` bytes a second pass, with bursts of what 50 ms allow.

    A sender calls ``take`` after each piece: it may overdraw the bucket and then waits until the debt is
    paid, so pieces of any size pass and the average holds.
    """

    def __init__(
        self,
        rate: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.rate = rate
        self._clock = clock
        self._sleep = sleep
        self._depth = rate * BURST_SECONDS
        self._level = self._depth
        self._then = clock()

    def take(self, size: int) -> None:
        """Account for ``size`` bytes and wait for as long as the bucket is overdrawn."""
        now = self._clock()
        self._level = min(self._depth, self._level + (now - self._then) * self.rate) - size
        self._then = now
        if self._level < 0:
            self._sleep(-self._level / self.rate)
