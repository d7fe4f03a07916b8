"""``pykvm lab test`` and ``pykvm lab matrix`` with labs that boot nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from pykvm.cli import lab_matrix, lab_test
from pykvm.errors import HostError, LabDiedError, LabTimeoutError, UsageError
from pykvm.lab import environment, kernels, matrix
from pykvm.lab import session as lab_session
from pykvm.lab.cache import Cache
from pykvm.lab.kernels import PreparedKernel
from pykvm.lab.matrix import Saved, Store, Task, now
from pykvm.lab.results import Case, SuiteResult
from pykvm.lab.selections import selection
from tests.cli.runner import ROOT, Result, execute, invoke
from tests.cli.test_documents import check_keys
from tests.lab.fake_lab import FakeLab, end, ran, record, session, start

Run = Callable[..., Result]


def fake_kernel(series: str) -> PreparedKernel:
    return PreparedKernel(series, f"{series}.0-9-cloud-amd64", Path("/k"), Path("/m"), False)


@pytest.fixture
def no_labs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels, emulators and a cache that are not there."""
    monkeypatch.setenv("PYKVM_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "provide", lambda cache, text, note: fake_kernel(text))
    emulators = {"amd": "qemu-tcg", "intel": "bochs"}
    for module in (lab_test, lab_matrix):
        monkeypatch.setattr(
            module,
            "choose",
            lambda cache, kind, accel, note: SimpleNamespace(
                name="the emulator", slug=emulators[kind.vendor]
            ),
        )


@pytest.fixture
def lab(no_labs: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeLab]:
    """A function that says what the labs of the next command do."""

    def play(*boots: list[Any]) -> FakeLab:
        fake = FakeLab(*boots)
        monkeypatch.setattr(lab_session, "run", lambda cache, emulator, spec, sinks: fake(spec, sinks))
        return fake

    return play


def passing(*names: str) -> list[Any]:
    return [session(len(names)), *(line for name in names for line in ran(name)), end()]


# --- lab test ------------------------------------------------------------------------------------


def test_each_kernel_and_kind_has_a_row_and_all_is_well(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab]
) -> None:
    fake = lab(passing("a", "b"), passing("a"), passing("a"), passing("a"))
    series = ["--kernel", "6.1", "--kernel", "7.2", "--kernel", "6.1"]
    done = invoke(capfd, "lab", "test", *series, "--kvm", "amd-npt", "--kvm", "intel-ept")
    assert done.status == 0, done.err
    asked = [(spec.kernel.series, spec.kind.name) for spec in fake.specs]
    assert asked == [("6.1", "amd-npt"), ("6.1", "intel-ept"), ("7.2", "amd-npt"), ("7.2", "intel-ept")]
    assert done.out.count("QEMU 10.0, TCG") == 4
    assert "5 tests in 4 labs: 5 passed." in done.out
    # Bochs is slower, so its limits are wider.
    amd, intel = fake.specs[:2]
    assert intel.timeout > 2 * amd.timeout


def test_failures_are_listed_with_their_first_line(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab]
) -> None:
    lab([session(2), *ran("a"), *ran("b", "failed", reason="assert 1 == 2"), end(1)])
    done = invoke(capfd, "lab", "test")
    assert done.status == 1
    assert "failed b (amd-npt, Linux 6.12.0-9-cloud-amd64): assert 1 == 2" in done.out
    assert done.err.splitlines()[-1] == "pykvm: 1 test failed; the lines above say which and why."


@pytest.mark.parametrize(
    ("boots", "status"),
    [
        ([[LabDiedError("Died.", "d")], [LabDiedError("Died.", "d")]], 125),
        ([[session(1), start("a"), LabTimeoutError("Late.")]], 123),
        ([[session(1), start("a"), LabDiedError("Died.", "d")], passing()], 1),
        ([[session(0), end(5)]], 2),
        ([["Usage error\n", 4]], 1),
        ([[HostError("No emulator.")]], 3),
    ],
)
def test_exit_statuses(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab], boots: list[list[Any]], status: int
) -> None:
    lab(*boots)
    done = invoke(capfd, "lab", "test")
    assert done.status == status
    assert done.err.splitlines()[-1].startswith("pykvm: ")


def test_a_death_costs_one_test_and_is_explained(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab]
) -> None:
    lab(
        [session(2), start("a"), LabDiedError("The lab died: a panic. See /x.", "a panic", "/x")],
        [session(1), *ran("b"), end()],
    )
    done = invoke(capfd, "lab", "test")
    assert done.status == 1
    assert "died a (amd-npt, Linux 6.12.0-9-cloud-amd64): a panic" in done.out
    assert "Another one runs the rest." in done.err


def test_json_and_junit(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab], tmp_path: Path
) -> None:
    facts = record("facts", facts={"kernel": "6.12.0"})
    fake = lab([facts, session(2), *ran("a"), *ran("b", "failed", reason="r", text="t"), end(1)])
    target = tmp_path / "lab.xml"
    done = invoke(capfd, "lab", "test", "--json", "--junit", str(target))
    assert done.status == 1
    check_keys(
        "pykvm lab test", {k: v for k, v in done.document.items() if k not in ("error", "exit_status")}
    )
    (result,) = done.document["results"]
    assert result["facts"] == {"kernel": "6.12.0"}
    assert "PYKVM_LAB_FACTS" in fake.specs[0].environment
    assert SuiteResult.from_json(result).bad[0].nodeid == "b"
    assert done.document["exit_status"] == 1
    root = Xml.parse(target).getroot()
    assert (root.get("tests"), root.get("failures")) == ("2", "1")


def test_paths_and_keywords_reach_the_lab(
    capfd: pytest.CaptureFixture[str],
    lab: Callable[..., FakeLab],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = lab(passing("a"))
    monkeypatch.chdir(ROOT / "tests")
    options = ["-k", "ring", "--timeout", "90s", "--test-timeout", "5s"]
    paths = ["kvm/test_exits.py::test_x", "tests/track"]
    assert invoke(capfd, "lab", "test", *options, *paths).status == 0
    (spec,) = fake.specs
    assert spec.command[-5:] == (*("-k", "ring", "--", "tests/kvm/test_exits.py::test_x", "tests/track"),)
    assert spec.timeout == pytest.approx(90, abs=5)
    assert spec.environment["PYKVM_LAB_TEST_TIMEOUT"] == "5"
    assert spec.directory == str(ROOT)
    assert "PYKVM_LAB_FACTS" not in spec.environment


def test_a_keyword_narrows_a_selection(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab]
) -> None:
    fake = lab(passing("a"))
    assert invoke(capfd, "lab", "test", "--selection", "smoke", "-k", "a or b").status == 0
    smoke = selection("smoke")
    command = fake.specs[0].command
    assert command[command.index("-k") + 1] == f"({smoke.keyword}) and (a or b)"
    assert command[-len(smoke.paths) :] == smoke.paths


@pytest.mark.parametrize("path", ["tests/nowhere.py", "/etc/passwd"])
def test_paths_that_are_not_tests_are_refused(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab], path: str
) -> None:
    fake = lab()
    done = invoke(capfd, "lab", "test", path)
    assert done.status == 2
    assert f"There are no tests at {path}" in done.err
    assert fake.specs == []


@pytest.mark.parametrize("command", ["test", "matrix"])
def test_without_a_checkout_there_is_one_clear_sentence(
    capfd: pytest.CaptureFixture[str],
    lab: Callable[..., FakeLab],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(environment, "checkout", lambda: None)
    done = invoke(capfd, "lab", command)
    assert done.status == 2
    assert done.err.startswith("pykvm: The tests are not installed with pykvm: run this from a checkout")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("option", [["test", "--junit"], ["matrix", "--html"], ["matrix", "--markdown"]])
def test_a_file_that_cannot_be_written_is_refused_before_any_lab(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab], option: list[str]
) -> None:
    lab()
    done = invoke(capfd, "lab", *option, "/nowhere/at/all.xml")
    assert done.status == 2
    assert "there is no folder /nowhere/at" in done.err


def test_an_interruption_keeps_what_was_found(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab], tmp_path: Path
) -> None:
    lab(passing("a"), [session(3), *ran("b"), KeyboardInterrupt()])
    target = tmp_path / "lab.xml"
    done = invoke(
        capfd, "lab", "test", "--kernel", "6.1", "--kernel", "7.2", "--junit", str(target), "--json"
    )
    assert done.status == 130
    first, second = (SuiteResult.from_json(result) for result in done.document["results"])
    assert (first.state, first.series) == ("finished", "6.1")
    assert (second.state, second.series, second.problem) == ("broken", "7.2", "It was interrupted.")
    assert ([case.nodeid for case in second.cases], second.left) == (["b"], 2)
    assert Xml.parse(target).getroot().get("tests") == "3"
    assert "2 tests in 2 labs: 2 passed." in done.err  # --json leaves standard output to the object


def test_a_second_lab_that_cannot_be_had_does_not_hide_the_first(
    capfd: pytest.CaptureFixture[str], lab: Callable[..., FakeLab]
) -> None:
    lab(passing("a"), [HostError("No room.")])
    done = invoke(capfd, "lab", "test", "--kernel", "6.1", "--kernel", "7.2")
    assert done.status == 3
    assert "1 test in 1 lab: 1 passed." in done.out


# --- lab matrix ----------------------------------------------------------------------------------


@pytest.fixture
def cells(no_labs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A matrix whose cells pass without a lab; the list tells which ones ran."""
    ran_cells: list[str] = []

    def run(tasks: Sequence[Task], command: Any, jobs: int, watcher: Any) -> dict[str, str]:
        order = json.loads(command(tasks[0])[-1]) if tasks else {}
        store = Store(matrix_cache(tmp_path), order.get("selection", "core"))
        for task in tasks:
            name = f"{task.kernel.series} {task.kind.name}"
            ran_cells.append(name)
            watcher.started(task)
            if task.kernel.series == "6.6":
                watcher.ended(task, "No QEMU.")
                return {name: "No QEMU."}
            outcome = "failed" if task.kernel.series == "6.7" else "passed"
            case = Case("tests/a.py::test_a", outcome, 1.0, "why" if outcome == "failed" else "")
            watcher.case(task, case, 1, 1)
            result = SuiteResult(
                *(task.kernel.series, task.kernel.release, task.kind.name, "QEMU", "qemu-tcg"),
                collected=1,
                boots=1,
                cases=(case,),
            )
            now_is = matrix.state_of(Path(order["root"]))
            state = (now_is.fingerprint, now_is.revision, now())
            store.save(
                Saved(task.kernel.series, task.kernel.release, task.kind.name, "core", *state, result=result)
            )
            watcher.ended(task, "")
        return {}

    monkeypatch.setattr(lab_matrix, "run_tasks", run)
    monkeypatch.setattr(
        matrix,
        "why_not_offered",
        lambda kernel, kind: "it lacks it" if kind.name == "amd-npt-oldmmu" else "",
    )
    return ran_cells


def matrix_cache(folder: Path) -> Cache:
    return Cache(folder / "cache")


KINDS = ["--kvm", "amd-npt", "--kvm", "amd-npt-oldmmu", "--kvm", "intel-ept"]


def test_a_matrix_runs_once_and_writes_its_pages(
    capfd: pytest.CaptureFixture[str], cells: list[str], tmp_path: Path
) -> None:
    pages = ["--markdown", str(tmp_path / "m.md"), "--html", str(tmp_path / "m.html")]
    arguments = ["lab", "matrix", "--kernel", "6.1", "--kernel", "7.2", *KINDS, *pages]
    done = invoke(capfd, *arguments, "--json")
    assert done.status == 0, done.err
    assert cells == ["6.1 amd-npt", "6.1 intel-ept", "7.2 amd-npt", "7.2 intel-ept"]
    check_keys("pykvm lab matrix", done.document)
    text = (tmp_path / "m.md").read_text()
    assert "not offered" in text
    assert "1 of 1" in text
    assert "Support matrix" in (tmp_path / "m.html").read_text()
    # Nothing is left to do, and the page can be written again.
    assert invoke(capfd, *arguments).status == 0
    assert len(cells) == 4
    (tmp_path / "m.md").unlink()
    again = invoke(capfd, "lab", "matrix", "--report-only", *pages)
    assert again.status == 0
    assert len(cells) == 4
    assert "1 of 1" in (tmp_path / "m.md").read_text()
    assert invoke(capfd, *arguments, "--again", "all").status == 0
    assert len(cells) == 8


def test_a_failing_cell_fails_the_matrix_and_runs_again_when_asked(
    capfd: pytest.CaptureFixture[str], cells: list[str], tmp_path: Path
) -> None:
    pages = ["--markdown", str(tmp_path / "m.md")]
    arguments = ["lab", "matrix", "--kernel", "6.1", "--kernel", "6.7", "--kvm", "amd-npt", *pages]
    done = invoke(capfd, *arguments)
    assert done.status == 1
    assert "failed tests/a.py::test_a (amd-npt, Linux 6.7.0-9-cloud-amd64): why" in done.out
    assert "Failures that nothing explains yet" in (tmp_path / "m.md").read_text()
    assert invoke(capfd, *arguments, "--again", "failed").status == 1
    assert cells == ["6.1 amd-npt", "6.7 amd-npt", "6.7 amd-npt"]


def test_a_cell_that_could_not_run_is_said_and_the_page_is_written(
    capfd: pytest.CaptureFixture[str], cells: list[str], tmp_path: Path
) -> None:
    page = tmp_path / "m.md"
    arguments = ["--kernel", "6.1", "--kernel", "6.6", "--kvm", "amd-npt", "--markdown", str(page)]
    done = invoke(capfd, "lab", "matrix", *arguments)
    assert done.status == 3
    assert "1 cell could not be run; the first is 6.6 amd-npt: No QEMU." in done.err
    assert "Linux 6.1" in page.read_text()


def test_an_emulator_or_kernel_that_cannot_be_had_does_not_stop_the_others(
    capfd: pytest.CaptureFixture[str], cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def provide(cache: Any, text: str, note: Any) -> PreparedKernel:
        if text == "6.2":
            raise HostError("It is gone.")
        return fake_kernel(text)

    def choose(cache: Any, kind: Any, accel: Any, note: Any) -> Any:
        if kind.vendor == "intel":
            raise HostError("No Bochs.")
        return SimpleNamespace(name="x", slug="qemu-tcg")

    monkeypatch.setattr(kernels, "provide", provide)
    monkeypatch.setattr(lab_matrix, "choose", choose)
    arguments = ["--kernel", "6.1", "--kernel", "6.2", *KINDS, "--markdown", str(tmp_path / "m.md"), "--json"]
    done = invoke(capfd, "lab", "matrix", *arguments)
    assert done.status == 3
    assert cells == ["6.1 amd-npt"]
    assert done.document["failed"] == {"6.2": "It is gone.", "6.1 intel-ept": "No Bochs."}


def test_a_page_about_nothing_is_refused(
    capfd: pytest.CaptureFixture[str], cells: list[str], tmp_path: Path
) -> None:
    page = tmp_path / "m.md"
    done = invoke(capfd, "lab", "matrix", "--report-only", "--markdown", str(page))
    assert done.status == 2
    assert "No cell of the matrix has been run yet" in done.err
    assert not page.exists()


def test_a_page_that_was_not_written_is_not_named(
    capfd: pytest.CaptureFixture[str], cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def provide(cache: Any, text: str, note: Any) -> PreparedKernel:
        raise HostError("No network.")

    monkeypatch.setattr(kernels, "provide", provide)
    page = tmp_path / "m.md"
    done = invoke(capfd, "lab", "matrix", "--kernel", "6.1", "--markdown", str(page))
    assert done.status == 3
    assert not page.exists()
    assert "Written" not in done.err


def test_an_interrupted_matrix_writes_what_it_has(
    capfd: pytest.CaptureFixture[str], cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "m.md"
    assert (
        invoke(capfd, "lab", "matrix", "--kernel", "6.1", "--kvm", "amd-npt", "--markdown", str(page)).status
        == 0
    )
    page.unlink()

    def interrupted(*arguments: Any) -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(lab_matrix, "run_tasks", interrupted)
    done = invoke(capfd, "lab", "matrix", "--kernel", "7.2", "--kvm", "amd-npt", "--markdown", str(page))
    assert done.status == 130
    assert "1 of 1" in page.read_text()


def test_an_unknown_kernel_is_the_users_mistake(
    capfd: pytest.CaptureFixture[str], cells: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def provide(cache: Any, text: str, note: Any) -> PreparedKernel:
        raise UsageError("There is no such kernel.")

    page = tmp_path / "m.md"
    assert invoke(capfd, "lab", "matrix", "--kernel", "6.1", "--markdown", str(page)).status == 0
    page.write_text("as it was")
    monkeypatch.setattr(kernels, "provide", provide)
    assert invoke(capfd, "lab", "matrix", "--kernel", "x", "--markdown", str(page)).status == 2
    assert page.read_text() == "as it was", "known cells are no reason to write the page anew"


# --- for real ------------------------------------------------------------------------------------


@pytest.mark.lab
@pytest.mark.timeout(900)
def test_three_tests_in_a_real_lab(tmp_path: Path) -> None:
    target = tmp_path / "lab.xml"
    chosen = "tests/kvm/test_traps_slots.py"
    arguments = ["--kvm", "amd-npt", "--junit", str(target), "--json", "-k", "a_live_slot or address_space"]
    done = execute("lab", "test", *arguments, chosen, timeout=900)
    assert done.status == 0, done.err
    (found,) = done.document["results"]
    result = SuiteResult.from_json(found)
    assert result.count("passed") == len(result.cases) == 2
    assert all(case.kvm for case in result.cases)
    assert result.facts is not None
    assert result.facts["vendor_module"] == "kvm_amd"
    assert result.running == result.release != os.uname().release
    assert Xml.parse(target).getroot().get("tests") == "2"
