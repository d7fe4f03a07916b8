"""When to stop copying a running guest: limits and the estimate behind the decision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pykvm.errors import UsageError
from pykvm.memory import PAGE_SIZE
from pykvm.migrate.wire import DIGESTS_PER_FRAME, FRAME_PAGES, RECORD_SIZE

DEFAULT_DOWNTIME_LIMIT = 0.3
DEFAULT_MAX_ROUNDS = 30
_MEASURABLE = 1 << 20
"""A round of fewer bytes says more about its fixed costs than about the rate."""
_FRAME_SECONDS = 0.05


class Decision(Enum):
    """What to do after a round."""

    CONTINUE = "continue"
    CONVERGED = "converged"  # what is left fits the downtime limit
    EXHAUSTED = "exhausted"  # it does not, and no round is left


@dataclass(frozen=True)
class Policy:
    """The limits of a migration.

    ``bandwidth``: bytes per second on the wire, or None for no limit; it holds for the last round, too.
    ``downtime_limit``: seconds that the last round may be estimated to take.  ``max_rounds``: rounds with the
    guest running, after which it is paused however much is left.  Raises UsageError.
    """

    bandwidth: int | None = None
    downtime_limit: float = DEFAULT_DOWNTIME_LIMIT
    max_rounds: int = DEFAULT_MAX_ROUNDS

    def __post_init__(self) -> None:
        if self.bandwidth is not None and self.bandwidth < PAGE_SIZE:
            raise UsageError(f"A bandwidth of {self.bandwidth} bytes/s: it must be at least {PAGE_SIZE}.")
        if not 0 <= self.downtime_limit <= 86400:
            raise UsageError(
                f"A downtime limit of {self.downtime_limit} s: it must be 0 or more, up to a day."
            )
        if not 1 <= self.max_rounds <= 100_000:
            raise UsageError(f"{self.max_rounds} rounds: it must be at least 1.")

    @property
    def frame_pages(self) -> int:
        """Pages per frame: what 50 ms of the bandwidth hold, so that the limit is kept smoothly."""
        if self.bandwidth is None:
            return FRAME_PAGES
        return max(1, min(FRAME_PAGES, int(self.bandwidth * _FRAME_SECONDS) // PAGE_SIZE))

    @property
    def digests_per_frame(self) -> int:
        """Likewise for digests: the wait after one large frame could exceed the destination's time-out."""
        if self.bandwidth is None:
            return DIGESTS_PER_FRAME
        return max(1, min(DIGESTS_PER_FRAME, int(self.bandwidth * _FRAME_SECONDS) // RECORD_SIZE))

    def decide(self, rounds: int, dirty_bytes: int, rate: float) -> Decision:
        """After ``rounds`` rounds, with ``dirty_bytes`` left and ``rate`` bytes a second measured."""
        if dirty_bytes <= self.downtime_limit * rate:
            return Decision.CONVERGED
        return Decision.EXHAUSTED if rounds >= self.max_rounds else Decision.CONTINUE


class RateMeter:
    """Bytes a second as measured by the rounds so far: the last one that was large enough to tell."""

    def __init__(self) -> None:
        self.rate = 0.0
        self._bytes = 0
        self._seconds = 0.0

    def add(self, size: int, seconds: float) -> None:
        self._bytes += size
        self._seconds += seconds
        if size >= _MEASURABLE and seconds > 0:
            self.rate = size / seconds
        elif self._bytes < _MEASURABLE and self._seconds > 0:
            self.rate = self._bytes / self._seconds
