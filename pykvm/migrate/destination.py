"""The destination's side: build the machine, fill it, prove it, and run the guest once it is handed over.

Nothing that arrives is believed.  Until HANDOVER whatever goes wrong ends with everything freed here and
nothing ever run; the source is told so, as far as the connection allows.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from pykvm.errors import (
    HostError,
    KvmError,
    MigrationError,
    PykvmError,
    UsageError,
    VerificationError,
    WireError,
)
from pykvm.machine import Machine, SlotFlags, System
from pykvm.machine.state import MachineState, VcpuState
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.migrate import wire
from pykvm.migrate.adoption import adopt_workload
from pykvm.migrate.channel import Channel
from pykvm.migrate.guest import Adopt, Findings, Guest
from pykvm.migrate.messages import (
    PAGES_NAMED,
    WORD,
    Abort,
    Accept,
    Corruption,
    DigestsEnd,
    Failed,
    Handover,
    Hello,
    MachineStateMessage,
    Message,
    Mismatch,
    Ready,
    Report,
    Round,
    RoundDone,
    RoundEnd,
    Running,
    VcpuStateMessage,
    Verified,
    reason_of,
)
from pykvm.migrate.pages import PageReceiver
from pykvm.migrate.proof import RECORD, Comparison, digest_range
from pykvm.migrate.result import GuestChecks, Phase, Progress, ProgressCallback, ReceiveResult
from pykvm.migrate.wire import FrameType

M = TypeVar("M", bound=Message)

DEFAULT_MAX_MEMORY = 64 << 30
MAX_CHECK_SECONDS = 3600.0
_PROGRESS_SECONDS = 0.1


@dataclass(frozen=True)
class Acceptance:
    """What this side is willing to spend: guest memory as the guest sees it, and as the host pays for it.

    ``max_memory``: bytes of memory, and bytes of all memslots; KVM itself needs about 1/400 of the latter.
    ``max_resident``: bytes of pages that may be filled; None means what the host has available at the start,
    less an eighth.
    """

    max_memory: int = DEFAULT_MAX_MEMORY
    max_resident: int | None = None

    def resident(self) -> int:
        """The limit in bytes on pages that are really filled."""
        return _available() * 7 // 8 if self.max_resident is None else self.max_resident


class ReceivedGuest:
    """A guest that arrived and runs here; a context manager that closes it."""

    def __init__(self, guest: Guest, result: ReceiveResult) -> None:
        self.guest = guest
        self.result = result

    def close(self) -> None:
        """Stop the guest and free everything."""
        self.guest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def receive(
    system: System,
    channel: Channel,
    *,
    acceptance: Acceptance | None = None,
    adopt: Adopt = adopt_workload,
    check_seconds: float = 1.0,
    progress: ProgressCallback | None = None,
) -> ReceivedGuest:
    """Take over the guest that comes through ``channel``, which is closed in the end.

    Returns after the guest ran here for ``check_seconds`` (or ended) and its findings went to the source; it
    runs on.  ``adopt`` makes a guest of the filled machine, by default a workload.

    Raises, with nothing left here and nothing ever run: MigrationError and its kin, VerificationError,
    HostError and KvmError (this host cannot hold the guest).  Raises the guest's own failure to start.
    """
    if not 0 <= check_seconds <= MAX_CHECK_SECONDS:
        raise UsageError(f"A check of {check_seconds} s: it must be 0 to {MAX_CHECK_SECONDS:g}.")
    try:
        return _Destination(system, channel, acceptance or Acceptance(), adopt, progress).run(check_seconds)
    finally:
        channel.finish()


class _Destination:
    def __init__(
        self,
        system: System,
        channel: Channel,
        acceptance: Acceptance,
        adopt: Adopt,
        progress: ProgressCallback | None,
    ) -> None:
        self._system = system
        self._channel = channel
        self._acceptance = acceptance
        self._adopt = adopt
        self._progress = progress
        self._rounds = 0
        self._pages = 0
        self._reported = 0.0
        self._started = False

    # --- the course of events ----------------------------------------------------------------------

    def run(self, check_seconds: float) -> ReceivedGuest:
        began = time.monotonic()
        with contextlib.ExitStack() as cleanup:
            try:
                hello = self._hello()
                memory, machine = self._build(hello, cleanup)
                Accept(machine.backend).send(self._channel)
                self._copy(PageReceiver(memory, self._acceptance.resident()))
                root = self._prove(memory)
                guest = self._load(hello, machine, memory)
                cleanup.callback(guest.close)
                before = guest.report()
                Ready().send(self._channel)
                self._tell(Phase.HANDOVER)
                self._expect(Handover)
                self._started = True
                guest.runner.start()
            except BaseException as error:
                self._give_up(error, self._started)
                raise
            informed = self._announce(check_seconds)
            self._tell(Phase.CHECK)
            checks = self._check(guest, before, check_seconds)
            informed = informed and self._report(checks)
            cleanup.pop_all()
        result = ReceiveResult(
            verified=True,
            backend=machine.backend,
            source_backend=hello.backend,
            rounds=self._rounds,
            total_seconds=time.monotonic() - began,
            bytes_received=self._channel.bytes_received,
            pages_received=self._pages,
            pages_total=memory.size // PAGE_SIZE,
            digest=root,
            source_informed=informed,
            guest=checks,
        )
        self._tell(Phase.DONE)
        return ReceivedGuest(guest, result)

    def _hello(self) -> Hello:
        self._tell(Phase.CONNECT)
        hello = self._expect(Hello)
        self._examine(hello)
        return hello

    def _examine(self, hello: Hello) -> None:
        """Refuse what this side cannot or will not hold, before anything is allocated."""
        limit = self._acceptance.max_memory
        if hello.page_size != PAGE_SIZE or hello.memory % PAGE_SIZE:
            raise WireError(f"The memory must consist of pages of {PAGE_SIZE} bytes.")
        # The kernel's own memory grows with the slots, however often they show the same pages.
        size = max(hello.memory, sum(slot.size for slot in hello.slots))
        if size > limit:
            raise MigrationError(
                f"The guest has {size >> 20} MiB of memory, and this side takes at most "
                f"{limit >> 20} MiB; raise the limit there."
            )
        if not hello.slots or not hello.vcpus:
            raise WireError("The machine must have a memslot and a vCPU.")
        if len(set(hello.vcpus)) != len(hello.vcpus) or len({s.id for s in hello.slots}) != len(hello.slots):
            raise WireError("The machine has two vCPUs or two memslots of the same number.")
        ends = 0
        for slot in sorted(hello.slots, key=lambda slot: slot.gpa):
            if slot.gpa % PAGE_SIZE or slot.size % PAGE_SIZE or slot.offset % PAGE_SIZE:
                raise WireError(f"Memslot {slot.id} does not consist of whole pages.")
            if slot.gpa < ends or slot.offset + slot.size > hello.memory:
                raise WireError(f"Memslot {slot.id} overlaps another one or leaves the memory.")
            ends = slot.gpa + slot.size

    def _build(self, hello: Hello, cleanup: contextlib.ExitStack) -> tuple[GuestMemory, Machine]:
        """Machine, memory, slots and vCPUs; freed by ``cleanup``."""
        try:
            memory = GuestMemory(hello.memory)
            cleanup.callback(memory.close)
            machine = cleanup.enter_context(self._system.create_machine())
            for slot in hello.slots:
                machine.create_slot(
                    memory,
                    slot.gpa,
                    size=slot.size,
                    memory_offset=slot.offset,
                    slot_id=slot.id,
                    flags=SlotFlags.READONLY if slot.readonly else SlotFlags.NONE,
                )
            for vcpu in hello.vcpus:
                machine.create_vcpu(vcpu)
        except (KvmError, HostError, UsageError) as error:
            raise MigrationError(f"This host cannot make the machine: {error}") from error
        return memory, machine

    def _copy(self, receiver: PageReceiver) -> None:
        """Rounds until the final one is through."""
        final = False
        while not final:
            begin = self._expect(Round)
            self._rounds += 1
            if begin.number != self._rounds:
                raise WireError(f"Round {begin.number} came where round {self._rounds} was due.")
            final = begin.final
            receiver.begin()
            while (end := self._page_frame(receiver)) is None:
                self._tell_pages(receiver.pages)
            if (end.pages, end.zeros) != (receiver.pages, receiver.zeros):
                raise WireError(f"Round {begin.number} ended with other pages than it announced.")
            self._pages += receiver.pages
            RoundDone(begin.number).send(self._channel)

    def _page_frame(self, receiver: PageReceiver) -> RoundEnd | None:
        """Take one frame of a round; what it ended with if it did."""
        frame = self._channel.receive()
        if frame.type in (FrameType.PAGES, FrameType.ZEROS):
            receiver.store(frame)
            return None
        return self._parse(frame.type, frame.head, RoundEnd)

    def _prove(self, memory: GuestMemory) -> str:
        """Compare the source's digests with our own, page by page; the root digest if all agree."""
        self._tell(Phase.VERIFY)
        total = memory.size // PAGE_SIZE
        comparison = Comparison()
        first = 0
        while first < total:
            frame = self._channel.receive()
            if frame.type is not FrameType.DIGESTS:
                self._parse(frame.type, frame.head)
            end = wire.parse_range(frame.head, first, total)
            comparison.add(digest_range(memory, first, end), np.frombuffer(frame.body, dtype=RECORD))
            first = end
        theirs = self._expect(DigestsEnd)
        ours = comparison.root.hex()
        if comparison.count:
            Mismatch(ours, comparison.count, tuple(comparison.pages)).send(self._channel)
            named = ", ".join(f"{page:#x}" for page in comparison.pages[:8])
            raise VerificationError(f"{comparison.count} pages differ from the source's: page {named}.")
        if theirs.root != ours:
            raise WireError("The source's digest over all pages does not fit its digests of each.")
        Verified(ours).send(self._channel)
        return ours

    def _load(self, hello: Hello, machine: Machine, memory: GuestMemory) -> Guest:
        """Load all state; afterwards the guest would run with the next instruction."""
        self._tell(Phase.STATE)
        try:
            for vcpu in machine.vcpus:
                message = self._expect(VcpuStateMessage)
                if message.id != vcpu.id:
                    raise WireError(f"The state of vCPU {message.id} came where {vcpu.id}'s was due.")
                vcpu.load_state(VcpuState.from_json(message.state))
            machine.load_state(MachineState.from_json(self._expect(MachineStateMessage).state))
            return self._adopt(machine, memory, hello.guest)
        except UsageError as error:
            raise WireError(f"The guest's state is not acceptable: {error}") from error
        except KvmError as error:
            raise MigrationError(f"This host does not accept the guest's state: {error}") from error

    # --- after the switch-over ---------------------------------------------------------------------

    def _announce(self, check_seconds: float) -> bool:
        """Tell the source that the guest runs; whether that worked.  The guest is ours either way."""
        try:
            Running(check_seconds).send(self._channel)
        except MigrationError:
            return False
        return True

    def _check(self, guest: Guest, before: Findings, seconds: float) -> GuestChecks:
        """Let the guest run and check for a while; what it found since it runs here."""
        failure = ""
        try:
            guest.runner.wait(seconds)
        except PykvmError as error:
            failure = reason_of(error)
        after = guest.report()
        news = [item for item in after.corruptions if item not in before.corruptions][:PAGES_NAMED]
        return GuestChecks(
            checks=_word(after.checks - before.checks),
            corruptions=_word(after.corruption_count - before.corruption_count),
            examples=tuple(Corruption.of(item) for item in news),
            failure=failure,
        )

    def _report(self, checks: GuestChecks) -> bool:
        try:
            Report(checks.checks, checks.corruptions, checks.examples, checks.failure).send(self._channel)
        except MigrationError:
            return False
        return True

    # --- messages ----------------------------------------------------------------------------------

    def _expect(self, kind: type[M]) -> M:
        frame = self._channel.receive()
        return self._parse(frame.type, frame.head, kind)

    def _parse(self, found: FrameType, head: bytes, *kinds: type[M]) -> M:
        """The message if it is of one of these kinds.  Raises MigrationError for ABORT, else WireError."""
        if found is FrameType.ABORT:
            raise MigrationError(f"The source gave up: {Abort.parse(head).reason}")
        for kind in kinds:
            if found is kind.frame:
                return kind.parse(head)
        due = " or ".join(kind.frame.name for kind in kinds) or "DIGESTS"
        raise WireError(f"The source sent {found.name} where {due} was due.")

    def _give_up(self, error: BaseException, started: bool) -> None:
        with contextlib.suppress(MigrationError):
            Failed(reason_of(error), started).send(self._channel)

    # --- progress ----------------------------------------------------------------------------------

    def _tell(self, phase: Phase, pages: int = 0) -> None:
        if self._progress is None:
            return
        try:
            self._progress(
                Progress(
                    phase, round=self._rounds, pages_done=pages, bytes_total=self._channel.bytes_received
                )
            )
        except Exception:
            # Once the guest is ours alone, a display that fails must not end it.
            if not self._started:
                raise

    def _tell_pages(self, pages: int) -> None:
        now = time.monotonic()
        if now - self._reported >= _PROGRESS_SECONDS:
            self._reported = now
            self._tell(Phase.COPY, pages)


def _word(number: int) -> int:
    """A count that a guest's memory yielded, within 64 bits."""
    return max(0, min(number, WORD))


def _available() -> int:
    """Bytes of memory that the host could give without swapping (MemAvailable, proc_meminfo(5))."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise HostError("/proc/meminfo has no MemAvailable; give the limit on resident memory.")
