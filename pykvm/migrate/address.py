"""Where a migration goes: ``unix:PATH``, ``tcp:HOST:PORT``, ``tcp:PORT`` (loopback)."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

from pykvm.errors import UsageError

LOOPBACK = "127.0.0.1"
_UNIX_PATH_LIMIT = 107  # sun_path holds 108 bytes with its final zero (unix(7))
_TCP = re.compile(r"(?:(?P<host>\[[^\]]+\]|[^:\[\]]+):)?(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Address:
    """A unix socket's path, or a host and a port (0 when listening: any free one)."""

    path: str | None = None
    host: str = LOOPBACK
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises UsageError with the forms that exist."""
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest and "\0" not in rest:
            if len(rest.encode()) > _UNIX_PATH_LIMIT:
                raise UsageError(f"The socket path {rest!r} is longer than {_UNIX_PATH_LIMIT} bytes.")
            return cls(path=rest)
        match = _TCP.fullmatch(rest) if kind == "tcp" and rest.isascii() else None
        if match and int(match["port"]) < 65536:
            return cls(host=(match["host"] or LOOPBACK).strip("[]"), port=int(match["port"]))
        raise UsageError(f"{text!r} is no address: use unix:PATH, tcp:HOST:PORT or tcp:PORT (loopback).")

    @property
    def family(self) -> socket.AddressFamily:
        if self.path is not None:
            return socket.AF_UNIX
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
