"""Losing a page on purpose, to show that the proof can fail."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from pykvm.errors import MigrationError, UsageError
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.migrate import wire
from pykvm.migrate.wire import Pages

KINDS = ("lost-page",)
_ZERO_SUM = wire.checksum(bytes(PAGE_SIZE))
_LIMIT_SECONDS = 5.0
_STEP_SECONDS = 0.02


class LostPage:
    """Picks a dirty page of the final round whose contents differ from what the destination has.

    ``sent`` holds the checksum of each page as it was sent last; pages not in it are zero over there.  Equal
    checksums would only hide a candidate, never invent one, so the loss is certain.
    """

    def __init__(self, kind: str, memory: GuestMemory) -> None:
        if kind not in KINDS:
            raise UsageError(f"There is no sabotage {kind!r}; use one of: {', '.join(KINDS)}.")
        self._memory = memory
        self.sent: dict[int, int] = {}
        self.page: int | None = None

    def drop(self, pages: Pages, more: Callable[[float], Pages]) -> Pages:
        """The final round's pages without one that is needed.

        ``more(seconds)`` lets the guest run for a while and returns the then dirty pages; it is used until a
        page qualifies.  Raises MigrationError where the guest changes nothing.
        """
        deadline = time.monotonic() + _LIMIT_SECONDS
        while (page := self._needed(pages)) is None:
            if time.monotonic() > deadline:
                raise MigrationError("There is no page to lose: the guest does not change its memory.")
            pages = np.union1d(pages, more(_STEP_SECONDS))
        self.page = page
        kept: Pages = pages[pages != np.uint64(page)]
        return kept

    def _needed(self, pages: Pages) -> int | None:
        # From the middle on: the lowest pages are the guest's tables and its own books.
        for page in np.roll(pages, -len(pages) // 2).tolist():
            contents = self._memory.read(page * PAGE_SIZE, PAGE_SIZE)
            if wire.checksum(contents) != self.sent.get(page, _ZERO_SUM):
                return int(page)
        return None
