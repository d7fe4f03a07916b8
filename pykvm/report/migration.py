"""What a live migration did, as plain values; the other modules here turn it into JSON, tables and HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pykvm.report.heat import bin_range


@dataclass(frozen=True, slots=True)
class Round:
    """One pre-copy round, or the last one with paused vCPUs (``final``).

    ``pages`` were sent (``zero_pages`` of them as a mark only) as ``bytes`` on the wire within ``seconds``
    from ``start`` on (seconds after the migration began).  ``pages_dirtied`` is how many the guest wrote
    meanwhile; ``heat`` counts those by equal parts of guest memory.
    """

    number: int
    pages: int
    zero_pages: int
    bytes: int
    start: float
    seconds: float
    pages_dirtied: int
    final: bool = False
    heat: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """A finished migration.  ``verified`` means equal digests and a destination guest that found no damage.

    ``parameters`` are shown as they are, in their order.  ``wrong_gfns`` names pages that differ.
    """

    verified: bool
    backend: str
    tracker: str
    workload: str
    memory: int
    vcpus: int
    transport: str
    rounds: tuple[Round, ...]
    total_seconds: float
    downtime_seconds: float
    digest_seconds: float
    bytes_sent: int
    pages_total: int
    digest_source: str
    digest_destination: str
    guest_checks: int
    guest_corruptions: int
    problem: str = ""
    wrong_gfns: tuple[int, ...] = ()
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        """Bytes per second over the rounds (not over the digests)."""
        seconds = sum(item.seconds for item in self.rounds)
        return self.bytes_sent / seconds if seconds > 0 else 0.0

    def bin_size(self, index: int) -> int:
        """Pages in a bin of the rounds' heat maps."""
        bins = len(self.rounds[0].heat)
        first, last = bin_range(index, self.pages_total, bins)
        return last - first

    def to_json(self) -> dict[str, Any]:
        """The documented keys (docs/json.md)."""
        return {
            "verified": self.verified,
            "backend": self.backend,
            "tracker": self.tracker,
            "workload": self.workload,
            "memory_bytes": self.memory,
            "vcpus": self.vcpus,
            "transport": self.transport,
            "rounds": [
                {
                    "round": item.number,
                    "final": item.final,
                    "pages": item.pages,
                    "zero_pages": item.zero_pages,
                    "bytes": item.bytes,
                    "seconds": item.seconds,
                    "pages_dirtied": item.pages_dirtied,
                }
                for item in self.rounds
            ],
            "total_seconds": self.total_seconds,
            "downtime_seconds": self.downtime_seconds,
            "digest_seconds": self.digest_seconds,
            "bytes_sent": self.bytes_sent,
            "throughput_bytes_per_second": self.throughput,
            "pages_total": self.pages_total,
            "digest_source": self.digest_source,
            "digest_destination": self.digest_destination,
            "guest_checks": self.guest_checks,
            "guest_corruptions": self.guest_corruptions,
            "wrong_gfns": list(self.wrong_gfns),
        }
