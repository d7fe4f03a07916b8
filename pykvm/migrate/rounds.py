"""The copying: rounds with the guest running, then one with the guest paused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from pykvm.errors import MigrationError, WireError
from pykvm.machine import DirtyPages
from pykvm.memory import PAGE_SIZE
from pykvm.migrate.guest import Guest
from pykvm.migrate.messages import Round, RoundDone, RoundEnd
from pykvm.migrate.pages import PageSender, SlotMap, allocated_pages, batches
from pykvm.migrate.policy import Decision, Policy, RateMeter
from pykvm.migrate.result import Phase, Progress, RoundResult, heat_of
from pykvm.migrate.sabotage import LostPage
from pykvm.migrate.session import Session
from pykvm.migrate.wire import Pages
from pykvm.track import Tracker

REARM_PAGES = 4096
"""Pages re-armed at a time, just before they are read (16 MiB): few calls, and little is sent twice."""
_PROGRESS_SECONDS = 0.1

Report = Callable[[Progress], None]


class Copier:
    """Sends a guest's memory in rounds; remembers what each took and what the guest dirtied meanwhile."""

    def __init__(
        self,
        guest: Guest,
        tracker: Tracker,
        session: Session,
        policy: Policy,
        report: Report,
        lost_page: LostPage | None = None,
    ) -> None:
        self._guest = guest
        self._tracker = tracker
        self._session = session
        self._policy = policy
        self._report = report
        self._lost_page = lost_page
        self._slots = SlotMap(guest.machine.slots, guest.memory)
        self._sender = PageSender(guest.memory, session.channel)
        if lost_page:
            self._sender.last_sent = lost_page.sent
        self._meter = RateMeter()
        self._dirty = DirtyPages()
        self._reported = 0.0
        self.rounds: list[RoundResult] = []
        self.decision = Decision.CONTINUE
        self.pages_total = guest.memory.size // PAGE_SIZE
        self.pages_allocated = guest.memory.allocated // PAGE_SIZE

    def copy_running(self) -> None:
        """Arm the tracker and send rounds until the policy says that the rest is for the final one."""
        self._tracker.arm(self._guest.machine)
        # A tracker may begin with everything marked.  Round 1 sends all that is allocated after this line.
        self._tracker.rearm(self._tracker.collect())
        batch = self._policy.frame_pages
        self._round(allocated_pages(self._guest.memory, batch), self.pages_allocated, zeros=False)
        while self._decide() is Decision.CONTINUE:
            self._round(self._rearmed(self._dirty, batch), len(self._dirty))

    def copy_final(self) -> None:
        """Send what is left of a paused guest."""
        pages = self._slots.pages(self._dirty | self._tracker.collect(final=True))
        if self._lost_page:
            pages = self._lost_page.drop(pages, self._run_a_little)
        self._round(batches(pages, self._policy.frame_pages), len(pages), final=True)

    def gfn_name(self, page: int) -> str:
        """How messages call a page of the memory."""
        gfn = self._slots.gfn(page)
        return f"page {page:#x} of the memory (in no slot)" if gfn is None else f"gfn {gfn:#x}"

    # --- inside ----------------------------------------------------------------------------------

    def _decide(self) -> Decision:
        self.decision = self._policy.decide(len(self.rounds), len(self._dirty) * PAGE_SIZE, self._meter.rate)
        return self.decision

    def _run_a_little(self, seconds: float) -> Pages:
        self._guest.runner.resume()
        time.sleep(seconds)
        self._guest.runner.pause()
        return self._slots.pages(self._tracker.collect(final=True))

    def _rearmed(self, dirty: DirtyPages, batch: int) -> Iterable[Pages]:
        """The pages of ``dirty`` in batches, each re-armed before it is handed out to be read."""
        for slot in dirty.slots:
            for gfns in batches(dirty.gfns(slot), REARM_PAGES):
                self._tracker.rearm(DirtyPages({slot: gfns}))
                yield from batches(self._slots.pages_of(slot, gfns), batch)

    def _round(self, work: Iterable[Pages], total: int, *, zeros: bool = True, final: bool = False) -> None:
        number = len(self.rounds) + 1
        channel = self._session.channel
        began, bytes_before = time.monotonic(), channel.bytes_sent
        full = empty = 0
        Round(number, final).send(channel)
        for pages in work:
            sent, zero = self._sender.send(pages, zeros=zeros)
            full += sent
            empty += zero
            self._session.check_peer()
            self._tell(number, full + empty, total, began, bytes_before)
        RoundEnd(full, empty if zeros else 0).send(channel)
        if self._session.expect(RoundDone).number != number:
            raise WireError("The destination confirmed another round than the one that was sent.")
        seconds = time.monotonic() - began
        size = channel.bytes_sent - bytes_before
        self._meter.add(size, seconds)
        self._dirty = DirtyPages() if final else self._collect()
        self.rounds.append(
            RoundResult(
                number=number,
                final=final,
                pages=full,
                zero_pages=empty if zeros else 0,
                bytes=size,
                seconds=seconds,
                pages_dirtied=len(self._dirty),
                heat=heat_of(self._slots.pages(self._dirty), self.pages_total),
            )
        )
        self._report(
            Progress(Phase.COPY, round=number, bytes_total=channel.bytes_sent, completed=self.rounds[-1])
        )

    def _collect(self) -> DirtyPages:
        if self._guest.runner.finished:
            raise MigrationError("The guest ended by itself before the migration was through.")
        return self._tracker.collect()

    def _tell(self, number: int, done: int, total: int, began: float, bytes_before: int) -> None:
        now = time.monotonic()
        if now - self._reported < _PROGRESS_SECONDS:
            return
        self._reported = now
        channel = self._session.channel
        elapsed = now - began
        rate = (channel.bytes_sent - bytes_before) / elapsed if elapsed else 0.0
        left = max(0, total - done)
        self._report(
            Progress(
                Phase.COPY,
                round=number,
                pages_done=done,
                pages_total=max(total, done),
                bytes_total=channel.bytes_sent,
                rate=rate,
                estimate=left * elapsed / done if done else None,
            )
        )
