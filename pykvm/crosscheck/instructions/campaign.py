"""Many cases on all processors: how many, what they covered, and what nobody can explain."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pykvm.crosscheck.instructions.bench import UNEXPLAINED, Bench, Kind, Verdict
from pykvm.crosscheck.instructions.case import InstructionCase
from pykvm.crosscheck.instructions.compare import Oracle, describe
from pykvm.crosscheck.instructions.generate import Generated, Generator, forms_of
from pykvm.crosscheck.instructions.shrink import shrink
from pykvm.machine import System
from pykvm.x86.cpuid import CpuidEntry

ROOMS: Final = ((64, 3), (32, 3), (64, 0), (32, 0), (16, 0))
"""Mode and CPL of the cases, in the order in which they take turns."""
_BATCH: Final = 50
_MOST_SHOWN: Final = 100


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A case that nobody can explain, shrunk; ``form`` is its row in the coverage table."""

    form: str
    verdict: Verdict
    case: InstructionCase
    text: str

    def to_json(self) -> dict[str, Any]:
        """The case with what was found."""
        return {
            "form": self.form,
            "kind": self.verdict.kind.value,
            "instruction": self.text,
            "differences": self.verdict.words,
            "case": self.case.to_json(),
        }


@dataclass(slots=True)
class Room:
    """What happened in one mode and CPL."""

    mode: int
    cpl: int
    executors: tuple[str, ...]
    cases: int = 0
    seconds: float = 0.0
    verdicts: Counter[Kind] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    coverage: Counter[tuple[str, str]] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    unrepeatable: int = 0
    """Disagreements that were not there when the case ran again, such as time-outs on a busy host."""

    @property
    def forms(self) -> int:
        """How many forms were hit."""
        return len({form for form, _ in self.coverage})

    def to_json(self) -> dict[str, Any]:
        """Counts by what they count."""
        return {
            "mode": self.mode,
            "cpl": self.cpl,
            "executors": list(self.executors),
            "cases": self.cases,
            "seconds": self.seconds,
            "cases_per_second": self.cases / self.seconds if self.seconds else None,
            "forms": self.forms,
            "forms_known": len({form.id for form in forms_of(self.mode, self.cpl)}),
            "operand_forms": len(self.coverage),
            "verdicts": {kind.value: count for kind, count in sorted(self.verdicts.items(), key=str)},
            "known": dict(self.known.most_common()),
            "unrepeatable": self.unrepeatable,
            "missing": dict(self.missing.most_common()),
        }


@dataclass(slots=True)
class Report:
    """The rooms, and the unexplained disagreements: one case per form, room and kind."""

    rooms: list[Room]
    disagreements: list[Disagreement] = field(default_factory=list)
    unexplained: int = 0
    left_out: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(room.cases for room in self.rooms)


Progress = Callable[[Report], object]


class Campaign:
    """Random cases in turns over the rooms, until the time or the number of cases is up."""

    def __init__(
        self,
        systems: Sequence[System],
        oracle: Oracle,
        cpuid: Sequence[CpuidEntry],
        *,
        seed: int,
        rooms: Iterable[tuple[int, int]] = ROOMS,
        host: bool = True,
        progress: Progress | None = None,
        found: Callable[[Disagreement], object] | None = None,
    ) -> None:
        """``progress`` hears after each round of the rooms, ``found`` of each case that is kept."""
        self._systems, self._oracle, self._cpuid, self._host = systems, oracle, cpuid, host
        self._seed = seed
        self._rooms = tuple(rooms)
        self._progress = progress
        self._found = found
        self._seen: set[tuple[int, int, str, Kind]] = set()

    def run(self, *, seconds: float | None = None, cases: int | None = None) -> Report:
        """Run for about ``seconds``, or ``cases`` in each room, whichever ends first."""
        report = Report([])
        deadline = None if seconds is None else time.monotonic() + seconds
        benches = [
            Bench(mode, cpl, self._systems, self._oracle, self._cpuid, host=self._host)
            for mode, cpl in self._rooms
        ]
        try:
            report.left_out = sorted({text for bench in benches for text in bench.left_out})
            report.left_out += [
                f"instructions: {bench.mode}-bit code at CPL {bench.cpl} runs on the model only"
                for bench in benches
                if len(bench.names) == 1
            ]
            compared = [bench for bench in benches if len(bench.names) > 1]
            report.rooms = [Room(bench.mode, bench.cpl, bench.names) for bench in compared]
            generators = [Generator(bench.mode, bench.cpl, self._seed) for bench in compared]
            while True:
                open_rooms = 0
                for bench, room, generator in zip(compared, report.rooms, generators, strict=True):
                    if deadline is not None and time.monotonic() >= deadline:
                        return report
                    count = _BATCH if cases is None else min(_BATCH, cases - room.cases)
                    open_rooms += count > 0
                    self._batch(report, bench, room, generator, count)
                if self._progress is not None:
                    self._progress(report)
                if not open_rooms:
                    return report
        finally:
            for bench in benches:
                bench.close()

    def _batch(self, report: Report, bench: Bench, room: Room, generator: Generator, count: int) -> None:
        begin = time.monotonic()
        for _ in range(count):
            made = generator.next()
            verdict = bench.judge(made.case)
            room.cases += 1
            room.verdicts[verdict.kind] += 1
            room.coverage[made.form.id, made.operands] += 1
            if verdict.known is not None:
                room.known[verdict.known.name] += 1
            if verdict.kind is Kind.MISSING:
                room.missing[made.form.id] += 1
            elif verdict.kind in UNEXPLAINED:
                if bench.judge(made.case).kind is not verdict.kind:
                    room.unrepeatable += 1
                    continue
                report.unexplained += 1
                self._keep(report, bench, made, verdict)
        room.seconds += time.monotonic() - begin

    def _keep(self, report: Report, bench: Bench, made: Generated, verdict: Verdict) -> None:
        key = (bench.mode, bench.cpl, made.form.id, verdict.kind)
        if key in self._seen or len(report.disagreements) >= _MOST_SHOWN:
            return
        self._seen.add(key)
        case = shrink(made.case, lambda smaller: bench.judge(smaller).kind is verdict.kind)
        text = describe(case, self._oracle)
        report.disagreements.append(Disagreement(made.form.id, bench.judge(case), case, text))
        if self._found is not None:
            self._found(report.disagreements[-1])
