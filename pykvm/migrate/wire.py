"""The stream's frames: header, checksums, limits, run tables and strict JSON (docs/wire-format.md).

Everything here is a pure function of bytes.  Whatever a peer sends, the outcome is a value or WireError.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from pykvm.abi import ffi, lib
from pykvm.errors import WireError
from pykvm.memory import PAGE_SIZE

VERSION: Final = 1
MAGIC: Final = b"PKVM"
FRAME_PAGES: Final = 128
"""Pages whose contents one PAGES frame may carry (512 KiB)."""
RECORD_SIZE: Final = 24
"""A page number and its BLAKE2b-128 digest."""
DIGESTS_PER_FRAME: Final = 16384
RUNS_PER_ZEROS: Final = 4096
JSON_LIMIT: Final = 1 << 20

_HEADER: Final = struct.Struct("<4sHHIIIII")
_CHECKSUM: Final = struct.Struct("<I")
HEADER_SIZE: Final = _HEADER.size + _CHECKSUM.size

Pages = npt.NDArray[np.uint64]


class FrameType(IntEnum):
    """What a frame says.  S: sent by the source, D: by the destination."""

    HELLO = 1  # S: the machine
    ACCEPT = 2  # D
    ROUND = 3  # S: a round begins
    PAGES = 4  # S: runs of pages and their contents
    ZEROS = 5  # S: runs of pages that have become zero
    ROUND_END = 6  # S: how many pages the round had
    ROUND_DONE = 7  # D: all of them arrived
    DIGESTS = 8  # S: digests of the pages of a range that are not zero
    DIGESTS_END = 9  # S: the digest over all of them
    VERIFIED = 10  # D: every page agrees
    MISMATCH = 11  # D: these do not
    MACHINE_STATE = 12  # S
    VCPU_STATE = 13  # S
    READY = 14  # D: all state is loaded; nothing runs
    HANDOVER = 15  # S: the guest is yours
    RUNNING = 16  # D: and it runs
    REPORT = 17  # D: what the guest's own checks found
    FAILED = 18  # D: gave up, and whether the guest had been started
    ABORT = 19  # S: gave up before the hand-over


class Limits(NamedTuple):
    """The most bytes that a frame's two parts may have, and what its body must be a multiple of."""

    head: int
    body: int = 0
    unit: int = 1


_JSON: Final = Limits(JSON_LIMIT)
_RUN: Final = struct.Struct("<QQ")
LIMITS: Final = dict.fromkeys(FrameType, _JSON) | {
    FrameType.PAGES: Limits(FRAME_PAGES * _RUN.size, FRAME_PAGES * PAGE_SIZE, PAGE_SIZE),
    FrameType.ZEROS: Limits(RUNS_PER_ZEROS * _RUN.size),
    FrameType.DIGESTS: Limits(_RUN.size, DIGESTS_PER_FRAME * RECORD_SIZE, RECORD_SIZE),
}
BODY_LIMIT: Final = max(limit.body for limit in LIMITS.values())


class Header(NamedTuple):
    """A frame's header once it was found sound."""

    type: FrameType
    sequence: int
    head: int
    body: int
    head_checksum: int
    body_checksum: int


def checksum(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C (RFC 3720, B.4) of ``data``."""
    # SAFETY: the buffer object lives in this frame until the call has returned.
    return lib.pykvm_crc32c(0, ffi.from_buffer("char[]", data), len(data)) if len(data) else 0


def pack_header(
    kind: FrameType, sequence: int, head: bytes, body_size: int = 0, body_checksum: int = 0
) -> bytes:
    """The header of a frame whose head is ``head``; the body's checksum is the caller's."""
    fields = _HEADER.pack(MAGIC, VERSION, kind, sequence, len(head), body_size, checksum(head), body_checksum)
    return fields + _CHECKSUM.pack(checksum(fields))


def parse_header(data: bytes | bytearray | memoryview, sequence: int) -> Header:
    """Check the 32 bytes of a header; ``sequence`` is the number it must have.  Raises WireError."""
    magic, version, number, found, head, body, head_sum, body_sum = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError("The other side does not speak pykvm's migration protocol; check the address.")
    if version != VERSION:
        raise WireError(
            f"The other side speaks version {version} of the protocol, this one {VERSION}; "
            "use the same pykvm on both."
        )
    if _CHECKSUM.unpack_from(data, _HEADER.size)[0] != checksum(memoryview(data)[: _HEADER.size]):
        raise WireError("The stream is damaged: a frame's header does not match its checksum.")
    try:
        kind = FrameType(number)
    except ValueError:
        raise WireError(f"The stream has a frame of unknown type {number}.") from None
    if found != sequence:
        raise WireError(f"The stream is out of order: frame {found} came where {sequence} was due.")
    limit = LIMITS[kind]
    if head > limit.head or body > limit.body or body % limit.unit:
        raise WireError(f"A {kind.name} frame of {head} + {body} bytes is not within the format's limits.")
    return Header(kind, found, head, body, head_sum, body_sum)


# --- JSON ----------------------------------------------------------------------------------------


def pack_json(value: dict[str, Any]) -> bytes:
    """Compact UTF-8 JSON; no NaN or infinities."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def parse_json(data: bytes | bytearray | memoryview, what: str) -> dict[str, Any]:
    """One JSON object; repeated keys, NaN and infinities are refused.  Raises WireError."""
    try:
        value = json.loads(bytes(data), parse_constant=_reject_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WireError(f"A {what} frame does not hold proper JSON ({str(error)[:80]}).") from None
    if not isinstance(value, dict):
        raise WireError(f"A {what} frame must hold a JSON object.")
    return value


# --- runs of pages ---------------------------------------------------------------------------------


def pack_runs(pages: Pages) -> bytes:
    """Ascending distinct page numbers as pairs (first, count), 64-bit little-endian."""
    if not len(pages):
        return b""
    breaks = np.flatnonzero(pages[1:] - pages[:-1] != 1) + 1
    starts = np.concatenate(([0], breaks))
    runs = np.empty((len(starts), 2), dtype="<u8")
    runs[:, 0] = pages[starts]
    runs[:, 1] = np.diff(starts, append=len(pages))
    return runs.tobytes()


def parse_runs(data: bytes | bytearray | memoryview, total: int, what: str) -> list[tuple[int, int]]:
    """Runs (first page, count): ascending, apart, not empty, below ``total`` pages.  Raises WireError."""
    if not len(data) or len(data) % _RUN.size:
        raise WireError(f"A {what} frame's table of {len(data)} bytes does not hold whole runs of pages.")
    runs: list[tuple[int, int]] = []
    end = 0
    for first, count in _RUN.iter_unpack(data):
        if count == 0 or first < end or first + count > total:
            raise WireError(
                f"A {what} frame names pages {first:#x} to {first + count:#x}: "
                f"not ascending or outside the memory of {total:#x} pages."
            )
        end = first + count
        runs.append((first, count))
    return runs


# --- digests ---------------------------------------------------------------------------------------


def pack_range(first: int, end: int) -> bytes:
    """The head of a DIGESTS frame: it tells of pages first to end - 1."""
    return _RUN.pack(first, end)


def parse_range(data: bytes | bytearray | memoryview, first: int, total: int) -> int:
    """The end of the range that a DIGESTS frame tells of; it must begin at ``first``.  Raises WireError."""
    if len(data) != _RUN.size:
        raise WireError("A DIGESTS frame does not say which pages it tells of.")
    start, end = _RUN.unpack(data)
    if start != first or not start < end <= total:
        raise WireError(f"A DIGESTS frame tells of pages {start:#x} to {end:#x} where {first:#x} was due.")
    return int(end)
