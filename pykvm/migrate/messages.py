"""What the frames with JSON say, as values; parsing believes nothing (docs/wire-format.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

from pykvm.errors import WireError
from pykvm.migrate import wire
from pykvm.migrate.channel import Channel
from pykvm.migrate.guest import CorruptionLike
from pykvm.migrate.wire import FrameType

REASON_LIMIT = 1000
PAGES_NAMED = 64
"""How many differing pages a MISMATCH names; it counts all of them."""
WORD = (1 << 64) - 1
_DIGEST_HEX = 32
_ADDRESSES = 1 << 52
"""Guest-physical addresses end here (SDM vol. 3, 4.1.4)."""


def reason_of(error: BaseException) -> str:
    """An error's message as one line that fits a frame."""
    if isinstance(error, KeyboardInterrupt):
        return "It was interrupted."
    return text_of(str(error) or type(error).__name__)


def text_of(text: str) -> str:
    """Text as one printable line that fits a frame."""
    return "".join(c if c.isprintable() else " " for c in text)[:REASON_LIMIT]


class Fields:
    """Takes the members of a JSON object one by one, each checked; ``done`` refuses what is left over."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise WireError(f"{what}: an object was due.")
        self._left: dict[str, Any] = dict(value)
        self._what = what

    def _take(self, name: str) -> Any:
        if name not in self._left:
            raise WireError(f"{self._what}: {name!r} is missing.")
        return self._left.pop(name)

    def _bad(self, name: str, what: str) -> WireError:
        return WireError(f"{self._what}: {name!r} must be {what}.")

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._take(name)
        if type(value) is not int or not low <= value <= high:
            raise self._bad(name, f"a whole number from {low} to {high}")
        return value

    def seconds(self, name: str) -> float:
        value = self._take(name)
        if type(value) not in (int, float) or not 0 <= value <= 86400:
            raise self._bad(name, "seconds, up to a day")
        return float(value)

    def truth(self, name: str) -> bool:
        value = self._take(name)
        if type(value) is not bool:
            raise self._bad(name, "true or false")
        return value

    def text(self, name: str, limit: int = REASON_LIMIT) -> str:
        value = self._take(name)
        if type(value) is not str or len(value) > limit or not value.isprintable():
            raise self._bad(name, f"printable text of at most {limit} characters")
        return value

    def digest(self, name: str) -> str:
        value = self.text(name, _DIGEST_HEX)
        if len(value) != _DIGEST_HEX or not all(c in "0123456789abcdef" for c in value):
            raise self._bad(name, f"{_DIGEST_HEX} hexadecimal digits")
        return value

    def items(self, name: str, limit: int) -> list[Any]:
        value = self._take(name)
        if type(value) is not list or len(value) > limit:
            raise self._bad(name, f"a list of at most {limit} items")
        return value

    def object(self, name: str) -> dict[str, Any]:
        value = self._take(name)
        if type(value) is not dict:
            raise self._bad(name, "an object")
        return value

    def done(self) -> None:
        if self._left:
            raise WireError(
                f"{self._what}: unknown members {', '.join(sorted(map(repr, self._left)))[:200]}."
            )


@dataclass(frozen=True)
class Message(ABC):
    """Base of the messages that are one JSON object."""

    frame: ClassVar[FrameType]

    def send(self, channel: Channel) -> None:
        """Send it as a frame of its type."""
        channel.send(self.frame, wire.pack_json(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, head: bytes) -> Self:
        """From a frame's head.  Raises WireError."""
        fields = Fields(wire.parse_json(head, cls.frame.name), cls.frame.name)
        message = cls._read(fields)
        fields.done()
        return message

    @classmethod
    @abstractmethod
    def _read(cls, fields: Fields) -> Self:
        """The message from the members of its object.  Raises WireError."""


@dataclass(frozen=True)
class SlotShape:
    """A memslot: ``size`` bytes of the memory from ``offset`` on, seen at ``gpa``."""

    id: int
    gpa: int
    size: int
    offset: int
    readonly: bool

    @classmethod
    def read(cls, value: object) -> SlotShape:
        fields = Fields(value, "HELLO: a slot")
        shape = cls(
            id=fields.integer("id", 0, 0xFFFF),
            gpa=fields.integer("gpa", 0, _ADDRESSES),
            size=fields.integer("size", 1, _ADDRESSES),
            offset=fields.integer("offset", 0, _ADDRESSES),
            readonly=fields.truth("readonly"),
        )
        fields.done()
        return shape


@dataclass(frozen=True)
class Hello(Message):
    """The machine that the source wants to move: memory in bytes, slots, vCPU ids, the guest's own part."""

    frame = FrameType.HELLO

    memory: int
    page_size: int
    slots: tuple[SlotShape, ...]
    vcpus: tuple[int, ...]
    backend: str
    guest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def _read(cls, fields: Fields) -> Hello:
        vcpus = fields.items("vcpus", 4096)
        if not all(type(vcpu) is int and 0 <= vcpu < 1 << 32 for vcpu in vcpus):
            raise WireError("HELLO: 'vcpus' must hold unsigned 32-bit numbers.")
        return cls(
            memory=fields.integer("memory", 1, _ADDRESSES),
            page_size=fields.integer("page_size", 1, 1 << 30),
            slots=tuple(SlotShape.read(item) for item in fields.items("slots", 1 << 15)),
            vcpus=tuple(vcpus),
            backend=fields.text("backend", 32),
            guest=fields.object("guest"),
        )


@dataclass(frozen=True)
class Accept(Message):
    """The destination made such a machine, of its own backend."""

    frame = FrameType.ACCEPT
    backend: str

    @classmethod
    def _read(cls, fields: Fields) -> Accept:
        return cls(fields.text("backend", 32))


@dataclass(frozen=True)
class Round(Message):
    """Round ``number`` (from 1) begins; ``final``: the guest is paused."""

    frame = FrameType.ROUND
    number: int
    final: bool

    @classmethod
    def _read(cls, fields: Fields) -> Round:
        return cls(fields.integer("number", 1, 1 << 32), fields.truth("final"))


@dataclass(frozen=True)
class RoundEnd(Message):
    """The round had so many pages with contents and so many that have become zero."""

    frame = FrameType.ROUND_END
    pages: int
    zeros: int

    @classmethod
    def _read(cls, fields: Fields) -> RoundEnd:
        return cls(fields.integer("pages", 0, _ADDRESSES), fields.integer("zeros", 0, _ADDRESSES))


@dataclass(frozen=True)
class RoundDone(Message):
    """Everything of round ``number`` arrived."""

    frame = FrameType.ROUND_DONE
    number: int

    @classmethod
    def _read(cls, fields: Fields) -> RoundDone:
        return cls(fields.integer("number", 1, 1 << 32))


@dataclass(frozen=True)
class DigestsEnd(Message):
    """The digest over all page digests of the source."""

    frame = FrameType.DIGESTS_END
    root: str

    @classmethod
    def _read(cls, fields: Fields) -> DigestsEnd:
        return cls(fields.digest("root"))


@dataclass(frozen=True)
class Verified(Message):
    """Every page agrees; the destination's own root digest."""

    frame = FrameType.VERIFIED
    root: str

    @classmethod
    def _read(cls, fields: Fields) -> Verified:
        return cls(fields.digest("root"))


@dataclass(frozen=True)
class Mismatch(Message):
    """``count`` pages differ, ``pages`` being the first of them (page numbers of the memory)."""

    frame = FrameType.MISMATCH
    root: str
    count: int
    pages: tuple[int, ...]

    @classmethod
    def _read(cls, fields: Fields) -> Mismatch:
        pages = fields.items("pages", PAGES_NAMED)
        if not all(type(page) is int and 0 <= page < _ADDRESSES for page in pages):
            raise WireError("MISMATCH: 'pages' must hold page numbers.")
        return cls(fields.digest("root"), fields.integer("count", 0, _ADDRESSES), tuple(pages))


@dataclass(frozen=True)
class MachineStateMessage(Message):
    """The state that belongs to the machine as a whole."""

    frame = FrameType.MACHINE_STATE
    state: Mapping[str, Any]

    @classmethod
    def _read(cls, fields: Fields) -> MachineStateMessage:
        return cls(fields.object("state"))


@dataclass(frozen=True)
class VcpuStateMessage(Message):
    """The state of vCPU ``id``; one for each, in the order of HELLO."""

    frame = FrameType.VCPU_STATE
    id: int
    state: Mapping[str, Any]

    @classmethod
    def _read(cls, fields: Fields) -> VcpuStateMessage:
        return cls(fields.integer("id", 0, (1 << 32) - 1), fields.object("state"))


@dataclass(frozen=True)
class Ready(Message):
    """All state is loaded; the guest would run with the next message."""

    frame = FrameType.READY

    @classmethod
    def _read(cls, fields: Fields) -> Ready:
        return cls()


@dataclass(frozen=True)
class Handover(Message):
    """The guest belongs to the destination from here on."""

    frame = FrameType.HANDOVER

    @classmethod
    def _read(cls, fields: Fields) -> Handover:
        return cls()


@dataclass(frozen=True)
class Running(Message):
    """The guest runs at the destination; a REPORT follows after ``check_seconds``."""

    frame = FrameType.RUNNING
    check_seconds: float

    @classmethod
    def _read(cls, fields: Fields) -> Running:
        return cls(fields.seconds("check_seconds"))


@dataclass(frozen=True)
class Corruption:
    """A word that the guest found changed at ``gpa``: what it had written, what it read.

    ``page`` is the address of the page that most probably did not survive, and ``cause`` says why.
    """

    gpa: int
    expected: int
    found: int
    page: int
    cause: str

    @classmethod
    def of(cls, item: CorruptionLike) -> Corruption:
        """From a guest's report; its memory may hold anything, so numbers are cut to 64 bits."""
        numbers = (item.gpa, item.expected, item.found, item.page)
        gpa, expected, found, page = (number & WORD for number in numbers)
        return cls(gpa, expected, found, page, text_of(item.cause))

    @classmethod
    def read(cls, value: object) -> Corruption:
        fields = Fields(value, "REPORT: a corruption")
        corruption = cls(
            fields.integer("gpa", 0, WORD),
            fields.integer("expected", 0, WORD),
            fields.integer("found", 0, WORD),
            fields.integer("page", 0, WORD),
            fields.text("cause"),
        )
        fields.done()
        return corruption


@dataclass(frozen=True)
class Report(Message):
    """What the guest's own checks found at the destination since it runs there.

    ``corruptions`` counts them all and ``examples`` are some; ``failure`` says why the guest stopped, if it
    did, and is empty otherwise.
    """

    frame = FrameType.REPORT
    checks: int
    corruptions: int
    examples: tuple[Corruption, ...]
    failure: str

    @classmethod
    def _read(cls, fields: Fields) -> Report:
        return cls(
            checks=fields.integer("checks", 0, WORD),
            corruptions=fields.integer("corruptions", 0, WORD),
            examples=tuple(Corruption.read(item) for item in fields.items("examples", PAGES_NAMED)),
            failure=fields.text("failure"),
        )


@dataclass(frozen=True)
class Failed(Message):
    """The destination refused or gave up; ``started``: the guest may have run there."""

    frame = FrameType.FAILED
    reason: str
    started: bool

    @classmethod
    def _read(cls, fields: Fields) -> Failed:
        return cls(fields.text("reason"), fields.truth("started"))


@dataclass(frozen=True)
class Abort(Message):
    """The source gave up before the hand-over and runs the guest itself."""

    frame = FrameType.ABORT
    reason: str

    @classmethod
    def _read(cls, fields: Fields) -> Abort:
        return cls(fields.text("reason"))
