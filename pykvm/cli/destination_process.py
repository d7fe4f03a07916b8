"""The destination of ``pykvm migrate`` as a child process: ``python -m pykvm migrate receive``."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from types import TracebackType
from typing import IO, Any, Self

from pykvm.errors import MigrationError

LISTENING = "listening at "
"""What a receiver says on standard error once it can be connected to, followed by the address."""

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_LINES_KEPT = 20


class DestinationProcess:
    """A receiver on this host; a context manager that leaves no process behind."""

    def __init__(
        self, address: str, *, backend: str, check_seconds: float, max_memory: int, patience: float = 0.0
    ) -> None:
        """``patience``: seconds that may pass until the source connects, beyond the usual."""
        command = [sys.executable, "-m", "pykvm", "migrate", "receive", "--json"]
        command += ["--address", address, "--backend", backend, "--check-seconds", f"{check_seconds:f}s"]
        command += ["--max-memory", str(max_memory), "--accept-timeout", f"{_START_SECONDS + patience:f}s"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._output = ""
        self._address = ""
        self._settled = threading.Event()
        self._readers = [
            threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True),
            threading.Thread(target=self._read_output, args=(self._process.stdout,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def settle(self) -> bool:
        """Wait until it listens or has ended; false when neither happened in time."""
        return self._settled.wait(_START_SECONDS)

    def address(self) -> str:
        """Where it listens.  Raises MigrationError if it ended instead, with its own last words."""
        if not self.settle():
            self.kill()
            raise MigrationError(
                f"The destination process did not start in {_START_SECONDS:g} s; is this machine overloaded?"
            )
        if not self._address:
            self.kill()
            words = self._lines[-1] if self._lines else "it said nothing"
            raise MigrationError(f"The destination process did not start: {words}")
        return self._address

    def kill(self) -> bool:
        """End it for certain and wait for that: a fence for the source.  True once it is dead."""
        self._process.kill()
        self._process.wait()
        return True

    def document(self) -> dict[str, Any]:
        """What it printed as JSON once it ended by itself; empty if it did not.  Waits a while."""
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return {}
        for reader in self._readers:
            reader.join(_STOP_SECONDS)
        try:
            document = json.loads(self._output)
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for reader in self._readers:
            reader.join(_STOP_SECONDS)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    # --- on the reading threads --------------------------------------------------------------------

    def _read_errors(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith(LISTENING):
                self._address = line.removeprefix(LISTENING).strip()
                self._settled.set()
            elif line.strip():
                self._lines.append(line.strip())
        self._settled.set()

    def _read_output(self, stream: IO[str]) -> None:
        self._output = stream.read()
