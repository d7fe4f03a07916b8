"""The trackers of the host's page tables, for tests that any of them must pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pykvm.errors import PykvmError
from pykvm.track import PagemapTracker, Tracker, UserfaultfdTracker
from pykvm.track.uffd import Userfaultfd

HOST_TRACKERS: dict[str, Callable[[], Tracker]] = {
    "userfaultfd-async": lambda: UserfaultfdTracker("async"),
    "userfaultfd-sync": lambda: UserfaultfdTracker("sync"),
    "pagemap": PagemapTracker,
}


def _why_not(asynchronous: bool) -> str:
    try:
        Userfaultfd(asynchronous=asynchronous).close()
    except PykvmError as error:
        return str(error)
    return ""


WHY_NOT = {name: _why_not(name != "userfaultfd-sync") for name in HOST_TRACKERS}


def host_tracker(name: str) -> Tracker:
    """One of HOST_TRACKERS; skips the test where the kernel or the user's rights do not do."""
    if WHY_NOT[name]:
        pytest.skip(WHY_NOT[name])
    return HOST_TRACKERS[name]()
