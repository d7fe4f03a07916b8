"""The source's side: move a running guest away, or keep it unharmed.

Until HANDOVER is on its way everything that fails ends with the guest running here as before.  From then
on the guest is the destination's unless the destination, or a fence, says that it never ran it.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from pykvm.errors import (
    ChannelError,
    DestinationLostError,
    HandoverUnknownError,
    MigrationError,
    RingOverflowError,
    UsageError,
    VerificationError,
    WireError,
)
from pykvm.machine import Machine, SlotFlags
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import wire
from pykvm.migrate.channel import Channel
from pykvm.migrate.guest import Guest
from pykvm.migrate.limiter import TokenBucket
from pykvm.migrate.messages import (
    Abort,
    Accept,
    DigestsEnd,
    Handover,
    Hello,
    MachineStateMessage,
    Message,
    Mismatch,
    Ready,
    Report,
    Running,
    SlotShape,
    VcpuStateMessage,
    Verified,
    reason_of,
)
from pykvm.migrate.policy import Decision, Policy
from pykvm.migrate.proof import RootDigest, digest_ranges
from pykvm.migrate.result import GuestChecks, MigrationResult, Phase, Progress, ProgressCallback
from pykvm.migrate.rounds import Copier
from pykvm.migrate.sabotage import LostPage
from pykvm.migrate.session import PeerFailedError, Session
from pykvm.migrate.wire import FrameType
from pykvm.track import Tracker

Fence = Callable[[], bool]
"""Makes sure that the destination is dead, and says whether it is (killing it is a fine way)."""

_gone: weakref.WeakSet[Machine] = weakref.WeakSet()
"""Machines whose guest was handed over: to move it again would make two of it."""

_ABORT_SECONDS = 1.0
_SLOT_BYTES_PER_SECOND = 32 << 30
"""KVM allocates 10 bytes per page of a memslot: 6 s for 1 TiB were seen (docs/reference/hosts.md G)."""


def send(
    guest: Guest,
    tracker: Tracker,
    channel: Channel,
    policy: Policy | None = None,
    *,
    progress: ProgressCallback | None = None,
    sabotage: str | None = None,
    fence: Fence | None = None,
) -> MigrationResult:
    """Move ``guest`` to whoever receives at the other end of ``channel``, which is closed in the end.

    ``tracker`` must have been prepared when the guest's machine was created, and not be armed.
    ``sabotage="lost-page"`` drops one needed page, so that the run must fail.  ``progress`` is called on this
    thread.  On success the guest is stopped here for good; the caller closes it.

    Raises, with the guest running here as before: MigrationError and its kin (anything that failed before
    the hand-over), RingOverflowError, VerificationError (a page differs), or whatever interrupted it
    (KeyboardInterrupt).  Raises with the guest not running here: HandoverUnknownError (it stays paused),
    DestinationLostError (it was handed over, then the destination fell silent), its own failure.  A guest
    that was handed over is refused with UsageError.
    """
    if guest.machine in _gone:
        channel.close()
        raise UsageError("This guest was handed over and lives at its destination; move it from there.")
    try:
        return _Source(guest, tracker, Session(channel), policy or Policy(), progress, fence).run(sabotage)
    finally:
        channel.close()


class _Source:
    def __init__(
        self,
        guest: Guest,
        tracker: Tracker,
        session: Session,
        policy: Policy,
        progress: ProgressCallback | None,
        fence: Fence | None,
    ) -> None:
        self._guest = guest
        self._tracker = tracker
        self._session = session
        self._channel = session.channel
        self._policy = policy
        self._progress = progress
        self._fence = fence
        self._was_running = guest.runner.running
        self._handed_over = False
        if policy.bandwidth is not None:
            self._channel.limiter = TokenBucket(policy.bandwidth)

    # --- the course of events ----------------------------------------------------------------------

    def run(self, sabotage: str | None) -> MigrationResult:
        try:
            moved = self._move(sabotage)
        except BaseException as error:
            if self._handed_over:
                raise
            self._keep_guest(error)
            explained = self._explained(error)
            if explained is error:
                raise
            raise explained from error
        # The guest is the destination's.  Stopped, not paused: nobody can resume it here by mistake.
        _gone.add(self._guest.machine)
        self._guest.runner.stop()
        self._tracker.disarm()
        self._tell(Phase.CHECK)
        result = replace(moved.result, guest=self._follow(moved.check_seconds))
        self._tell(Phase.DONE)
        return result

    def _move(self, sabotage: str | None) -> _Moved:
        """Everything up to RUNNING."""
        began = time.monotonic()
        lost_page = LostPage(sabotage, self._guest.memory) if sabotage else None
        backend = self._negotiate()
        copier = Copier(self._guest, self._tracker, self._session, self._policy, self._report, lost_page)
        self._guest.runner.on_ring_full = self._tracker.on_ring_full
        copier.copy_running()
        self._tell(Phase.PAUSE)
        paused = time.monotonic()
        self._pause()
        # Saving may complete an access that was under way, and so write memory: before the last pages.
        states = self._save_states()
        copier.copy_final()
        self._tell(Phase.VERIFY)
        proving = time.monotonic()
        ours, theirs = self._prove(copier)
        digest_seconds = time.monotonic() - proving
        self._tell(Phase.STATE)
        for state in states:
            state.send(self._channel)
        self._session.expect(Ready)
        self._tell(Phase.HANDOVER)
        check_seconds = self._hand_over()
        ended = time.monotonic()
        seconds = sum(item.seconds for item in copier.rounds)
        result = MigrationResult(
            verified=True,
            backend=self._guest.machine.backend,
            destination_backend=backend,
            tracker=self._tracker.name,
            rounds=tuple(copier.rounds),
            converged=copier.decision is Decision.CONVERGED,
            total_seconds=ended - began,
            downtime_seconds=ended - paused - digest_seconds,
            digest_seconds=digest_seconds,
            bytes_sent=self._channel.bytes_sent,
            throughput_bytes_per_second=sum(item.bytes for item in copier.rounds) / seconds,
            pages_total=copier.pages_total,
            pages_allocated=copier.pages_allocated,
            digest_source=ours,
            digest_destination=theirs,
        )
        return _Moved(result, check_seconds)

    def _negotiate(self) -> str:
        """Describe the machine; the destination's backend once it has made one like it."""
        self._tell(Phase.CONNECT)
        machine = self._guest.machine
        Hello(
            memory=self._guest.memory.size,
            page_size=PAGE_SIZE,
            slots=tuple(
                SlotShape(slot.id, slot.gpa, slot.size, slot.memory_offset, SlotFlags.READONLY in slot.flags)
                for slot in machine.slots.values()
            ),
            vcpus=tuple(vcpu.id for vcpu in machine.vcpus),
            backend=machine.backend,
            guest=asdict(self._guest.config),
        ).send(self._channel)
        patience = self._channel.timeout + self._guest.memory.size / _SLOT_BYTES_PER_SECOND
        return self._session.expect(Accept, patience).backend

    def _pause(self) -> None:
        if self._was_running:
            self._guest.runner.pause()
        if self._guest.runner.finished:
            raise MigrationError("The guest ended by itself before the migration was through.")

    def _save_states(self) -> list[Message]:
        machine = self._guest.machine
        states: list[Message] = [
            VcpuStateMessage(vcpu.id, vcpu.save_state().to_json()) for vcpu in machine.vcpus
        ]
        states.append(MachineStateMessage(machine.save_state().to_json()))
        return states

    def _prove(self, copier: Copier) -> tuple[str, str]:
        """Send the digests of all pages for the destination to compare; both root digests."""
        root = RootDigest()
        for part in digest_ranges(self._guest.memory, self._policy.digests_per_frame):
            root.add(part.records)
            head = wire.pack_range(part.first, part.end)
            self._channel.send(FrameType.DIGESTS, head, part.records.tobytes())
            self._session.check_peer()
        DigestsEnd(root.hex()).send(self._channel)
        answer = self._session.expect_either(Verified, Mismatch)
        if isinstance(answer, Mismatch):
            named = ", ".join(copier.gfn_name(page) for page in answer.pages[:8])
            more = f" and {answer.count - 8} more" if answer.count > 8 else ""
            raise VerificationError(
                f"{answer.count} of {copier.pages_total} pages differ at the destination: {named}{more} "
                f"(digest {root.hex()} here, {answer.root} there).",
                pages=answer.pages,
            )
        if answer.root != root.hex():
            raise WireError("The destination confirms every page, but its digest over all of them differs.")
        return root.hex(), answer.root

    # --- the switch-over ---------------------------------------------------------------------------

    def _hand_over(self) -> float:
        """Send HANDOVER and wait for RUNNING: for how many seconds the destination will check.

        Between the two nobody here can know which side owns the guest; ``_handed_over`` errs towards the
        destination and is taken back only on proof.
        """
        self._session.check_peer()
        self._handed_over = True
        try:
            try:
                Handover().send(self._channel)
            except ChannelError as error:
                self._handed_over = error.transmitted
                raise
            return self._session.expect(Running).check_seconds
        except PeerFailedError as error:
            self._handed_over = error.started
            if not error.started:
                raise
            reason: BaseException = error
        except BaseException as error:
            if not self._handed_over:
                raise
            reason = error
        if self._fence is not None and self._fence():
            self._handed_over = False
            raise MigrationError(
                f"The destination failed at the hand-over and is certainly dead. {reason}"
            ) from reason
        self._tracker.disarm()
        raise HandoverUnknownError(
            "The connection broke after the hand-over was sent, so the guest may run at the destination; it "
            f"stays paused here. Look at the destination, and resume here only if it is dead. ({reason})"
        ) from reason

    def _follow(self, check_seconds: float) -> GuestChecks:
        """What the guest's own checks find at the destination."""
        try:
            report = self._session.expect(Report, check_seconds + self._channel.timeout)
        except MigrationError as error:
            raise DestinationLostError(
                "The guest was moved and verified and ran at the destination, which then fell silent; it was "
                f"the destination's alone and is not run here again. ({error})"
            ) from error
        return GuestChecks(report.checks, report.corruptions, report.examples, report.failure)

    # --- when it fails -----------------------------------------------------------------------------

    def _keep_guest(self, error: BaseException) -> None:
        """Let the guest run on here, first of all; then stop logging and tell the destination."""
        try:
            if self._was_running and self._guest.runner.error is None:
                self._guest.runner.resume()
        finally:
            self._tracker.disarm()
            if not isinstance(error, ChannelError | PeerFailedError):
                self._channel.timeout = min(self._channel.timeout, _ABORT_SECONDS)
                self._channel.limiter = None
                with contextlib.suppress(MigrationError):
                    Abort(reason_of(error)).send(self._channel)

    def _explained(self, error: BaseException) -> BaseException:
        """The error to raise: with the destination's reason where it gave one, and the guest's fate."""
        if isinstance(error, ChannelError):
            error = self._session.why(error)
        text = f"{error} The guest stays here, unharmed."
        if isinstance(error, VerificationError):
            return VerificationError(text, pages=error.pages)
        if isinstance(error, MigrationError | RingOverflowError):
            return type(error)(text)
        return error

    # --- progress ----------------------------------------------------------------------------------

    def _tell(self, phase: Phase) -> None:
        self._report(Progress(phase, bytes_total=self._channel.bytes_sent))

    def _report(self, progress: Progress) -> None:
        if self._progress is not None:
            self._progress(progress)


@dataclass(frozen=True)
class _Moved:
    result: MigrationResult
    check_seconds: float
