"""The wire between guest and host."""

from __future__ import annotations

import random

import pytest

from pykvm.lab.channel import LARGEST, BrokenStream, Decoder, Frame, encode, pieces


def decoded(stream: bytes, cuts: list[int]) -> list[tuple[Frame, bytes]]:
    found: list[tuple[Frame, bytes]] = []
    decoder = Decoder(lambda frame, payload: found.append((frame, payload)))
    start = 0
    for cut in [*cuts, len(stream)]:
        decoder.feed(stream[start:cut])
        start = cut
    return found


@pytest.mark.parametrize("seed", range(20))
def test_frames_come_out_whole_however_they_were_cut(seed: int) -> None:
    rng = random.Random(seed)
    sent = [(rng.choice(list(Frame)), rng.randbytes(rng.choice((0, 1, 5, 300)))) for _ in range(30)]
    stream = b"".join(encode(kind, payload) for kind, payload in sent)
    cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(40)))
    assert decoded(stream, cuts) == sent


def test_an_unfinished_frame_is_not_handed_out() -> None:
    found: list[bytes] = []
    decoder = Decoder(lambda frame, payload: found.append(payload))
    late = encode(Frame.STDOUT, b"cut off")
    decoder.feed(encode(Frame.STDOUT, b"whole") + late[:-1])
    assert found == [b"whole"]
    decoder.feed(late[-1:])
    assert found == [b"whole", b"cut off"]


def test_large_payloads_come_in_pieces() -> None:
    payload = bytes(range(256)) * (LARGEST // 256) + b"tail"
    frames = list(pieces(Frame.FILES, payload))
    assert len(frames) == 2
    assert b"".join(part for _, part in decoded(b"".join(frames), [])) == payload
    with pytest.raises(ValueError, match="mebibyte"):
        encode(Frame.FILES, payload)


@pytest.mark.parametrize(
    "garbage",
    [b"Linux version 6.1\r\n", b"\xa5?\x00\x00\x00\x00", b"\xa5O\xff\xff\xff\x7f"],
    ids=["text", "unknown kind", "absurd length"],
)
def test_what_is_no_frame_is_refused(garbage: bytes) -> None:
    with pytest.raises(BrokenStream):
        decoded(encode(Frame.STDOUT, b"fine") + garbage, [])
