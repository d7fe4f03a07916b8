"""The matrix: which cells are run, what is kept, and cells as processes."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pykvm.lab import cell, matrix
from pykvm.lab.cache import Cache
from pykvm.lab.cell import Order, run_cell
from pykvm.lab.emulator import Emulator
from pykvm.lab.kernels import PreparedKernel
from pykvm.lab.kinds import KINDS, Kind, kind
from pykvm.lab.matrix import Again, Saved, State, Store, Task, plan, why_not_offered
from pykvm.lab.matrix_run import cell_command, run_tasks
from pykvm.lab.results import Case, GarbledResult, SuiteResult
from pykvm.lab.selections import selection
from pykvm.lab.tether import tethered
from tests.lab.fake_lab import FakeLab, end, ran, session

NOW = State("f" * 16, "abc")
BEFORE = State("0" * 16, "old")


def module_file(depends: str = "", *parameters: str) -> bytes:
    """An ELF file with nothing but a .modinfo section."""
    fields = ["name=x", f"depends={depends}", *(f"parmtype={name}:bool" for name in parameters)]
    info = b"".join(field.encode() + b"\0" for field in fields)
    names = b"\0.modinfo\0.shstrtab\0"
    header = 64
    sections = [
        (0, 0, 0, 0),
        (1, 1, header, len(info)),
        (10, 3, header + len(info), len(names)),
    ]
    table = b"".join(struct.pack("<IIQQQQIIQQ", *s[:2], 0, 0, *s[2:], 0, 0, 1, 0) for s in sections)
    start = header + len(info) + len(names)
    elf = b"\x7fELF\2\1\1".ljust(16, b"\0")
    elf += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, start, 0, 64, 0, 0, 64, len(sections), 2)
    return elf + info + names + table


def kernel(folder: Path, series: str = "6.1", *parameters: str, intel: bool = True) -> PreparedKernel:
    """A kernel with KVM modules; ``parameters`` are those of kvm.ko."""
    modules = folder / series / "modules"
    modules.mkdir(parents=True)
    (modules / "kvm.ko").write_bytes(module_file("", *parameters))
    (modules / "kvm-amd.ko").write_bytes(module_file("kvm", "npt"))
    if intel:
        (modules / "kvm-intel.ko").write_bytes(module_file("kvm", "ept", "eptad", "pml"))
    return PreparedKernel(series, f"{series}.0-cloud-amd64", folder / series / "vmlinuz", modules, False)


def saved(series: str = "6.1", kind: str = "amd-npt", state: State = NOW, **changes: Any) -> Saved:
    known: dict[str, Any] = {"cases": (Case("a", "passed"),), "collected": 1} | changes
    result = SuiteResult(series, f"{series}.0-cloud-amd64", kind, "QEMU", "qemu-tcg", **known)
    return Saved(
        *(series, result.release, kind, "core", state.fingerprint, state.revision, "2026-01-02T03:04:05Z"),
        result=result,
    )


# --- what is kept --------------------------------------------------------------------------------


def test_a_cell_survives_the_store(tmp_path: Path) -> None:
    store = Store(Cache(tmp_path), "core")
    assert store.load("6.1", "amd-npt") is None
    assert store.all() == []
    cells = [
        saved("6.1", "amd-npt"),
        saved("6.1", "amd-shadow", facts={"kernel": "x"}),
        Saved("6.2", "6.2.0", "amd-npt", "core", "f", "abc", "now", not_offered="it lacks it"),
        saved("6.12", "amd-npt"),
    ]
    for item in reversed(cells):
        store.save(item)
    assert store.all() == cells
    assert store.load("6.1", "amd-shadow") == cells[1]
    newer = saved("6.1", "amd-npt", seconds=9)
    store.save(newer)
    assert store.load("6.1", "amd-npt") == newer
    assert Store(Cache(tmp_path), "smoke").all() == []


@pytest.mark.parametrize("garbage", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 99}', "\udcff"])
def test_a_garbled_cell_counts_as_none(tmp_path: Path, garbage: str) -> None:
    store = Store(Cache(tmp_path), "core")
    store.save(saved())
    (file,) = (tmp_path / "results" / "core").iterdir()
    file.write_bytes(garbage.encode(errors="surrogateescape"))
    assert store.load("6.1", "amd-npt") is None
    assert store.all() == []


def test_another_document_is_refused() -> None:
    changes: list[dict[str, Any]] = [{"format": 0}, {"series": 6.1}, {"result": []}, {"when": None}]
    for change in changes:
        with pytest.raises(GarbledResult):
            Saved.from_json(saved().to_json() | change)


# --- the state of the checkout -------------------------------------------------------------------


def checkout(folder: Path) -> Path:
    for name in (
        "pykvm/kvm/vm.py",
        "pykvm/lab/suite.py",
        "tests/kvm/test_a.py",
        "tests/lab/x.py",
        "guests/a.S",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one\n")
    return folder


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("pykvm/kvm/vm.py", True),
        ("tests/kvm/test_a.py", True),
        ("tests/kvm/test_new.py", True),
        ("guests/a.S", True),
        ("pykvm/lab/suite.py", False),
        ("pykvm/lab/selections.py", True),
        ("tests/lab/x.py", False),
        ("docs/page.md", False),
        ("pykvm/kvm/vm.pyc", False),
    ],
)
def test_only_what_tests_execute_changes_the_fingerprint(tmp_path: Path, name: str, matters: bool) -> None:
    root = checkout(tmp_path)
    before = matrix.fingerprint(root)
    assert matrix.fingerprint(root) == before
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("two\n")
    assert (matrix.fingerprint(root) != before) == matters


def test_the_page_shows_the_widest_selection_and_then_the_latest(tmp_path: Path) -> None:
    def keep(store: str, series: str, ran: str, when: str) -> Saved:
        cell = replace(saved(series), selection=ran, when=when)
        Store(Cache(tmp_path), store).save(cell)
        return cell

    early = keep("core", "6.1", "core", "2026-01-01")
    keep("smoke", "6.1", "smoke", "2026-01-09")
    keep("smoke", "6.12", "smoke", "2026-01-01")
    late = keep("core", "6.12", "smoke", "2026-01-02")  # as under Bochs
    assert matrix.widest(Cache(tmp_path)) == [early, late]


def test_a_folder_without_git_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert matrix.revision(tmp_path) == ""
    monkeypatch.setenv("PATH", "")
    assert matrix.revision(tmp_path) == ""


# --- what to do ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("amd-npt", "its kvm has no parameter tdp_mmu"),
        ("amd-shadow", ""),
        ("amd-npt-oldmmu", "its kvm has no parameter tdp_mmu"),
        ("intel-ept", "the kernel has no module kvm_intel"),
    ],
)
def test_kinds_that_a_kernel_cannot_be(tmp_path: Path, name: str, why: str) -> None:
    assert why_not_offered(kernel(tmp_path, "6.1", "eager_page_split", intel=False), kind(name)) == why


def test_every_kind_is_offered_by_a_kernel_with_all(tmp_path: Path) -> None:
    whole = kernel(tmp_path, "6.1", "tdp_mmu")
    assert [name for name, item in KINDS.items() if why_not_offered(whole, item)] == []


def planned(tasks: Sequence[Task]) -> list[str]:
    return [f"{task.kernel.series} {task.kind.name}: {task.why}" for task in tasks]


def test_what_is_known_is_not_run_again(tmp_path: Path) -> None:
    store = Store(Cache(tmp_path / "cache"), "core")
    kernels = [kernel(tmp_path, "6.1"), kernel(tmp_path, "6.12", "tdp_mmu")]
    kinds: list[Kind] = [kind("amd-npt"), kind("amd-npt-oldmmu")]
    store.save(saved("6.1", "amd-npt"))
    assert planned(plan(store, NOW, kernels, kinds)) == [
        "6.12 amd-npt: not run yet",
        "6.12 amd-npt-oldmmu: not run yet",
    ]
    absent = store.load("6.1", "amd-npt-oldmmu")
    assert absent is not None
    assert absent.not_offered == "its kvm has no parameter tdp_mmu"
    assert absent.complete


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        ("", []),
        ("older", ["6.2 amd-npt: older", "6.4 amd-npt: older"]),
        ("failed", ["6.3 amd-npt: failed before", "6.4 amd-npt: failed before"]),
        ("all", [f"6.{n} amd-npt: asked for" for n in (1, 2, 3, 4)]),
    ],
)
def test_known_cells_run_again_when_asked(tmp_path: Path, again: Again, expected: list[str]) -> None:
    store = Store(Cache(tmp_path / "cache"), "core")
    kernels = [kernel(tmp_path, f"6.{n}", "tdp_mmu") for n in (1, 2, 3, 4)]
    store.save(saved("6.1"))
    store.save(saved("6.2", state=BEFORE))
    store.save(saved("6.3", cases=(Case("a", "failed"),)))
    store.save(timed_out(saved("6.4", state=BEFORE)))
    assert planned(plan(store, NOW, kernels, [kind("amd-npt")], again)) == expected


def timed_out(item: Saved) -> Saved:
    assert item.result is not None
    return replace(item, result=replace(item.result, state="timeout", problem="Too slow."))


def test_a_newer_kernel_of_the_series_makes_a_cell_older(tmp_path: Path) -> None:
    known = saved("6.1")
    assert not matrix.is_older(known, NOW, "6.1.0-cloud-amd64")
    assert matrix.is_older(known, NOW, "6.1.1-cloud-amd64")
    assert matrix.is_older(known, BEFORE, "6.1.0-cloud-amd64")


# --- one cell ------------------------------------------------------------------------------------


def order(cache: Path, **changes: Any) -> Order:
    known = {
        "cache": str(cache),
        "root": str(cache / "checkout"),
        "release": "6.1.0-cloud-amd64",
        "kind": "amd-npt",
        "selection": "core",
    }
    return Order(**(known | changes))


def emulator(slug: str) -> Emulator:
    return cast(Emulator, SimpleNamespace(name=f"the {slug}", slug=slug))


def test_a_cell_saves_its_result_and_says_how_it_goes(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    lab = FakeLab([session(2), *ran("a"), *ran("b", "failed", reason="r"), end(1)])
    checkout(tmp_path / "checkout")
    found = run_cell(order(tmp_path), kernel(tmp_path), emulator("qemu-tcg"), lab, said.append)
    assert Store(Cache(tmp_path), "core").load("6.1", "amd-npt") == found
    assert found.result is not None
    assert [case.outcome for case in found.result.cases] == ["passed", "failed"]
    state = matrix.fingerprint(tmp_path / "checkout")
    assert (found.selection, found.fingerprint) == ("core", state)
    assert [(line["case"]["nodeid"], line["done"], line["collected"]) for line in said] == [
        ("a", 1, 2),
        ("b", 2, 2),
    ]
    (spec,) = lab.specs
    assert spec.command[-len(selection("core").paths) :] == selection("core").paths


def test_a_cell_under_bochs_runs_less_and_says_so(tmp_path: Path) -> None:
    lab = FakeLab([session(0), end(5)])
    found = run_cell(
        order(tmp_path, kind="intel-ept"), kernel(tmp_path), emulator("bochs"), lab, lambda line: None
    )
    assert found.selection == "smoke"
    assert Store(Cache(tmp_path), "core").load("6.1", "intel-ept") == found


def test_a_cell_whose_kernel_is_gone_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        status = cell.main([json.dumps(asdict(order(tmp_path)))])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status == 3
    assert "6.1.0-cloud-amd64 was removed" in json.loads(capsys.readouterr().out)["error"]


# --- cells side by side --------------------------------------------------------------------------


class Seen:
    """A watcher that remembers."""

    def __init__(self, at: Callable[[str], None] = lambda event: None) -> None:
        self.events: list[str] = []
        self._at = at

    def _add(self, event: str) -> None:
        self.events.append(event)
        self._at(event)

    def started(self, task: Task) -> None:
        self._add(f"started {task.kernel.series}")

    def note(self, task: Task, text: str) -> None:
        self._add(f"note {task.kernel.series} {text}")

    def case(self, task: Task, case: Case, done: int, collected: int) -> None:
        self._add(f"case {task.kernel.series} {case.nodeid} {done}/{collected}")

    def ended(self, task: Task, error: str) -> None:
        self._add(f"ended {task.kernel.series} {error}".strip())


def task(series: str) -> Task:
    return Task(PreparedKernel(series, series, Path("i"), Path("m"), False), kind("amd-npt"), "")


def script(**by_series: str) -> Callable[[Task], list[str]]:
    """A Python program for each cell, by its series with an underscore."""

    def command(item: Task) -> list[str]:
        source = textwrap.dedent(by_series["k" + item.kernel.series.replace(".", "_")])
        return [sys.executable, "-u", "-S", "-c", source]

    return command


def test_cells_report_and_the_failed_ones_are_named() -> None:
    case = json.dumps(
        {"case": asdict(Case("t", "passed")), "done": 1, "collected": 2},
    )
    command = script(
        k6_1=f"print('''{case}'''); print('{{\"note\": \"hello\"}}')",
        k6_2='print(\'{"error": "No QEMU."}\'); raise SystemExit(3)',
        k6_3="raise ValueError('a bug')",
        k6_4="print('[]'); print('{\"case\": 3}'); print('x', end='')",
    )
    seen = Seen()
    failed = run_tasks([task(f"6.{n}") for n in (1, 2, 3, 4)], command, 1, seen)
    assert failed == {
        "6.2 amd-npt": "No QEMU.",
        "6.3 amd-npt": "The process of the cell ended with status 1: ValueError: a bug",
    }
    assert seen.events == [
        "started 6.1",
        "case 6.1 t 1/2",
        "note 6.1 hello",
        "ended 6.1",
        "started 6.2",
        "ended 6.2 No QEMU.",
        "started 6.3",
        "ended 6.3 The process of the cell ended with status 1: ValueError: a bug",
        "started 6.4",
        "note 6.4 A line is garbled: b'{\"case\": 3}'",
        "ended 6.4",
    ]


def test_as_many_cells_run_at_a_time_as_asked(tmp_path: Path) -> None:
    # Each waits for the other one's file, so neither ends unless both run.
    wait = """
        import pathlib, time
        pathlib.Path({own!r}).touch()
        until = time.monotonic() + 20
        while not pathlib.Path({other!r}).exists() and time.monotonic() < until: time.sleep(0.01)
        raise SystemExit(not pathlib.Path({other!r}).exists())
    """
    one, two = str(tmp_path / "1"), str(tmp_path / "2")
    command = script(k6_1=wait.format(own=one, other=two), k6_2=wait.format(own=two, other=one))
    assert run_tasks([task("6.1"), task("6.2")], command, 2, Seen()) == {}


def test_an_interruption_stops_every_cell_in_an_orderly_way(tmp_path: Path) -> None:
    # Each cell cleans up when it is asked to end.
    source = """
        import pathlib, signal, sys, time
        def stop(*_): raise SystemExit(143)
        signal.signal(signal.SIGTERM, stop)
        try:
            print('{{"note": "up"}}')
            time.sleep(60)
        finally:
            pathlib.Path({path!r}).touch()
    """
    paths = [tmp_path / "1", tmp_path / "2"]
    command = script(k6_1=source.format(path=str(paths[0])), k6_2=source.format(path=str(paths[1])))
    up: list[str] = []

    def interrupt(event: str) -> None:
        if event.endswith("up"):
            up.append(event)
            if len(up) == 2:
                raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_tasks([task("6.1"), task("6.2"), task("6.3")], command, 2, Seen(interrupt))
    assert time.monotonic() - before < 15
    assert all(path.exists() for path in paths)


def test_a_cell_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pykvm.lab.matrix_run._GRACE", 0.2)
    pid = tmp_path / "pid"
    source = f"""
        import os, pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
        print('{{"note": "up"}}')
        time.sleep(60)
    """

    def interrupt(event: str) -> None:
        if event.endswith("up"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks([task("6.1")], script(k6_1=source), 1, Seen(interrupt))
    assert not Path("/proc", pid.read_text()).exists()


def test_a_cells_command_is_tethered_and_carries_its_order(tmp_path: Path) -> None:
    command = cell_command(lambda item: {"release": item.kernel.release})(task("6.1"))
    cell = (sys.executable, "-P", "-m", "pykvm.lab.cell", '{"release": "6.1"}')
    assert command == tethered(cell)


def test_a_real_cell_process_says_why_it_cannot(tmp_path: Path) -> None:
    command = cell_command(lambda item: {name: str(value) for name, value in asdict(order(tmp_path)).items()})
    failed = run_tasks([task("6.1")], command, 1, Seen())
    assert "was removed from the lab cache" in failed["6.1 amd-npt"]


def test_a_cell_dies_with_whoever_started_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = (
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = f"""
        import subprocess, sys, time
        from pykvm.lab.tether import tethered
        subprocess.Popen(tethered([sys.executable, "-c", {child!r}]))
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)])
    try:
        until = time.monotonic() + 30
        while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    gone = threading.Event()
    while not gone.wait(0.02) and time.monotonic() < until:
        if not Path("/proc", pid.read_text()).exists():
            gone.set()
    assert gone.is_set()
