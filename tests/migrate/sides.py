"""Running both sides in one process: the destination on a thread, the source on the test's own."""

from __future__ import annotations

import threading
from typing import Any

from pykvm.errors import PykvmError
from pykvm.migrate import Acceptance, Channel, ReceivedGuest, receive
from tests.migrate.fakes import FakeGuest, FakeSystem
from tests.patience import patient


class Destination:
    """``receive`` on a thread; ``join`` gives the received guest or raises what it raised."""

    def __init__(self, channel: Channel, system: Any = None, **options: Any) -> None:
        self.channel = channel
        self.system = system or FakeSystem()
        if system is None:
            options = {"adopt": FakeGuest.adopt, "check_seconds": 0.05} | options
        self._options = options
        self._received: ReceivedGuest | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._received = receive(self.system, self.channel, **self._options)
        except PykvmError as error:
            self.error = error

    def join(self, timeout: float = 20.0) -> ReceivedGuest | None:
        """The received guest, or None where it failed (see ``error``)."""
        self._thread.join(patient(timeout))
        assert not self._thread.is_alive(), "the destination hangs"
        return self._received


SMALL = Acceptance(max_memory=1 << 30)
