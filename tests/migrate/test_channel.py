"""Sockets: addresses, time limits, broken connections, the bandwidth limit's arithmetic."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from pykvm.errors import ChannelError, UsageError, WireError
from pykvm.migrate import Address, connect, listen, pair
from pykvm.migrate.channel import Channel
from pykvm.migrate.limiter import TokenBucket
from pykvm.migrate.wire import BODY_LIMIT, JSON_LIMIT, FrameType, pack_header


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:/run/x", Address(path="/run/x")),
        ("tcp:4444", Address(host="127.0.0.1", port=4444)),
        ("tcp:host.example:80", Address(host="host.example", port=80)),
        ("tcp:[::1]:80", Address(host="::1", port=80)),
        ("tcp::80", None),
        ("tcp:host", None),
        ("tcp:host:65536", None),
        ("tcp:h\u00f6st:80", None),
        ("unix:", None),
        ("unix:a\0b", None),
        ("unix:" + "x" * 200, None),
        ("/run/x", None),
        ("", None),
    ],
)
def test_addresses(text: str, expected: Address | None) -> None:
    if expected is None:
        with pytest.raises(UsageError):
            Address.parse(text)
    else:
        assert Address.parse(text) == expected
        assert Address.parse(str(expected)) == expected


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_frame_of_the_largest_size_arrives_as_it_was_sent(kind: str, tmp_path: Path) -> None:
    body = os.urandom(BODY_LIMIT)
    with listen(f"unix:{tmp_path}/s" if kind == "unix" else "tcp:0") as listener:
        with connect(listener.address) as here, listener.accept(5) as there:
            thread = threading.Thread(target=here.send, args=(FrameType.PAGES, b"table", body))
            thread.start()
            frame = there.receive()
            thread.join()
            assert (frame.type, frame.head, bytes(frame.body)) == (FrameType.PAGES, b"table", body)
            assert there.bytes_received == here.bytes_sent == 32 + 5 + BODY_LIMIT
            here.send(FrameType.ROUND, b"{}")
            assert there.receive().type is FrameType.ROUND


def test_only_its_user_may_connect_to_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen(f"unix:{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(UsageError, match="another address"):
            listen(f"unix:{path}")
    assert not path.exists()


def test_tcp_listens_on_the_loopback_unless_told_otherwise() -> None:
    with listen("tcp:0") as listener:
        assert listener.address.host == "127.0.0.1"
        assert listener.address.port != 0


def test_nobody_there() -> None:
    with pytest.raises(ChannelError, match="listening"):
        connect("unix:/nonexistent/socket")
    with listen("tcp:0") as listener, pytest.raises(ChannelError, match="Nobody connected"):
        listener.accept(0.05)


def test_silence_ends_with_the_time_out() -> None:
    here, there = pair(timeout=0.1)
    with here, there:
        began = time.monotonic()
        with pytest.raises(ChannelError, match="time-out"):
            here.receive()
        assert time.monotonic() - began >= 0.1


def test_a_frame_that_drips_ends_with_the_time_out() -> None:
    left, right = socket.socketpair()
    stop = threading.Event()

    def drip() -> None:
        for byte in pack_header(FrameType.ROUND, 0, b"{}"):
            if stop.wait(0.05):
                return
            left.sendall(bytes([byte]))

    with left, Channel(right, timeout=0.3) as channel:
        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(ChannelError, match="time-out"):
            channel.receive()
        stop.set()
        thread.join()


def test_a_peer_that_does_not_read_ends_with_the_time_out() -> None:
    here, there = pair(timeout=0.2)

    def send_for_ever() -> None:
        while True:
            here.send(FrameType.PAGES, b"", bytes(BODY_LIMIT))

    with here, there, pytest.raises(ChannelError, match="time-out"):
        send_for_ever()


def test_the_end_of_the_connection() -> None:
    here, there = pair()
    with here:
        there.close()
        assert here.readable
        with pytest.raises(ChannelError, match="closed"):
            here.receive()
        with pytest.raises(ChannelError) as caught:
            here.send(FrameType.HANDOVER, b"{}")
        assert not caught.value.transmitted


def test_closing_ends_a_receive_in_another_thread() -> None:
    here, there = pair(timeout=60)
    errors: list[BaseException] = []

    def receive() -> None:
        try:
            here.receive()
        except ChannelError as error:
            errors.append(error)

    with there:
        thread = threading.Thread(target=receive)
        thread.start()
        time.sleep(0.05)
        here.close()
        thread.join(5)
        assert errors


def test_what_was_sent_last_arrives_though_the_peer_was_still_sending() -> None:
    """TCP: closing with unread data resets the connection, and the reset overtakes the last words."""
    with listen("tcp:0") as listener:
        here, there = connect(listener.address), listener.accept(5)
    with here:
        for _ in range(4):
            here.send(FrameType.PAGES, b"", bytes(4096))
        there.send(FrameType.FAILED, b"{}")
        thread = threading.Thread(target=there.finish)
        thread.start()
        time.sleep(0.05)
        here.send(FrameType.PAGES, b"", bytes(4096))
        assert here.receive().type is FrameType.FAILED
        here.close()
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("part", ["head", "body"])
def test_damage_is_noticed(part: str) -> None:
    left, right = socket.socketpair()
    with left, Channel(right) as channel:
        header = pack_header(FrameType.PAGES, 0, b"head", 4096, 0)
        left.sendall(header + (b"heaD" if part == "head" else b"head") + bytes(4096))
        with pytest.raises(WireError, match=part):
            channel.receive()


def test_frames_beyond_the_limits_are_not_sent() -> None:
    here, there = pair()
    with here, there, pytest.raises(UsageError):
        here.send(FrameType.HELLO, bytes(JSON_LIMIT + 1))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.mark.parametrize("pieces", [[1000] * 50, [1], [100_000, 1, 1, 50_000]])
def test_the_bucket_keeps_to_its_rate(pieces: list[int]) -> None:
    clock = Clock()
    bucket = TokenBucket(10_000, clock=clock, sleep=clock.sleep)
    for piece in pieces:
        bucket.take(piece)
    elapsed = clock.now - 100.0
    assert sum(pieces) <= 10_000 * elapsed + 500 + 1e-6
    assert elapsed <= sum(pieces) / 10_000


def test_the_bucket_does_not_save_up_while_idle() -> None:
    clock = Clock()
    bucket = TokenBucket(10_000, clock=clock, sleep=clock.sleep)
    clock.now += 1000
    before = clock.now
    bucket.take(10_500)
    assert clock.now - before == pytest.approx(1.0)


def test_the_socket_of_a_killed_listener_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(path))
        killed.listen(1)
    with listen(f"unix:{path}") as listener, connect(f"unix:{path}"):
        listener.accept(5).close()


def test_a_live_listener_is_neither_replaced_nor_disturbed(tmp_path: Path) -> None:
    with listen(f"unix:{tmp_path}/s") as listener:
        with pytest.raises(UsageError, match="in use"):
            listen(f"unix:{tmp_path}/s")
        with pytest.raises(ChannelError, match="Nobody connected"):
            listener.accept(0.05)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(UsageError, match="choose another address"):
        listen(f"unix:{path}")
    assert path.read_text() == "precious"
