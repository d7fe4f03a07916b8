"""The source's side of the conversation: expecting answers, and noticing when the destination gave up."""

from __future__ import annotations

from typing import TypeVar

from pykvm.errors import ChannelError, MigrationError, WireError
from pykvm.migrate.channel import Channel, Frame
from pykvm.migrate.messages import Failed, Message
from pykvm.migrate.wire import FrameType

M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)
_AFTERMATH_SECONDS = 0.5


class PeerFailedError(MigrationError):
    """The destination said that it gave up; ``started``: the guest may have run there."""

    def __init__(self, reason: str, *, started: bool = False) -> None:
        super().__init__(reason)
        self.started = started


class Session:
    """A channel on which each answer is due at a known moment."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def expect(self, kind: type[M], timeout: float | None = None) -> M:
        """The next message, which must be of that kind.

        Raises PeerFailedError for FAILED, WireError for anything else, ChannelError.
        """
        return kind.parse(self._frame((kind,), timeout).head)

    def expect_either(self, one: type[M], other: type[N]) -> M | N:
        """As ``expect`` where one of two answers is due."""
        frame = self._frame((one, other))
        return one.parse(frame.head) if frame.type is one.frame else other.parse(frame.head)

    def _frame(self, kinds: tuple[type[Message], ...], timeout: float | None = None) -> Frame:
        frame = self.channel.receive(timeout)
        if frame.type is FrameType.FAILED:
            failed = Failed.parse(frame.head)
            raise PeerFailedError(f"The destination gave up: {failed.reason}", started=failed.started)
        if all(frame.type is not kind.frame for kind in kinds):
            due = " or ".join(kind.frame.name for kind in kinds) or "nothing"
            raise WireError(f"The destination answered {frame.type.name} where {due} was due.")
        return frame

    def check_peer(self) -> None:
        """Raise what the destination has to say if it speaks, or ends, while it should listen."""
        if self.channel.readable:
            self._frame(())

    def why(self, error: ChannelError) -> MigrationError:
        """The reason that the destination sent before it closed the connection, else ``error`` itself."""
        try:
            self._frame((), _AFTERMATH_SECONDS)
        except PeerFailedError as reason:
            return reason
        except MigrationError:
            pass
        return error
