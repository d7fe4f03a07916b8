"""The wire from guest to host: frames of a kind, a length and that many bytes.

A port of a virtual machine carries bytes without loss, so a frame needs no checksum; a mark at its start
tells a broken stream (a guest that wrote to the port by itself) from a slow one.  The same file runs in the
guest, on the standard library alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from enum import Enum

MARK = 0xA5
_HEAD = struct.Struct("<BcI")
LARGEST = 1 << 20


class Frame(Enum):
    """What a frame carries."""

    READY = b"R"  #: the command starts; JSON with facts on the guest
    STDOUT = b"O"
    STDERR = b"E"
    RECORD = b"J"  #: a line that the command wrote to its records
    FILES = b"F"  #: the next piece of a tar stream of what the command left
    PROBLEM = b"P"  #: a sentence: the lab is not what it should be
    EXIT = b"X"  #: the command's exit status in decimal; the last frame


def encode(kind: Frame, payload: bytes) -> bytes:
    """One frame; a payload of more than a mebibyte is a ValueError (``pieces`` cuts one up)."""
    if len(payload) > LARGEST:
        raise ValueError("a frame carries at most a mebibyte")
    return _HEAD.pack(MARK, kind.value, len(payload)) + payload


def pieces(kind: Frame, payload: bytes) -> Iterator[bytes]:
    """``payload`` as one frame or several."""
    for start in range(0, len(payload), LARGEST):
        yield encode(kind, payload[start : start + LARGEST])


class BrokenStream(ValueError):
    """What came is not a stream of frames."""


class Decoder:
    """Takes bytes as they come and hands out whole frames."""

    def __init__(self, take: Callable[[Frame, bytes], None]) -> None:
        self._take = take
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """More bytes; BrokenStream if they cannot be frames."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _HEAD.size:
            mark, kind, length = _HEAD.unpack_from(self._buffer, start)
            if mark != MARK or length > LARGEST:
                raise BrokenStream(f"no frame starts with {bytes(self._buffer[start : start + 6]).hex(' ')}")
            end = start + _HEAD.size + length
            if len(self._buffer) < end:
                break
            payload = bytes(self._buffer[start + _HEAD.size : end])
            start = end
            try:
                frame = Frame(kind)
            except ValueError:
                raise BrokenStream(f"there is no frame of the kind {kind!r}") from None
            self._take(frame, payload)
        del self._buffer[:start]
