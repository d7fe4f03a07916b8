"""Hostile streams against the receiver: no crash, no hang, nothing run, no byte outside what was named."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm.errors import HostError, MigrationError, VerificationError
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import Acceptance, receive, send, wire
from pykvm.migrate.channel import Channel
from pykvm.migrate.wire import FrameType
from tests.migrate.fakes import FakeGuest, FakeMachine, FakeSystem, FakeTracker, running_guest
from tests.migrate.sides import Destination
from tests.migrate.streams import Proxy, RawFrame, join, split

FAMILY = (MigrationError, VerificationError, HostError)
ACCEPTANCE = Acceptance(max_memory=64 << 20, max_resident=64 << 20)
TIMEOUT = 5.0


@cache
def valid_stream() -> tuple[RawFrame, ...]:
    """What a source sent in a migration that succeeded."""
    with running_guest() as guest, Proxy() as proxy:
        destination = Destination(proxy.destination)
        assert send(guest, FakeTracker(always=frozenset({(0, 0)})), proxy.source).verified
        received = destination.join()
        assert received is not None
        received.close()
        return tuple(split(bytes(proxy.sent)))


class WatchedMachine(FakeMachine):
    """Looks at its memory when it is closed, which is before the memory goes."""

    outcome: Outcome

    def close(self) -> None:
        for slot in self.slots.values():
            self.outcome.look_at(slot.memory)
        super().close()


class WatchedSystem(FakeSystem):
    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self._outcome = outcome

    def create_machine(self) -> FakeMachine:
        machine = WatchedMachine()
        machine.outcome = self._outcome
        self.machines.append(machine)
        return machine


@dataclass
class Outcome:
    """What a stream did to a receiver."""

    started: bool = False
    seconds: float = 0.0
    error: BaseException | None = None
    allocated: set[int] = field(default_factory=set)
    grown: bool = False
    machines: list[FakeMachine] = field(default_factory=list)
    memories: list[Any] = field(default_factory=list)

    def look_at(self, memory: Any) -> None:
        self.memories.append(memory)
        if memory.closed:
            return
        for offset, length in memory.extents():
            self.allocated |= set(range(offset // PAGE_SIZE, (offset + length) // PAGE_SIZE))
        backing = memory._backing
        self.grown = self.grown or os.fstat(backing.fd).st_size != memory.size


def feed(data: bytes) -> Outcome:
    """Give a receiver these bytes and the end of the stream; it must be through in time."""
    left, right = socket.socketpair()
    outcome = Outcome()
    system = WatchedSystem(outcome)

    def adopt(machine: Any, memory: Any, description: Any) -> FakeGuest:
        guest = FakeGuest.adopt(machine, memory, description)
        start = guest.runner.start

        def watched() -> None:
            outcome.started = True
            start()

        guest.runner.start = watched  # type: ignore[method-assign]
        return guest

    def write() -> None:
        with contextlib.suppress(OSError):
            left.sendall(data)
            left.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while left.recv(1 << 16):
                pass
        left.close()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    began = time.monotonic()
    try:
        with receive(
            system, Channel(right, timeout=TIMEOUT), acceptance=ACCEPTANCE, adopt=adopt, check_seconds=0
        ):
            pass
    except FAMILY as error:
        outcome.error = error
    outcome.seconds = time.monotonic() - began
    writer.join(5)
    assert not writer.is_alive()
    outcome.machines = system.machines
    return outcome


def named_pages(frames: list[RawFrame]) -> set[int]:
    """The pages that the PAGES frames of a stream name, as far as their tables are whole."""
    pages: set[int] = set()
    for frame in frames:
        if frame.kind == FrameType.PAGES:
            for at in range(0, len(frame.head) - 15, 16):
                first, count = struct.unpack_from("<QQ", frame.head, at)
                pages |= set(range(first, first + min(count, 1024)))
    return pages


def check(outcome: Outcome, frames: list[RawFrame]) -> None:
    """What must hold for any stream at all."""
    assert outcome.seconds < TIMEOUT, "the stream had ended, so there was nothing to wait for"
    assert not outcome.grown
    assert all(machine.closed for machine in outcome.machines)
    assert all(memory.closed for memory in outcome.memories)
    if outcome.error is not None:
        assert not outcome.started
    if not outcome.started:  # else the guest wrote pages of its own
        assert outcome.allocated <= named_pages(frames)


def test_the_stream_itself_is_accepted() -> None:
    frames = list(valid_stream())
    outcome = feed(join(frames))
    assert outcome.error is None
    assert outcome.started
    check(outcome, frames)


SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(data=st.binary(max_size=400))
def test_arbitrary_bytes(data: bytes) -> None:
    outcome = feed(data)
    assert outcome.error is not None
    check(outcome, [])
    assert not outcome.machines


@SETTINGS
@given(data=st.data())
def test_a_truncated_stream_never_runs(data: st.DataObject) -> None:
    stream = join(valid_stream())
    last = len(valid_stream()[-1].head) + 32
    cut = data.draw(
        st.one_of(st.integers(0, len(stream) - 1), st.integers(len(stream) - last, len(stream) - 1))
    )
    outcome = feed(stream[:cut])
    assert outcome.error is not None
    assert not outcome.started
    check(outcome, list(valid_stream()))


@SETTINGS
@given(data=st.data())
def test_flipped_bits_never_run(data: st.DataObject) -> None:
    stream = bytearray(join(valid_stream()))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at] ^= 1 << data.draw(st.integers(0, 7))
    outcome = feed(bytes(stream))
    if bytes(stream) != join(valid_stream()):
        assert outcome.error is not None
    check(outcome, list(valid_stream()))


Mutation = Callable[[list[RawFrame], random.Random], list[RawFrame]]


def delete(frames: list[RawFrame], random_: random.Random) -> list[RawFrame]:
    at = random_.randrange(len(frames))
    return frames[:at] + frames[at + 1 :]


def duplicate(frames: list[RawFrame], random_: random.Random) -> list[RawFrame]:
    at, to = random_.randrange(len(frames)), random_.randrange(len(frames))
    return [*frames[:to], frames[at], *frames[to:]]


def swap(frames: list[RawFrame], random_: random.Random) -> list[RawFrame]:
    one, other = random_.randrange(len(frames)), random_.randrange(len(frames))
    frames = list(frames)
    frames[one], frames[other] = frames[other], frames[one]
    return frames


def retype(frames: list[RawFrame], random_: random.Random) -> list[RawFrame]:
    at = random_.randrange(len(frames))
    kind = random_.choice([*FrameType, 0, 99, 65535])
    return [*frames[:at], frames[at]._replace(kind=int(kind)), *frames[at + 1 :]]


def scramble_head(frames: list[RawFrame], random_: random.Random) -> list[RawFrame]:
    at = random_.randrange(len(frames))
    head = bytearray(frames[at].head)
    for _ in range(random_.randrange(1, 4)):
        if head:
            head[random_.randrange(len(head))] = random_.randrange(256)
    return [*frames[:at], frames[at]._replace(head=bytes(head)), *frames[at + 1 :]]


def move_pages(frames: list[RawFrame], random_: random.Random) -> list[RawFrame]:
    """Other page numbers: far outside, around the end, overlapping, wrapping around 2^64."""
    spots = [at for at, frame in enumerate(frames) if frame.kind == FrameType.PAGES]
    at = random_.choice(spots)
    head = bytearray(frames[at].head)
    interesting = [0, 1, 63, 64, 65, 2**31, 2**32 - 1, 2**52, 2**63, 2**64 - 1, 2**64 - 64]
    offset = random_.randrange(len(head) // 8) * 8
    struct.pack_into("<Q", head, offset, random_.choice(interesting))
    return [*frames[:at], frames[at]._replace(head=bytes(head)), *frames[at + 1 :]]


def resize(frames: list[RawFrame], random_: random.Random) -> list[RawFrame]:
    at = random_.randrange(len(frames))
    frame = frames[at]
    size = random_.choice([0, 1, 4095, 4096, 8192, wire.BODY_LIMIT, wire.BODY_LIMIT + 4096])
    return [*frames[:at], frame._replace(body=bytes(size)), *frames[at + 1 :]]


def change_number(frames: list[RawFrame], random_: random.Random) -> list[RawFrame]:
    """Another number in some JSON: sizes, addresses, counts, vCPU ids, registers."""
    spots = [at for at, frame in enumerate(frames) if frame.head.startswith(b"{") and b":" in frame.head]
    at = random_.choice(spots)
    text = frames[at].head.decode()
    digits = [i for i, c in enumerate(text) if c.isdigit() and text[i - 1] in ":,["]
    if not digits:
        return frames
    where = random_.choice(digits)
    end = where
    while end < len(text) and text[end].isdigit():
        end += 1
    value = random_.choice(
        ["0", "1", "-1", "4095", "4096", str(2**40), str(2**64), "1e308", "null", '"x"', "[]"]
    )
    return [
        *frames[:at],
        frames[at]._replace(head=(text[:where] + value + text[end:]).encode()),
        *frames[at + 1 :],
    ]


MUTATIONS: list[Mutation] = [
    delete, duplicate, swap, retype, scramble_head, move_pages, resize, change_number,
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_well_sealed_nonsense(mutation: Mutation) -> None:
    """Frames that are wrong in content or order, though numbered and sealed as they should be."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    random_ = random.Random(seed)
    refused = 0
    for _ in range(40):
        frames = mutation(list(valid_stream()), random_)
        outcome = feed(join(frames))
        check(outcome, frames)
        refused += outcome.error is not None
    assert refused


def altered(kind: FrameType, which: int = 0, **members: Any) -> list[RawFrame]:
    """The valid stream with other members in the JSON of one frame of that type."""
    frames = list(valid_stream())
    at = [number for number, frame in enumerate(frames) if frame.kind == kind][which]
    document = wire.parse_json(frames[at].head, "") | members
    frames[at] = frames[at]._replace(head=wire.pack_json(document))
    return frames


@pytest.mark.parametrize(
    ("kind", "members", "words"),
    [
        (FrameType.ROUND, {"number": 2}, "Round 2 came where round 1 was due"),
        (FrameType.ROUND_END, {"pages": 1}, "other pages than it announced"),
        (FrameType.ROUND_END, {"zeros": 1}, "other pages than it announced"),
        (FrameType.DIGESTS_END, {"root": "0" * 32}, "does not fit"),
        (FrameType.VCPU_STATE, {"id": 1}, "state of vCPU 1 came where 0's"),
        (FrameType.VCPU_STATE, {"state": {}}, "not acceptable"),
        (FrameType.MACHINE_STATE, {"state": {"clock": 1}}, "not acceptable"),
        (FrameType.HANDOVER, {"now": True}, "unknown members"),
    ],
    ids=str,
)
def test_a_lie_in_one_frame_is_noticed(kind: FrameType, members: dict[str, Any], words: str) -> None:
    frames = altered(kind, **members)
    outcome = feed(join(frames))
    assert words in str(outcome.error)
    check(outcome, frames)


@pytest.mark.parametrize("pages", [-1, 1])
def test_contents_that_do_not_fit_the_runs_are_refused(pages: int) -> None:
    frames = list(valid_stream())
    at = next(i for i, frame in enumerate(frames) if frame.kind == FrameType.PAGES)
    body = frames[at].body + bytes(PAGE_SIZE) if pages > 0 else frames[at].body[PAGE_SIZE:]
    frames[at] = frames[at]._replace(body=body)
    outcome = feed(join(frames))
    assert "pages and brings" in str(outcome.error)
    assert not outcome.allocated


def test_an_endless_round_is_ended() -> None:
    frames = list(valid_stream())
    at = next(i for i, frame in enumerate(frames) if frame.kind == FrameType.PAGES)
    outcome = feed(join(frames[: at + 1] + [frames[at]] * 100))
    assert "more pages than the memory" in str(outcome.error)


def test_a_source_that_says_nothing_is_left() -> None:
    left, right = socket.socketpair()
    with left:
        began = time.monotonic()
        with pytest.raises(MigrationError, match="time-out"):
            receive(FakeSystem(), Channel(right, timeout=0.2), adopt=FakeGuest.adopt)
        assert time.monotonic() - began < 5


def slot(**changes: Any) -> dict[str, Any]:
    return {"id": 0, "gpa": 0, "size": 64 * PAGE_SIZE, "offset": 0, "readonly": False} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": 1 << 40}, "at most 64 MiB"),
        ({"slots": [slot(id=n, gpa=n << 30, size=64 * PAGE_SIZE) for n in range(257)]}, "at most 64 MiB"),
        ({"memory": 4097}, "pages of 4096"),
        ({"page_size": 16384}, "pages of 4096"),
        ({"slots": []}, "a memslot"),
        ({"vcpus": []}, "a vCPU"),
        ({"vcpus": [1, 1]}, "same number"),
        ({"slots": [slot(), slot(gpa=1 << 30)]}, "same number"),
        ({"slots": [slot(), slot(id=1, gpa=63 * PAGE_SIZE)]}, "overlaps"),
        ({"slots": [slot(size=65 * PAGE_SIZE)]}, "leaves the memory"),
        ({"slots": [slot(offset=PAGE_SIZE)]}, "leaves the memory"),
        ({"slots": [slot(gpa=1)]}, "whole pages"),
        ({"slots": [slot(size=1)]}, "whole pages"),
        ({"slots": [slot(size=0)]}, "whole number"),
        ({"slots": [slot(id=1 << 16)]}, "whole number"),
        ({"slots": [slot()] * 40000}, "limits|at most"),
        ({"guest": {"unknown": 1}}, "not acceptable"),
    ],
)
def test_machines_that_are_not_made(changes: dict[str, Any], words: str) -> None:
    frames = list(valid_stream())
    hello = wire.parse_json(frames[0].head, "HELLO") | changes
    frames[0] = frames[0]._replace(head=wire.pack_json(hello))
    outcome = feed(join(frames))
    assert outcome.error is not None
    with pytest.raises(type(outcome.error), match=words):
        raise outcome.error
    check(outcome, frames)
