"""Frames over a stream socket: unix or TCP, with a time limit on everything.

A channel knows nothing of what the frames mean.  It numbers and checks them, keeps to the bandwidth limit
and turns whatever goes wrong into ChannelError (the connection) or WireError (its content).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from pykvm.errors import ChannelError, UsageError, WireError
from pykvm.migrate import wire
from pykvm.migrate.address import Address
from pykvm.migrate.limiter import TokenBucket
from pykvm.migrate.wire import FrameType

SOCKET_BUFFER = 1 << 20
DEFAULT_TIMEOUT = 10.0
_PROBE_SECONDS = 1.0
_DRAIN_SECONDS = 1.0


class Frame(NamedTuple):
    """A received frame; ``body`` is a view that the next ``receive`` overwrites."""

    type: FrameType
    head: bytes
    body: memoryview


class Channel:
    """One end of a connection.

    ``timeout`` (seconds) limits how long the other side may stand still, and how long one frame may take.
    One thread at a time may send and one may receive.  Closing is safe at any time and from any thread.
    """

    def __init__(self, connection: socket.socket, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        if timeout <= 0:
            raise UsageError(f"A time-out of {timeout} s: it must be positive.")
        self.timeout = timeout
        self.limiter: TokenBucket | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self._socket = connection
        self._sent = 0
        self._received = 0
        self._buffer = bytearray(wire.BODY_LIMIT)
        self._header = bytearray(wire.HEADER_SIZE)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout)

    # --- sending ---------------------------------------------------------------------------------

    def send(
        self,
        kind: FrameType,
        head: bytes = b"",
        body: memoryview | bytes = b"",
        *,
        body_checksum: int | None = None,
    ) -> None:
        """Send a frame; ``body_checksum`` is the body's CRC-32C where the caller knows it already.

        Raises ChannelError, whose ``transmitted`` tells whether any byte of the frame left this side.
        """
        limit = wire.LIMITS[kind]
        if len(head) > limit.head or len(body) > limit.body:
            raise UsageError(f"A {kind.name} frame of {len(head)} + {len(body)} bytes is too large to send.")
        if body_checksum is None:
            body_checksum = wire.checksum(body)
        header = wire.pack_header(kind, self._sent, head, len(body), body_checksum)
        self._send_all([memoryview(header + head), memoryview(body)])
        self._sent += 1
        if self.limiter:
            self.limiter.take(len(header) + len(head) + len(body))

    def _send_all(self, parts: list[memoryview]) -> None:
        deadline = time.monotonic() + self.timeout
        done = False
        while parts:
            with _translated("send to", transmitted=done):
                self._socket.settimeout(_remaining(deadline))
                count = self._socket.sendmsg(parts)
            done = done or count > 0
            self.bytes_sent += count
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][count:]

    # --- receiving -------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Frame:
        """The next frame, whole and with matching checksums.

        ``timeout`` (default: the channel's) is how long its first byte may take; the rest gets the
        channel's own.  Raises ChannelError, WireError.
        """
        self._receive_into(memoryview(self._header), timeout)
        header = wire.parse_header(self._header, self._received)
        head = bytearray(header.head)
        self._receive_into(memoryview(head))
        if wire.checksum(head) != header.head_checksum:
            raise WireError(f"The stream is damaged: a {header.type.name} frame's head fails its checksum.")
        body = memoryview(self._buffer)[: header.body]
        self._receive_into(body)
        if wire.checksum(body) != header.body_checksum:
            raise WireError(f"The stream is damaged: a {header.type.name} frame's body fails its checksum.")
        self._received += 1
        return Frame(header.type, bytes(head), body)

    def _receive_into(self, buffer: memoryview, first: float | None = None) -> None:
        deadline = time.monotonic() + (self.timeout if first is None else first)
        at = 0
        while at < len(buffer):
            with _translated("receive from"):
                self._socket.settimeout(_remaining(deadline))
                count = self._socket.recv_into(buffer[at:])
            if not count:
                raise ChannelError("The other side closed the connection; see its messages for the reason.")
            if not at and first is not None:
                deadline = time.monotonic() + self.timeout
            at += count
            self.bytes_received += count

    @property
    def readable(self) -> bool:
        """Whether the other side said something, or ended the connection."""
        if self._socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    # --- end -------------------------------------------------------------------------------------

    def release(self) -> None:
        """Close this process's descriptor only: the connection belongs to a child process from here on."""
        self._socket.close()

    def close(self) -> None:
        """End the connection at once, for every process that has it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def finish(self) -> None:
        """End the connection so that the last frame still arrives: send no more, read until the peer ends.

        A socket closed with unread data resets the connection, which may overtake what was sent last.
        Waits for the peer for a second at most.
        """
        deadline = time.monotonic() + min(_DRAIN_SECONDS, self.timeout)
        with contextlib.suppress(OSError, ChannelError):
            self._socket.shutdown(socket.SHUT_WR)
            while True:
                self._socket.settimeout(_remaining(deadline))
                if not self._socket.recv_into(self._buffer):
                    break
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remaining(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextlib.contextmanager
def _translated(what: str, *, transmitted: bool = False) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        text = f"The time-out passed while waiting to {what} the other side; does it hang?"
        raise ChannelError(text, transmitted=transmitted) from None
    except OSError as error:
        text = f"Could not {what} the other side: {error.strerror}."
        raise ChannelError(text, transmitted=transmitted) from error


def _is_bound(name: str) -> bool:
    """Whether a socket in this network namespace is bound to a file of that name (proc_pid_net(5))."""
    with open("/proc/net/unix", errors="replace") as table:
        return any(line.rstrip("\n").endswith(name) for line in table)


def _remove_stale(path: str) -> None:
    """Remove the socket of a listener that was killed: it is still there, and nobody answers.

    The kernel's list is asked first, since a listener that lives would take a probe for its peer.
    """
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode) or _is_bound(os.path.basename(path)):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_SECONDS)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


class Listener:
    """Waits for one side to connect; a context manager.  A unix socket is this user's alone (mode 600)."""

    def __init__(self, address: str | Address, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        where = Address.parse(address) if isinstance(address, str) else address
        self._timeout = timeout
        self._socket = socket.socket(where.family, socket.SOCK_STREAM)
        try:
            if where.path is not None:
                _remove_stale(where.path)
                self._socket.bind(where.path)
                os.chmod(where.path, 0o600)  # before listen: nobody can connect in between
            else:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._socket.bind((where.host, where.port))
                where = Address(host=where.host, port=self._socket.getsockname()[1])
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            raise UsageError(
                f"Cannot listen at {where}: {error.strerror}; choose another address."
            ) from error
        self.address = where

    def accept(self, timeout: float | None = None) -> Channel:
        """The connection of the first that comes; None waits for ever.  Raises ChannelError on time-out."""
        self._socket.settimeout(timeout)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            raise ChannelError(f"Nobody connected to {self.address} within {timeout} s.") from None
        except OSError as error:
            raise ChannelError(f"Cannot accept a connection at {self.address}: {error.strerror}.") from error
        return Channel(connection, timeout=self._timeout)

    def close(self) -> None:
        self._socket.close()
        if self.address.path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def listen(address: str | Address, *, timeout: float = DEFAULT_TIMEOUT) -> Listener:
    """Listen at ``unix:PATH`` or ``tcp:HOST:PORT``; the listener's ``address`` has the real port."""
    return Listener(address, timeout=timeout)


def connect(address: str | Address, *, timeout: float = DEFAULT_TIMEOUT) -> Channel:
    """Connect to a listening side.  Raises ChannelError, UsageError for a malformed address."""
    where = Address.parse(address) if isinstance(address, str) else address
    connection = socket.socket(where.family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(where.path if where.path is not None else (where.host, where.port))
        return Channel(connection, timeout=timeout)
    except OSError as error:
        connection.close()
        reason = error.strerror or "it did not answer in time"
        raise ChannelError(f"Cannot connect to {where}: {reason}; is the other side listening?") from error


def pair(*, timeout: float = DEFAULT_TIMEOUT) -> tuple[Channel, Channel]:
    """Two connected channels (a unix socket pair)."""
    left, right = socket.socketpair()
    return Channel(left, timeout=timeout), Channel(right, timeout=timeout)
