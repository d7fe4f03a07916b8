"""What a migration needs of a guest: these Protocols, which pykvm.guest's WorkloadGuest satisfies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pykvm.machine import Machine, Vcpu
from pykvm.memory import GuestMemory


class Runner(Protocol):
    """Runs the vCPUs; see pykvm.guest.runner.GuestRunner for the meaning of each."""

    on_ring_full: Callable[[Vcpu], None] | None

    @property
    def paused(self) -> bool: ...
    @property
    def running(self) -> bool: ...
    @property
    def finished(self) -> bool: ...
    @property
    def error(self) -> BaseException | None: ...
    def start(self) -> None: ...
    def pause(self, timeout: float = ...) -> None: ...
    def resume(self) -> None: ...
    def stop(self, timeout: float = ...) -> None: ...
    def wait(self, timeout: float | None = ...) -> int | None: ...


class CorruptionLike(Protocol):
    """A page that the guest found changed."""

    @property
    def gpa(self) -> int: ...
    @property
    def expected(self) -> int: ...
    @property
    def found(self) -> int: ...
    @property
    def page(self) -> int: ...
    @property
    def cause(self) -> str: ...


class Findings(Protocol):
    """What the guest's own checks found since it was created."""

    @property
    def checks(self) -> int: ...
    @property
    def corruption_count(self) -> int: ...
    @property
    def corruptions(self) -> Sequence[CorruptionLike]: ...


class Guest(Protocol):
    """A guest: a machine, one memory behind all its slots, and what runs it."""

    @property
    def machine(self) -> Machine: ...
    @property
    def memory(self) -> GuestMemory: ...
    @property
    def runner(self) -> Runner: ...
    @property
    def config(self) -> Any:
        """A dataclass of JSON values: what ``Adopt`` needs to know besides memory and state."""

    def report(self) -> Findings: ...
    def close(self) -> None: ...


Adopt = Callable[[Machine, GuestMemory, Mapping[str, Any]], Guest]
"""Makes a guest of a machine whose slots and vCPUs exist, from what the source said about it.

Must not run anything; raises UsageError for a description that it does not accept.
"""
