"""``pykvm lab matrix``: the real-KVM tests on kernels times kinds, and the page about it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from pykvm.cli.lab_options import accel_option
from pykvm.cli.lab_progress import bad_lines, counts_text, judge, results_table
from pykvm.cli.lab_test import check_writable, checkout
from pykvm.cli.sending import write_text
from pykvm.cli.session import Session, output_options
from pykvm.errors import LabError, PykvmError, UsageError
from pykvm.lab import kernels, matrix
from pykvm.lab.archive import Archive
from pykvm.lab.cache import Cache
from pykvm.lab.emulators import Accel, choose
from pykvm.lab.kernels import PreparedKernel
from pykvm.lab.kinds import KINDS, kind
from pykvm.lab.matrix import Again, Saved, State, Store, Task
from pykvm.lab.matrix_report import markdown, problems, report
from pykvm.lab.matrix_run import cell_command, run_tasks
from pykvm.lab.results import Case
from pykvm.lab.selections import SELECTIONS, selection
from pykvm.report.matrix import matrix_page
from pykvm.report.text import plural

DEFAULT_PAGE = Path("docs", "support-matrix.md")


class _Progress:
    """A line for each cell as it begins and ends, and for each bad test."""

    def __init__(self, session: Session, total: int) -> None:
        self._session = session
        self._total = total
        self._begun = 0
        self._counts: dict[str, Counter[str]] = {}

    @staticmethod
    def _name(task: Task) -> str:
        return f"{task.kind.name}, Linux {task.kernel.series}"

    def started(self, task: Task) -> None:
        self._begun += 1
        self._counts[self._name(task)] = Counter()
        self._session.note(f"{self._name(task)}: cell {self._begun} of {self._total} begins ({task.why})")

    def note(self, task: Task, text: str) -> None:
        self._session.note(f"{self._name(task)}: {text}")

    def case(self, task: Task, case: Case, done: int, collected: int) -> None:
        self._counts[self._name(task)][case.outcome] += 1
        if case.bad:
            self.note(task, f"{case.outcome} {case.nodeid}: {case.reason}")
        elif done % 50 == 0:
            self.note(task, f"{done} of {collected} tests")

    def ended(self, task: Task, error: str) -> None:
        self.note(task, error or f"done, {counts_text(self._counts[self._name(task)])}")


@click.command(
    "matrix", short_help="Run the real-KVM tests on kernels times kinds and write a page about it."
)
@click.option(
    "--kernel",
    "series",
    multiple=True,
    help="Kernel series (6.12); may be repeated.  [default: all that are prepared, else all offered ones]",
)
@click.option(
    "--kvm",
    "kind_names",
    type=click.Choice(list(KINDS)),
    multiple=True,
    help="The kind of KVM; may be repeated.  [default: all]",
)
@click.option(
    "--selection",
    "selection_name",
    type=click.Choice(list(SELECTIONS)),
    default="core",
    show_default=True,
    help="Which tests; under Bochs a smaller selection takes its place.",
)
@click.option(
    "--jobs", type=click.IntRange(1, 16), default=1, show_default=True, help="Labs to run side by side."
)
@click.option(
    "--again",
    type=click.Choice(["older", "failed", "all"]),
    help="Run known cells again, too: those of an older state of the checkout, those with bad or missing "
    "results, or all.",
)
@click.option("--report-only", is_flag=True, help="Run nothing; write the page about what is known.")
@click.option(
    "--markdown",
    "markdown_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the page.  [default: docs/support-matrix.md of the checkout]",
)
@click.option(
    "--html",
    "html_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the same as one self-contained HTML page.",
)
@accel_option
@output_options
def command(
    session: Session,
    series: tuple[str, ...],
    kind_names: tuple[str, ...],
    selection_name: str,
    jobs: int,
    again: Again | None,
    report_only: bool,
    markdown_path: Path | None,
    html_path: Path | None,
    accel: Accel,
) -> None:
    """Run the tests that need a real KVM in a lab for each kernel and kind, and write the support matrix.

    Each finished cell is kept, so a matrix that was interrupted goes on with the rest. Cells from an older
    state of the checkout are kept as well and called older. Exit statuses are those of 'pykvm lab test'.

        pykvm lab matrix --kernel 6.1 --kernel 7.2 --jobs 2 --html matrix.html
    """
    root = checkout()
    page = markdown_path or root / DEFAULT_PAGE
    check_writable(page)
    check_writable(html_path)
    chosen = selection(selection_name)
    cache = Cache()
    store = Store(cache, chosen.name)
    state = matrix.state_of(root)
    failed: dict[str, str] = {}
    # Before the page is touched: a kernel that does not exist is no reason to write it anew.
    ready = [] if report_only else _kernels(session, cache, series, failed)
    try:
        if not report_only:
            kinds = [kind(name) for name in dict.fromkeys(kind_names)] or list(KINDS.values())
            tasks = matrix.plan(store, state, ready, kinds, again or "")
            failed |= _run(session, cache, root, tasks, chosen.name, jobs, accel)
    finally:
        # What was found before an interruption is worth a page, too.  The sources may have changed meanwhile.
        state = matrix.state_of(root)
        cells = matrix.widest(cache)
        document = report(cells, state, matrix.now())
        session.document |= document | {"failed": failed, "page": str(page)}
        if cells:
            write_text(page, markdown(document))
            if html_path is not None:
                write_text(html_path, matrix_page(document))
    if not cells and not failed:
        raise UsageError("No cell of the matrix has been run yet; leave --report-only out to run some.")
    if cells:
        _show(session, cells, page, html_path)
    _judge(cells, state, failed, session)


def _run(
    session: Session,
    cache: Cache,
    root: Path,
    tasks: Sequence[Task],
    chosen: str,
    jobs: int,
    accel: Accel,
) -> dict[str, str]:
    """Run the cells; those without a result, and why."""
    failed: dict[str, str] = {}
    usable = []
    for name in dict.fromkeys(task.kind.name for task in tasks):
        try:
            # Prepared here and once, not by several cells at a time.
            choose(cache, kind(name), accel, session.note)
            usable.append(name)
        except PykvmError as error:
            session.note(f"{name}: {error}")
            failed |= {f"{task.kernel.series} {name}": str(error) for task in tasks if task.kind.name == name}
    tasks = [task for task in tasks if task.kind.name in usable]

    def order(task: Task) -> dict[str, str]:
        return {
            "cache": str(cache.root),
            "root": str(root),
            "release": task.kernel.release,
            "kind": task.kind.name,
            "selection": chosen,
            "accel": accel,
        }

    session.note(f"{plural(len(tasks), 'cell')} to run, {jobs} at a time.")
    return failed | run_tasks(tasks, cell_command(order), jobs, _Progress(session, len(tasks)))


def _kernels(
    session: Session, cache: Cache, series: Sequence[str], failed: dict[str, str]
) -> list[PreparedKernel]:
    """The kernels that were asked for, fetched if they must be; without a choice those that are there."""
    if not series:
        newest = {kernel.series: kernel for kernel in kernels.prepared(cache)}
        if newest:
            return list(newest.values())
        series = [
            kernel.series for kernel in kernels.offered(Archive(cache, session.note)) if not kernel.missing
        ]
    found = []
    for text in dict.fromkeys(series):
        try:
            found.append(kernels.provide(cache, text, session.note))
        except UsageError:
            raise
        except PykvmError as error:
            session.note(f"Linux {text}: {error}")
            failed[f"{text}"] = str(error)
    return found


def _show(session: Session, cells: Sequence[Saved], page: Path, html_path: Path | None) -> None:
    results = [cell.result for cell in cells if cell.result is not None]
    session.out.print(results_table(results))
    for line in bad_lines(results):
        session.out.print(line, markup=False, soft_wrap=True)
    for cell in cells:
        if cell.not_offered:
            session.out.print(
                f"not offered ({cell.kind}, Linux {cell.release}): {cell.not_offered}",
                markup=False,
                soft_wrap=True,
            )
    with contextlib.suppress(ValueError):
        page = page.relative_to(Path.cwd())
    pages = f"{page}" + (f" and {html_path}" if html_path else "")
    session.note(f"Written: {pages}")


def _judge(cells: Sequence[Saved], state: State, failed: dict[str, str], session: Session) -> None:
    """Raise what the exit status is to say about the cells of this state of the checkout."""
    bad, older = problems(cells, state)
    if older:
        session.note(f"{plural(older, 'cell')} of an older state; run them again with --again older.")
    for name, error in failed.items():
        raise LabError(f"{plural(len(failed), 'cell')} could not be run; the first is {name}: {error}")
    judge(bad)
