"""Keeping all vCPUs of a machine outside of the guest for a moment, whoever runs them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from pykvm.errors import ClosedError, GuestTimeoutError
from pykvm.machine import Vcpu
from pykvm.track.logging_slots import KICK_TIMEOUT


class Gate:
    """Every run of a vCPU passes it: ``enter`` before, ``leave`` after."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, Vcpu] = {}  # by thread: a vCPU that two threads run is somebody's BusyError
        self._held = 0

    def enter(self, vcpu: Vcpu) -> None:
        """Wait until nobody keeps the vCPUs out; from here on ``vcpu`` counts as inside."""
        with self._changed:
            if self._held:
                self._changed.wait_for(lambda: not self._held)
            self._inside[threading.get_ident()] = vcpu

    def leave(self) -> None:
        """The run is over."""
        with self._changed:
            del self._inside[threading.get_ident()]
            if self._held:
                self._changed.notify_all()

    @contextlib.contextmanager
    def held(self, timeout: float = KICK_TIMEOUT) -> Iterator[None]:
        """No vCPU is inside for the length of the with statement; runs that were are kicked.

        May be nested.  Raises GuestTimeoutError where a vCPU stays inside for ``timeout`` seconds.
        """
        with self._changed:
            self._held += 1
            try:
                for vcpu in self._inside.values():
                    with contextlib.suppress(ClosedError):  # it comes out by itself
                        vcpu.kick()
                if not self._changed.wait_for(lambda: not self._inside, timeout):
                    stuck = ", ".join(str(vcpu.id) for vcpu in self._inside.values())
                    raise GuestTimeoutError(
                        f"vCPU {stuck} did not leave the guest within {timeout:g} s; allow it more time."
                    )
            except BaseException:
                self._release()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._release()

    def _release(self) -> None:
        self._held -= 1
        self._changed.notify_all()
