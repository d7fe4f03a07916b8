"""What a migration tells while it runs and at its end, as plain values with ``to_json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from pykvm.errors import GuestCorruptionError, GuestError
from pykvm.migrate.messages import Corruption
from pykvm.migrate.wire import Pages

HEAT_BUCKETS = 256


class Phase(Enum):
    """The stages that both sides go through, in this order."""

    CONNECT = "connect"
    COPY = "copy"
    PAUSE = "pause"
    VERIFY = "verify"
    STATE = "state"
    HANDOVER = "handover"
    CHECK = "check"
    DONE = "done"


@dataclass(frozen=True)
class Progress:
    """How far a side is; sent to the ``progress`` callback when the phase changes and ten times a second.

    ``pages_done`` of ``pages_total`` in this round (0: not known); ``rate`` in bytes per second;
    ``estimate``: seconds until this round is through, None while nothing was measured.  ``completed``: the
    round that just ended at the source; so its figures are known even if a later one fails.
    """

    phase: Phase
    round: int = 0
    pages_done: int = 0
    pages_total: int = 0
    bytes_total: int = 0
    rate: float = 0.0
    estimate: float | None = None
    completed: RoundResult | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"phase": self.phase.value}


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class RoundResult:
    """One round: what was sent, and what the guest dirtied meanwhile.

    ``pages`` had contents, ``zero_pages`` had become zero; ``bytes`` went over the wire in ``seconds``;
    ``pages_dirtied`` while it ran (0 in the final round, when the guest is paused); ``heat`` counts these per
    bucket, the memory being divided into ``len(heat)`` equal parts.
    """

    number: int
    final: bool
    pages: int
    zero_pages: int
    bytes: int
    seconds: float
    pages_dirtied: int
    heat: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"heat": list(self.heat)}


def heat_of(pages: Pages, pages_total: int) -> tuple[int, ...]:
    """Pages per bucket; at most 256 buckets, never more than pages."""
    buckets = min(HEAT_BUCKETS, pages_total)
    width = -(-pages_total // buckets)
    counts = np.bincount((pages // np.uint64(width)).astype(np.int64), minlength=-(-pages_total // width))
    return tuple(counts.tolist())


@dataclass(frozen=True)
class GuestChecks:
    """What the guest's own checks found at the destination; ``failure`` says why it stopped, if it did."""

    checks: int
    corruptions: int
    examples: tuple[Corruption, ...] = ()
    failure: str = ""

    def require_intact(self) -> None:
        """Raise GuestCorruptionError or GuestError if the guest found its memory changed, or failed."""
        if self.corruptions:
            named = ", ".join(f"gfn {item.page >> 12:#x} ({item.cause})" for item in self.examples[:4])
            raise GuestCorruptionError(
                f"The guest found {self.corruptions} corruptions at the destination: {named or 'no details'}."
            )
        if self.failure:
            raise GuestError(f"The guest failed at the destination: {self.failure}")


@dataclass(frozen=True)
class MigrationResult:
    """A migration as the source saw it.  Seconds and bytes; digests in hexadecimal.

    ``downtime_seconds``: from the request to pause until the destination said that the guest runs, without
    ``digest_seconds`` (the proof's share of that time).  ``total_seconds`` includes both.
    ``throughput_bytes_per_second``: all bytes of the rounds over all their seconds.  ``converged``: the last
    round fitted the downtime limit.  ``guest``: None where the destination made no checks.
    """

    verified: bool
    backend: str
    destination_backend: str
    tracker: str
    rounds: tuple[RoundResult, ...]
    converged: bool
    total_seconds: float
    downtime_seconds: float
    digest_seconds: float
    bytes_sent: int
    throughput_bytes_per_second: float
    pages_total: int
    pages_allocated: int
    digest_source: str
    digest_destination: str
    guest: GuestChecks = field(default_factory=lambda: GuestChecks(0, 0))

    def to_json(self) -> dict[str, Any]:
        """The documented keys; ``guest_corruptions`` is a count, ``guest_corruption_examples`` a list."""
        result = asdict(self)
        del result["guest"]
        return result | {
            "rounds": [item.to_json() for item in self.rounds],
            "guest_checks": self.guest.checks,
            "guest_corruptions": self.guest.corruptions,
            "guest_corruption_examples": [asdict(item) for item in self.guest.examples],
            "guest_failure": self.guest.failure,
        }


@dataclass(frozen=True)
class ReceiveResult:
    """A migration as the destination saw it; see MigrationResult for the common members.

    ``source_informed``: false when the source could not be told that the guest runs here.
    """

    verified: bool
    backend: str
    source_backend: str
    rounds: int
    total_seconds: float
    bytes_received: int
    pages_received: int
    pages_total: int
    digest: str
    source_informed: bool
    guest: GuestChecks

    def to_json(self) -> dict[str, Any]:
        result = asdict(self)
        del result["guest"]
        return result | {
            "guest_checks": self.guest.checks,
            "guest_corruptions": self.guest.corruptions,
            "guest_corruption_examples": [asdict(item) for item in self.guest.examples],
            "guest_failure": self.guest.failure,
        }
