"""The progress of a migration while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.live import Live
from rich.text import Text

from pykvm.cli.session import Session
from pykvm.migrate import Phase, Progress, RoundResult
from pykvm.report.text import count_text, plural, rate_text, seconds_text

_PHASES = {
    Phase.CONNECT: "connecting",
    Phase.COPY: "copying",
    Phase.PAUSE: "pausing the guest",
    Phase.VERIFY: "comparing the digests of all pages",
    Phase.STATE: "moving the state of the vCPUs",
    Phase.HANDOVER: "handing over",
    Phase.CHECK: "the guest runs at the destination and checks its memory",
    Phase.DONE: "done",
}


class ProgressDisplay:
    """The newest progress in one line of a terminal; elsewhere a line for each phase and finished round."""

    def __init__(self, session: Session) -> None:
        self._console = session.progress
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._phase: Phase | None = None
        self.rounds: list[RoundResult] = []

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.completed is not None:
            self.rounds.append(progress.completed)
        if self._console.is_terminal:
            done = progress.completed
            self._live.update(Text(_round_text(done) if done else _progress_text(progress)), refresh=True)
        elif progress.completed is not None:
            self._console.print(_round_text(progress.completed), markup=False)
        elif progress.phase is not self._phase and progress.phase is not Phase.COPY:
            self._console.print(_progress_text(progress), markup=False)
        self._phase = progress.phase


def _progress_text(progress: Progress) -> str:
    if progress.phase is not Phase.COPY:
        return f"{_PHASES[progress.phase]} …" if progress.phase is not Phase.DONE else "done"
    text = f"round {progress.round}: {count_text(progress.pages_done)}"
    if progress.pages_total:
        text += f" of {count_text(progress.pages_total)}"
    text += " pages"
    if progress.rate:
        text += f", {rate_text(progress.rate)}"
    if progress.estimate is not None:
        text += f", about {seconds_text(progress.estimate)} left"
    return text


def _round_text(done: RoundResult) -> str:
    text = (
        f"round {done.number}: {plural(done.pages + done.zero_pages, 'page')} in {seconds_text(done.seconds)}"
    )
    return text if done.final else f"{text}, {count_text(done.pages_dirtied)} dirtied meanwhile"
