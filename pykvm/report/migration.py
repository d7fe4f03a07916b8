"""What a live migration did, as plain values; the other modules here turn it into tables and HTML."""

from __future__ import annotations

from dataclasses import dataclass, field


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

    ``converged``: what was left for the final round fitted the downtime limit, rather than the rounds having
    run out.  Seconds are None and digests empty where the migration did not come that far.
    ``wrong_pages``: numbers of pages that differ, within the guest's memory.  ``parameters`` are shown as
    they are, in their order.
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
    downtime_seconds: float | None
    digest_seconds: float | None
    bytes_sent: int
    pages_total: int
    digest_source: str
    digest_destination: str
    guest_checks: int
    guest_corruptions: int
    converged: bool = True
    problem: str = ""
    wrong_pages: tuple[int, ...] = ()
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        """Bytes per second over the rounds."""
        seconds = sum(item.seconds for item in self.rounds)
        return sum(item.bytes for item in self.rounds) / seconds if seconds > 0 else 0.0

    @property
    def remark(self) -> str:
        """One sentence about a migration that could not keep its downtime limit; else empty."""
        if self.converged:
            return ""
        return (
            "The guest wrote faster than the limits allow: the rounds ran out before what was left fitted "
            "the downtime limit."
        )
