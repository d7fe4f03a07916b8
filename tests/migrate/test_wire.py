"""Frames: round trips, and every way in which a frame can be wrong."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.errors import WireError
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import messages, wire
from pykvm.migrate.wire import FrameType

TOTAL = 1 << 28


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_the_checksum_is_the_published_crc32c(data: bytes, expected: int) -> None:
    """The first four from RFC 3720, B.4; the fifth is the check value of CRC-32/ISCSI."""
    assert wire.checksum(data) == expected


def test_a_header_is_laid_out_as_documented() -> None:
    header = wire.pack_header(FrameType.ROUND, 7, b"123456789", 0, 0)
    assert len(header) == wire.HEADER_SIZE == 32
    fields = struct.unpack("<4sHHIIIIII", header)
    assert fields[:8] == (b"PKVM", 1, 3, 7, 9, 0, 0xE3069283, 0)
    assert fields[8] == wire.checksum(header[:28])


@given(
    kind=st.sampled_from(FrameType),
    sequence=st.integers(0, 2**32 - 1),
    head=st.binary(max_size=64),
    pages=st.integers(0, wire.FRAME_PAGES),
    checksum=st.integers(0, 2**32 - 1),
)
def test_a_header_survives_the_round_trip(
    kind: FrameType, sequence: int, head: bytes, pages: int, checksum: int
) -> None:
    limit = wire.LIMITS[kind]
    head, body = head[: limit.head], min(pages * limit.unit, limit.body)
    found = wire.parse_header(wire.pack_header(kind, sequence, head, body, checksum), sequence)
    assert found == (kind, sequence, len(head), body, wire.checksum(head), checksum)


@given(data=st.binary(min_size=32, max_size=32))
def test_arbitrary_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.parse_header(data, 0)


@given(bit=st.integers(0, 255))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    data = bytearray(wire.pack_header(FrameType.PAGES, 5, b"x" * 16, PAGE_SIZE, 99))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        wire.parse_header(data, 5)


def sealed(*fields: Any) -> bytes:
    """A header with these fields and a right checksum."""
    data = struct.pack("<4sHHIIIII", *fields)
    return data + struct.pack("<I", wire.checksum(data))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ((b"HTTP", 1, 3, 0, 0, 0, 0, 0), "does not speak"),
        ((b"PKVM", 2, 3, 0, 0, 0, 0, 0), "version 2"),
        ((b"PKVM", 1, 0, 0, 0, 0, 0, 0), "unknown type 0"),
        ((b"PKVM", 1, 77, 0, 0, 0, 0, 0), "unknown type 77"),
        ((b"PKVM", 1, 3, 1, 0, 0, 0, 0), "out of order"),
        ((b"PKVM", 1, 3, 0, wire.JSON_LIMIT + 1, 0, 0, 0), "limits"),
        ((b"PKVM", 1, 3, 0, 0, 1, 0, 0), "limits"),
        ((b"PKVM", 1, FrameType.PAGES, 0, 16, PAGE_SIZE + 1, 0, 0), "limits"),
        ((b"PKVM", 1, FrameType.PAGES, 0, 16, (wire.FRAME_PAGES + 1) * PAGE_SIZE, 0, 0), "limits"),
        ((b"PKVM", 1, FrameType.DIGESTS, 0, 16, 23, 0, 0), "limits"),
        ((b"PKVM", 1, FrameType.ZEROS, 0, 2**32 - 1, 0, 0, 0), "limits"),
    ],
)
def test_a_sealed_header_is_not_believed_either(fields: tuple[Any, ...], words: str) -> None:
    with pytest.raises(WireError, match=words):
        wire.parse_header(sealed(*fields), 0)


@given(st.sets(st.integers(0, TOTAL - 1), min_size=1, max_size=200))
def test_runs_survive_the_round_trip(pages: set[int]) -> None:
    ordered = sorted(pages)
    runs = wire.parse_runs(wire.pack_runs(np.array(ordered, dtype=np.uint64)), TOTAL, "PAGES")
    assert [page for first, count in runs for page in range(first, first + count)] == ordered
    assert all(first + count < later for (first, count), (later, _) in itertools.pairwise(runs))


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [(0, 0)],
        [(TOTAL, 1)],
        [(TOTAL - 1, 2)],
        [(2**64 - 1, 2**64 - 1)],
        [(5, 2), (6, 1)],
        [(5, 1), (3, 1)],
        [(5, 1), (5, 1)],
    ],
)
def test_bad_runs_are_refused(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(WireError):
        wire.parse_runs(b"".join(struct.pack("<QQ", *run) for run in runs), TOTAL, "PAGES")


def test_half_a_run_is_refused() -> None:
    with pytest.raises(WireError):
        wire.parse_runs(bytes(17), TOTAL, "PAGES")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"1",
        b"\xff{}",
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a":' + b"1" * 10_000 + b"}",
        b"{} {}",
    ],
)
def test_improper_json_is_refused(text: bytes) -> None:
    with pytest.raises(WireError):
        wire.parse_json(text, "HELLO")


SLOT = messages.SlotShape(id=0, gpa=0, size=PAGE_SIZE, offset=0, readonly=False)
DIGEST = "0123456789abcdef" * 2
SAMPLES: list[messages.Message] = [
    messages.Hello(PAGE_SIZE, PAGE_SIZE, (SLOT,), (0, 3), "kvm", {"seed": 1}),
    messages.Accept("model"),
    messages.Round(3, True),
    messages.RoundEnd(5, 6),
    messages.RoundDone(3),
    messages.DigestsEnd(DIGEST),
    messages.Verified(DIGEST),
    messages.Mismatch(DIGEST, 70, (1, 2, 3)),
    messages.MachineStateMessage({"clock": None}),
    messages.VcpuStateMessage(3, {"msrs": []}),
    messages.Ready(),
    messages.Handover(),
    messages.Running(1.5),
    messages.Report(9, 1, (messages.Corruption(1, 2, 3, 4, "an older state"),), ""),
    messages.Failed("no room", False),
    messages.Abort("interrupted"),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: m.frame.name)
def test_messages_survive_the_round_trip(message: messages.Message) -> None:
    assert type(message).parse(wire.pack_json(message.to_json())) == message


def test_every_frame_type_with_json_has_a_sample() -> None:
    binary = {FrameType.PAGES, FrameType.ZEROS, FrameType.DIGESTS}
    assert {message.frame for message in SAMPLES} == set(FrameType) - binary


ODD = [None, True, -1, 2**70, 1.5, "", "\x1b[2J", "x" * 2000, [], [1], [None], {}, {"a": 1}]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: m.frame.name)
def test_a_member_of_another_kind_missing_or_too_many_is_refused(message: messages.Message) -> None:
    whole = wire.parse_json(wire.pack_json(message.to_json()), message.frame.name)
    for name, value in whole.items():
        rest = {key: item for key, item in whole.items() if key != name}
        with pytest.raises(WireError):
            type(message).parse(wire.pack_json(rest))
        for odd in ODD:
            if type(odd) is not type(value):
                refused_or_equal(message, rest | {name: odd})
    with pytest.raises(WireError, match="unknown"):
        type(message).parse(wire.pack_json(whole | {"more": 1}))


def refused_or_equal(message: messages.Message, document: dict[str, Any]) -> None:
    """Anything that is taken must mean what it says: it comes back out as it went in."""
    try:
        parsed = type(message).parse(wire.pack_json(document))
    except WireError:
        return
    assert wire.parse_json(wire.pack_json(parsed.to_json()), "") == document


def test_reasons_are_made_fit_for_a_frame_and_for_a_terminal() -> None:
    reason = messages.reason_of(ValueError("a\x1b[31m\nb" + "x" * 5000))
    assert messages.Failed.parse(wire.pack_json({"reason": reason, "started": False})).reason == reason
    assert "\x1b" not in reason
    assert messages.reason_of(KeyboardInterrupt()) == "It was interrupted."
    assert messages.reason_of(AssertionError()) == "AssertionError"
