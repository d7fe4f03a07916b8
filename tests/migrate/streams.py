"""Streams taken apart and put together again: for tests that cut, damage and replay them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pykvm.migrate import wire
from pykvm.migrate.channel import Channel
from pykvm.migrate.wire import FrameType
from tests.patience import patient


class RawFrame(NamedTuple):
    """A frame as bytes; ``seal`` gives it a header that fits."""

    kind: int
    head: bytes
    body: bytes

    def seal(self, sequence: int) -> bytes:
        fields = struct.pack(
            "<4sHHIIIII",
            wire.MAGIC,
            wire.VERSION,
            self.kind,
            sequence & 0xFFFFFFFF,
            len(self.head),
            len(self.body),
            wire.checksum(self.head),
            wire.checksum(self.body),
        )
        return fields + struct.pack("<I", wire.checksum(fields)) + self.head + self.body


def split(data: bytes) -> list[RawFrame]:
    """The frames of a whole, sound stream."""
    frames = []
    while data:
        kind, head, body = struct.unpack_from("<6xH4xII", data)
        end = wire.HEADER_SIZE + head + body
        frames.append(RawFrame(kind, data[32 : 32 + head], data[32 + head : end]))
        data = data[end:]
    return frames


def join(frames: Iterable[RawFrame]) -> bytes:
    """The stream of these frames, numbered from 0 and with right checksums."""
    return b"".join(frame.seal(number) for number, frame in enumerate(frames))


Filter = Callable[[bytes], tuple[bytes, bool]]
"""What to pass on of a piece, and whether to cut the connection after it."""


class Proxy:
    """Sits between two sides, records what each sends, and may cut or change it.

    ``source`` and ``destination`` are the ends to give to the two sides.  Pieces are whole frames where
    ``frames`` is true, else whatever a read returns.
    """

    def __init__(
        self,
        *,
        outward: Filter | None = None,
        backward: Filter | None = None,
        frames: bool = True,
        timeout: float = 5.0,
    ) -> None:
        left, self._left = socket.socketpair()
        self._right, right = socket.socketpair()
        self.source = Channel(left, timeout=patient(timeout))
        self.destination = Channel(right, timeout=patient(timeout))
        self.sent = bytearray()
        self.answered = bytearray()
        self.cut = False
        self._frames = frames
        self._threads = [
            threading.Thread(target=self._pump, args=(self._left, self._right, self.sent, outward)),
            threading.Thread(target=self._pump, args=(self._right, self._left, self.answered, backward)),
        ]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def _pump(
        self, there: socket.socket, onward: socket.socket, record: bytearray, change: Filter | None
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := self._piece(there):
                record += piece
                cut = False
                if change is not None:
                    piece, cut = change(piece)
                if piece:
                    onward.sendall(piece)
                if cut:
                    self.cut = True
                    break
        self._end(onward if not self.cut else None)

    def _end(self, onward: socket.socket | None) -> None:
        """An ended side ends only what it would have sent; a cut ends everything."""
        for end in (self._left, self._right) if onward is None else (onward,):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR if onward is None else socket.SHUT_WR)

    def _piece(self, there: socket.socket) -> bytes:
        if not self._frames:
            return there.recv(1 << 16)
        header = self._exactly(there, wire.HEADER_SIZE)
        if len(header) < wire.HEADER_SIZE:
            return header
        head, body = struct.unpack_from("<II", header, 12)
        return header + self._exactly(there, head + body)

    @staticmethod
    def _exactly(there: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size and (part := there.recv(size - len(data))):
            data += part
        return data

    def close(self) -> None:
        for end in (self.source, self.destination):
            end.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()
        self._left.close()
        self._right.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_after_frames(count: int) -> Filter:
    """Let so many frames pass, then cut."""
    left = count

    def change(piece: bytes) -> tuple[bytes, bool]:
        nonlocal left
        left -= 1
        return (piece, left == 0) if left >= 0 else (b"", True)

    return (lambda _piece: (b"", True)) if count == 0 else change


def cut_after_bytes(count: int) -> Filter:
    """Let so many bytes pass, then cut."""
    left = count

    def change(piece: bytes) -> tuple[bytes, bool]:
        nonlocal left
        piece, left = piece[: max(left, 0)], left - len(piece)
        return piece, left <= 0

    return change


def flip_bit(at: int, bit: int) -> Filter:
    """Flip one bit of the byte at that position of the stream."""
    position = 0

    def change(piece: bytes) -> tuple[bytes, bool]:
        nonlocal position
        data = bytearray(piece)
        if position <= at < position + len(piece):
            data[at - position] ^= 1 << bit
        position += len(piece)
        return bytes(data), False

    return change


def types_of(data: bytes) -> list[FrameType]:
    return [FrameType(frame.kind) for frame in split(data)]
