"""``pykvm crosscheck``: hold the model, the real KVM and the host's processor against each other."""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pykvm.backends import open_system
from pykvm.cli.mmu import open_model
from pykvm.cli.parameters import duration_type, number_type
from pykvm.cli.sending import check_writable, write_text
from pykvm.cli.session import Session, common_options
from pykvm.cli.walks import explain
from pykvm.crosscheck.compare import Level
from pykvm.crosscheck.instructions.bench import Kind, processor
from pykvm.crosscheck.instructions.campaign import ROOMS, Campaign, Disagreement, Report
from pykvm.crosscheck.instructions.case import InstructionCase
from pykvm.crosscheck.instructions.coverage import markdown, room_name
from pykvm.crosscheck.mass import ScenarioReport, run_scenarios
from pykvm.crosscheck.mmu_mass import MmuReport, run_mmu_scenarios
from pykvm.crosscheck.paging_cases import Runnable
from pykvm.crosscheck.paging_run import Subject, run_paging
from pykvm.crosscheck.saved import SavedPaging, save_case
from pykvm.errors import DisagreementError, HostError, UsageError
from pykvm.machine import System
from pykvm.model.oracle import InstructionOracle
from pykvm.model.system import ModelSystem
from pykvm.report.text import count_text, plural

_SHARES: Final = {"instructions": 0.5, "paging": 0.2, "scenarios": 0.3}
"""How ``--kind all`` shares the time."""
_MOST_SHOWN: Final = 10
_Item = TypeVar("_Item")


class _Run:
    """One run of the command: the machines, what was found, and where it is told."""

    def __init__(self, session: Session, kvm: System | None, seed: int, save: Path) -> None:
        self.session = session
        self.kvm = kvm
        self.model = ModelSystem()
        self.seed = seed
        self.save = save
        self.cases = 0
        self.seconds = 0.0
        self.found: list[dict[str, Any]] = []
        self.unexplained = 0
        self.left_out: list[str] = []
        self._live: Live | None = None
        self._told = 0.0

    def tell(self, text: str) -> None:
        """Progress: one line that changes on a terminal, elsewhere a line now and then."""
        if self._live is not None:
            self._live.update(Text(text), refresh=True)
        elif time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            self.session.note(text)

    def work(self, job: Callable[[], None]) -> None:
        """Run the job with a line of progress; its time counts."""
        console = self.session.progress
        begin = time.monotonic()
        self._told = begin
        try:
            if console.is_terminal:
                with Live(console=console, auto_refresh=False, transient=True) as self._live:
                    job()
            else:
                job()
        finally:
            self._live = None
            self.seconds += time.monotonic() - begin

    def disagree(self, kind: str, text: str, path: Path | None, details: dict[str, Any]) -> None:
        """Note a disagreement that nothing explains."""
        replay = f"pykvm replay {path}" if path is not None else ""
        self.found.append({"kind": kind, "text": text, "replay": replay, **details})
        self.session.out.print(f"{text}\n  {replay}", markup=False, soft_wrap=True)

    # --- the kinds -----------------------------------------------------------------------------------------

    def instructions(self, seconds: float | None, cases: int | None, modes: Iterable[int]) -> Report:
        """Single instructions on all processors."""
        systems = [self.model, *([self.kvm] if self.kvm is not None else [])]
        cpuid = processor(self.model)
        campaign = Campaign(
            systems,
            InstructionOracle(cpuid),
            cpuid,
            seed=self.seed,
            rooms=[room for room in ROOMS if room[0] in modes],
            progress=lambda report: self.tell(
                f"instructions: {plural(report.cases, 'case')}, {report.unexplained} unexplained"
            ),
            found=self._keep_instruction,
        )
        report = campaign.run(seconds=seconds, cases=cases)
        self.cases += report.cases
        self.unexplained += report.unexplained
        self.left_out += report.left_out
        for room in report.rooms:
            for form, count in room.missing.items():
                self.unexplained += count
                text = f"The model lacks {form} in {room_name(room)} ({plural(count, 'case')})."
                self.disagree("instructions", text, None, {"form": form})
        return report

    def _keep_instruction(self, found: Disagreement) -> None:
        path = self.save / f"instruction-{self.seed}-{len(self.found)}.json"
        self._write(found.case, path)
        self.disagree("instructions", f"{found.text}: {found.verdict}", path, {"form": found.form})

    def _write(self, case: InstructionCase | SavedPaging, path: Path) -> None:
        try:
            self.save.mkdir(parents=True, exist_ok=True)
            save_case(case, path)
        except OSError as error:
            raise UsageError(f"Cannot write {path}: {error.strerror}; choose another --save.") from error

    def paging(self, kvm: System, seconds: float | None, cases: int | None) -> dict[str, Any]:
        """Page-table cases on model and KVM."""
        runnable = Runnable(Subject.of(kvm, self.model).features)
        result = run_paging(
            kvm,
            self.model,
            _until(seconds, cases, runnable.shuffled(self.seed)),
            progress=lambda count: self.tell(
                f"paging: {plural(count, 'case')} of {count_text(len(runnable))}"
            ),
            explain=explain,
        )
        self.cases += result.cases
        self.unexplained += len(result.disagreements)
        self.left_out += [f"paging: {each}" for each in result.left_out]
        for each in result.disagreements[:_MOST_SHOWN]:
            path = self.save / f"paging-{each.case.index}.json"
            self._write(SavedPaging(each.case.index), path)
            self.disagree("paging", str(each), path, {"index": each.case.index})
        known = Counter(each.known for each in result.differences if each.known)
        return {"cases": result.cases, "product": len(runnable), "known": dict(known.most_common())}

    def scenarios(self, kvm: System, seconds: float) -> ScenarioReport:
        """Whole scenarios on model and KVM."""
        report = run_scenarios(
            kvm,
            self.model,
            seconds=seconds,
            seed=self.seed,
            directory=self.save,
            progress=lambda report: self.tell(
                f"scenarios: {plural(report.cases, 'case')}, {len(report.disagreements)} unexplained"
            ),
        )
        self.cases += report.cases
        self.unexplained += len(report.disagreements)
        for each in report.disagreements:
            self.disagree("scenarios", str(each), Path(each.file), {})
        return report

    def mmu(self, kvm: System, seconds: float, count: int | None, level: Level) -> MmuReport:
        """Scenarios of KVM's MMU, on the model that is like this host and on KVM."""
        with open_model(kvm) as model:
            self.session.note(f"model of {model.description}")
            report = run_mmu_scenarios(
                kvm,
                model,
                seconds=seconds,
                seed=self.seed,
                directory=self.save,
                level=level,
                count=count,
                progress=lambda report: self.tell(
                    f"scenarios: {plural(report.cases, 'case')}, {plural(report.steps, 'step')}, "
                    f"{len(report.disagreements)} unexplained"
                ),
            )
        self.cases += report.cases
        self.unexplained += len(report.disagreements)
        for each in report.disagreements:
            self.disagree("scenarios", str(each), Path(each.file), {"level": each.level.value})
        return report


def _until(seconds: float | None, cases: int | None, items: Iterable[_Item]) -> Iterator[_Item]:
    """The items until the time or their number is up."""
    deadline = None if seconds is None else time.monotonic() + seconds
    for number, item in enumerate(items):
        if (cases is not None and number >= cases) or (deadline and time.monotonic() >= deadline):
            return
        yield item


def _open_kvm(session: Session) -> System | None:
    """The real KVM, or None with a note why not."""
    if session.backend == "model":
        return None
    system = open_system(session.backend)
    if system.backend == "kvm":
        return system
    session.note(f"Without a real KVM: {system.description}.")
    return None


@click.command("crosscheck", short_help="Compare the model, the real KVM and the host's processor.")
@click.option(
    "--seconds",
    type=duration_type(minimum=0.1),
    default="60s",
    show_default=True,
    help="About how long to compare.",
)
@click.option("--seed", type=number_type(), help="The same seed gives the same cases; by default a new one.")
@click.option(
    "--kind",
    type=click.Choice(["all", *_SHARES]),
    default="all",
    show_default=True,
    help="What to compare: single instructions, page walks, whole scenarios, or all, sharing the time.",
)
@click.option(
    "--cases",
    "--count",
    "cases",
    type=number_type(1, 10**9),
    help="End after so many instruction cases in each mode, page walks, or scenarios of a --level, even if "
    "time is left.",
)
@click.option(
    "--level",
    type=click.Choice([Level.L2.value, Level.L3.value]),
    help="Compare scenarios with the model of this host's MMU: the order of ring entries (L2), or also all "
    "deterministic counters after each step (L3). By default: with the architecture.",
)
@click.option(
    "--mode",
    type=click.Choice(["all", "64", "32", "16"]),
    default="all",
    show_default=True,
    help="Bits of the code of instruction cases; 16 is real mode.",
)
@click.option(
    "--save",
    type=click.Path(file_okay=False, path_type=Path),
    default="crosscheck-failures",
    show_default=True,
    help="Directory for the cases that nobody can explain, made when there is one.",
)
@click.option(
    "--coverage",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the coverage table of instruction cases into this file.",
)
@common_options
def command(
    session: Session,
    seconds: float,
    seed: int | None,
    kind: str,
    cases: int | None,
    mode: str,
    save: Path,
    coverage: Path | None,
    level: str | None,
) -> None:
    """Run random cases on the reference model, on real KVM and on the host's own processor, and compare.

    Known differences are counted; docs/crosscheck.md tells what they are. A case that nobody can explain is
    made as small as possible, saved for 'pykvm replay', and ends the command with status 13.
    """
    seed = secrets.randbelow(2**32) if seed is None else seed
    kinds = list(_SHARES) if kind == "all" else [kind]
    if coverage is not None and "instructions" not in kinds:
        raise UsageError("Only instruction cases have a coverage table; leave out --coverage or --kind.")
    if level is not None and "scenarios" not in kinds:
        raise UsageError("Only scenarios have a level; leave out --level or --kind.")
    check_writable(coverage)
    _check_directory(save)
    kvm = _open_kvm(session)
    again = f"--seed {seed} --kind {kind}"
    again += "" if mode == "all" else f" --mode {mode}"
    again += "" if cases is None else f" --cases {cases}"
    again += "" if level is None else f" --level {level}"
    session.note(f"seed {seed}; again with: pykvm crosscheck {again}")
    modes = [64, 32, 16] if mode == "all" else [int(mode)]
    run = _Run(session, kvm, seed, save)
    summary: dict[str, Any] = {}
    try:
        for each in kinds:
            share = seconds * _SHARES[each] if kind == "all" else seconds
            mmu = Level(level) if level is not None else None
            run.work(partial(_one_kind, run, each, share, cases, modes, mmu, summary))
    except KeyboardInterrupt:
        session.document |= {"seed": seed, "kinds": kinds, "disagreements": run.found}
        raise
    finally:
        run.model.close()
        if kvm is not None:
            kvm.close()
    report: Report | None = summary.pop("report", None)
    if report is not None:
        if coverage is not None:
            write_text(coverage, markdown(report))
        _show(session, report)
    _show_others(session, summary)
    session.document |= {
        "seed": seed,
        "kinds": kinds,
        "cases": run.cases,
        "seconds": run.seconds,
        "cases_per_second": run.cases / run.seconds if run.seconds else 0.0,
        "unexplained": run.unexplained,
        "disagreements": run.found,
        "coverage": summary,
        "left_out": run.left_out,
    }
    for text in run.left_out:
        session.note(f"left out: {text}")
    session.out.print(
        f"{plural(run.cases, 'case')} in {run.seconds:.0f} s, {run.unexplained} without an explanation."
    )
    if not run.cases:
        raise HostError(
            "Nothing was compared, since only the model can run these cases here; 'left out' says why."
        )
    if run.unexplained:
        raise DisagreementError(
            f"{plural(run.unexplained, 'case')} of seed {seed} disagree and no rule explains them; "
            f"the first is: {run.found[0]['text']}"
        )


def _check_directory(path: Path) -> None:
    """Raises UsageError if it neither is nor can be made a directory to write to."""
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UsageError(f"Cannot write to {path}: '{nearest}' is not a directory that you may write to.")


def _one_kind(
    run: _Run,
    kind: str,
    seconds: float,
    cases: int | None,
    modes: list[int],
    level: Level | None,
    summary: dict[str, Any],
) -> None:
    if kind == "instructions":
        # A number of cases holds whatever time it takes.
        report = run.instructions(None if cases else seconds, cases, modes)
        summary["report"] = report
        summary["instructions"] = [room.to_json() for room in report.rooms]
    elif run.kvm is None:
        run.left_out.append(f"{kind}: there is no real KVM to compare the model with")
    elif kind == "paging":
        summary["paging"] = run.paging(run.kvm, seconds, cases)
    elif level is not None:
        compared = run.mmu(run.kvm, seconds, cases, level)
        summary["mmu"] = {
            "level": level.value,
            "cases": compared.cases,
            "partial": compared.partial,
            "unrepeatable": compared.unrepeatable,
            "cases_per_second": compared.cases / compared.seconds if compared.seconds else 0.0,
            "steps": compared.steps,
            "ring_entries": compared.entries,
            "pages": compared.pages,
            "counters": compared.counters,
            "hit": dict(sorted(compared.coverage.items())),
        }
    else:
        found = run.scenarios(run.kvm, seconds)
        summary["scenarios"] = {
            "cases": found.cases,
            "partial": found.partial,
            "hit": dict(sorted(found.coverage.items())),
        }


def _show(session: Session, report: Report) -> None:
    """Instruction cases by room, and what differed and why."""
    if not report.rooms:
        return
    table = Table(
        "instructions", "processors", "cases", "agree", "known", "alone", "unexplained", "forms hit"
    )
    for room in report.rooms:
        verdicts = room.verdicts
        rest = room.cases - verdicts[Kind.AGREE] - verdicts[Kind.KNOWN] - verdicts[Kind.ALONE]
        known_forms = room.to_json()["forms_known"]
        table.add_row(
            room_name(room),
            ", ".join(room.executors),
            count_text(room.cases),
            count_text(verdicts[Kind.AGREE]),
            count_text(verdicts[Kind.KNOWN]),
            count_text(verdicts[Kind.ALONE]),
            count_text(rest),
            f"{room.forms} of {known_forms}",
        )
    session.out.print(table)
    known = sum((room.known for room in report.rooms), start=type(report.rooms[0].known)())
    for name, count in known.most_common():
        session.out.print(f"  {count:>7,}  {name}", markup=False)


def _show_others(session: Session, summary: dict[str, Any]) -> None:
    """A line for page walks, and one for scenarios."""
    if "paging" in summary:
        paging = summary["paging"]
        session.out.print(
            f"paging: {plural(paging['cases'], 'case')} of {count_text(paging['product'])}, "
            f"{count_text(sum(paging['known'].values()))} with a known difference"
        )
        for why, count in paging["known"].items():
            session.out.print(f"  {count:>7,}  {why}", markup=False)
    if "mmu" in summary:
        mmu = summary["mmu"]
        session.out.print(
            f"scenarios at {mmu['level']}: {plural(mmu['cases'], 'case')}, "
            f"{mmu['cases_per_second']:.0f} a second, {mmu['partial']} in part, "
            f"{mmu['unrepeatable']} differed once only; compared: "
            f"{plural(mmu['steps'], 'step')}, {plural(mmu['pages'], 'reported page')}, "
            f"{count_text(mmu['ring_entries'])} ring entries, {count_text(mmu['counters'])} counters"
        )
    if "scenarios" in summary:
        scenarios = summary["scenarios"]
        kinds = Counter(name.split()[0] for name in scenarios["hit"])
        hit = ", ".join(plural(count, kind) for kind, count in sorted(kinds.items()))
        whole = f"{plural(scenarios['cases'], 'case')}, {count_text(scenarios['partial'])} of them in part"
        session.out.print(f"scenarios: {whole}; {hit}")
