"""``pykvm lab test``: the real-KVM tests of this checkout in labs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from pykvm.cli.lab_options import DEFAULT_KIND, accel_option
from pykvm.cli.lab_progress import SuiteProgress, bad_lines, judge, results_table, summary
from pykvm.cli.parameters import duration_type
from pykvm.cli.session import Session, output_options
from pykvm.errors import UsageError
from pykvm.lab import environment, kernels, selections
from pykvm.lab import session as lab_session
from pykvm.lab.cache import Cache
from pykvm.lab.emulators import Accel, choose
from pykvm.lab.junit import write_junit
from pykvm.lab.kinds import KINDS, kind
from pykvm.lab.results import SuiteResult
from pykvm.lab.selections import SELECTIONS
from pykvm.lab.suite import SuiteSpec, run_suite


def checkout() -> Path:
    """The checkout that pykvm runs from; UsageError if there is none."""
    folder = environment.checkout()
    if folder is None:
        raise UsageError(
            "The tests are not installed with pykvm: run this from a checkout, for example with its own "
            ".venv/bin/pykvm after ./scripts/test has set it up."
        )
    return folder


def test_paths(root: Path, here: Path, paths: Sequence[str]) -> tuple[str, ...]:
    """``paths`` (files, folders or node ids, as seen from ``here`` or from the checkout) as seen from the
    checkout; UsageError for what is not there.
    """
    found = []
    for text in paths:
        name, colons, inner = text.partition("::")
        place = next((folder / name for folder in (here, root) if (folder / name).exists()), None)
        if place is None or not place.resolve().is_relative_to(root):
            raise UsageError(f"There are no tests at {name} in {root}.")
        found.append(f"{place.resolve().relative_to(root)}{colons}{inner}")
    return tuple(found)


def check_writable(path: Path | None) -> None:
    """UsageError now, rather than after an hour of tests, if a report cannot be written."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"Cannot write {path}: there is no folder {path.parent}.")


@click.command("test", short_help="Run the real-KVM tests of this checkout in labs.")
@click.option(
    "--kernel",
    "series",
    multiple=True,
    default=(kernels.DEFAULT_SERIES,),
    show_default=True,
    help="Kernel series (6.12) or release; may be repeated.",
)
@click.option(
    "--kvm",
    "kind_names",
    type=click.Choice(list(KINDS)),
    multiple=True,
    default=(DEFAULT_KIND,),
    show_default=True,
    help="The kind of KVM; may be repeated.",
)
@click.option(
    "--selection",
    "selection_name",
    type=click.Choice(list(SELECTIONS)),
    default="core",
    show_default=True,
    help="Which tests, if no PATHS say it.",
)
@click.option(
    "-k", "keyword", default="", metavar="EXPR", help="Of these only the ones that pytest -k takes."
)
@click.option(
    "--junit",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a JUnit XML file, one suite for each lab.",
)
@click.option(
    "--timeout",
    type=duration_type(minimum=1),
    help="Time for each kernel and kind, boots included.  [default: what fits the selection]",
)
@click.option(
    "--test-timeout",
    type=duration_type(minimum=1),
    help="Time for each test, by the lab's own clock.  [default: what fits the emulator]",
)
@click.option("--verbose", "-v", is_flag=True, help="A line for every test, not only for bad ones.")
@accel_option
@click.argument("paths", nargs=-1, metavar="[PATHS]...")
@output_options
def command(
    session: Session,
    series: tuple[str, ...],
    kind_names: tuple[str, ...],
    selection_name: str,
    keyword: str,
    junit: Path | None,
    timeout: float | None,
    test_timeout: float | None,
    verbose: bool,
    accel: Accel,
    paths: tuple[str, ...],
) -> None:
    """Run the tests that need a real KVM in a lab for each kernel and kind, one lab after the other.

    PATHS are test files, folders or node ids of this checkout. When a test kills its lab, it is named, and
    another lab runs the rest. Exit statuses: 1 if a test failed, 123 if the time was over, 125 if a lab died
    too often.

        pykvm lab test --kernel 6.1 --kernel 7.2 --kvm amd-npt --kvm amd-shadow --junit lab.xml
    """
    root = checkout()
    chosen = selections.selection(selection_name)
    wanted = test_paths(root, Path.cwd(), paths)
    if not wanted:
        wanted, keyword = chosen.paths, selections.both(chosen.keyword, keyword)
    check_writable(junit)
    cache = Cache()
    results: list[SuiteResult] = []
    documents: list[Any] = []
    session.document |= {"checkout": str(root), "results": documents}

    def add(result: SuiteResult) -> None:
        results.append(result)
        documents.append(result.to_json())
        if junit is not None:
            _write_junit(junit, results)

    try:
        for text in dict.fromkeys(series):
            kernel = kernels.provide(cache, text, session.note)
            for name in dict.fromkeys(kind_names):
                emulator = choose(cache, kind(name), accel, session.note)
                within = selections.limits(chosen, slow=emulator.slug == "bochs", test=test_timeout)
                spec = SuiteSpec(
                    kernel=kernel,
                    kind=kind(name),
                    root=root,
                    paths=wanted,
                    keyword=keyword,
                    timeout=timeout or within.whole,
                    test_timeout=within.test,
                    silence=within.silence,
                    emulator=emulator.name,
                    slug=emulator.slug,
                    facts=session.json,  # they take seconds there, and nothing else shows them
                )
                label = f"{name}, Linux {kernel.release}"
                session.note(f"{label}: starting on {emulator.name}")
                with SuiteProgress(session.progress, label, verbose=verbose) as progress:
                    try:
                        add(run_suite(spec, progress, partial(lab_session.run, cache, emulator)))
                    except BaseException:
                        if progress.cases:  # Ctrl-C, mostly: what is known by then is worth keeping
                            add(interrupted(spec, progress))
                        raise
    finally:
        if results:
            _show(session, results)
    judge(results)
    if not any(result.cases for result in results):
        raise UsageError("No test was chosen; see 'pykvm lab test --help' for how to choose some.")


def interrupted(spec: SuiteSpec, progress: SuiteProgress) -> SuiteResult:
    """What a watcher saw of a suite that never came to a result."""
    return SuiteResult(
        *(spec.kernel.series, spec.kernel.release, spec.kind.name, spec.emulator, spec.slug),
        state="broken",
        problem="It was interrupted.",
        collected=progress.collected,
        cases=tuple(progress.cases),
    )


def _show(session: Session, results: Sequence[SuiteResult]) -> None:
    session.out.print(results_table(results))
    for line in bad_lines(results):
        session.out.print(line, markup=False, soft_wrap=True)
    session.out.print(summary(results), markup=False)


def _write_junit(path: Path, results: Sequence[SuiteResult]) -> None:
    try:
        write_junit(path, results)
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}.") from error
