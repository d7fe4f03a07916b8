"""The suite in a lab: records become results, and a lab that dies costs one test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pykvm.errors import HostError, LabDiedError, LabTimeoutError
from pykvm.lab.results import OUTCOMES, Case, GarbledResult, SuiteResult
from pykvm.lab.selections import SELECTIONS, both, fitting, limits, selection
from pykvm.lab.suite import run_suite
from tests.lab.fake_lab import (
    KERNEL,
    Clock,
    FakeLab,
    Watch,
    end,
    ran,
    record,
    result,
    session,
    start,
    suite_spec,
)

ROOT = Path(__file__).resolve().parents[2]


def outcomes(found: SuiteResult) -> dict[str, str]:
    return {case.nodeid: case.outcome for case in found.cases}


# --- one boot ------------------------------------------------------------------------------------


def test_records_become_a_result() -> None:
    lab = FakeLab(
        [
            start("pykvm info"),
            record("facts", facts={"kernel": "6.1.0-43", "capabilities": {"DIRTY_LOG_RING": 65536}}),
            record("collected", nodeid="tests/x.py"),
            session(3),
            *ran("a", kvm=True),
            *ran("b", "failed", reason="assert 1 == 2", text="E assert 1 == 2"),
            *ran("c", "xfailed", reason="r", bug="TCG forgets it"),
            end(1),
            1,
        ]
    )
    watch = Watch()
    found = run_suite(suite_spec(slug="expected"), watch, lab)
    assert watch.notes == []
    assert outcomes(found) == {"a": "passed", "b": "failed", "c": "xfailed"}
    assert found.cases[1] == Case("b", "failed", 0.5, "assert 1 == 2", "E assert 1 == 2", kvm=True)
    assert found.cases[2].bug == "TCG forgets it"
    assert (found.state, found.problem, found.collected, found.boots, found.left) == ("finished", "", 3, 1, 0)
    assert (found.series, found.release, found.kind) == (KERNEL.series, KERNEL.release, "amd-npt")
    assert (found.emulator, found.slug, found.boot_seconds) == ("QEMU 10.0, TCG", "qemu-tcg", 9.5)
    assert found.facts == {"kernel": "6.1.0-43", "capabilities": {"DIRTY_LOG_RING": 65536}}
    assert [(case.nodeid, done, collected) for case, done, collected in watch.cases] == [
        ("a", 1, 3),
        ("b", 2, 3),
        ("c", 3, 3),
    ]
    assert [case.nodeid for case in found.bad] == ["b"]


def test_the_command_runs_the_chosen_tests_in_the_checkout() -> None:
    lab = FakeLab([session(0), end(5), 5])
    spec = suite_spec(
        paths=("tests/kvm",), keyword="ring and not slot", timeout=90.0, test_timeout=7.5, silence=75
    )
    assert run_suite(spec, Watch(), lab).state == "finished"
    (sent,) = lab.specs
    assert sent.command[:3] == (sys.executable, "-m", "pytest")
    assert sent.command[3:5] == ("-p", "tests.lab_plugin")
    assert sent.command[-6:] == (
        *("-m", "kvm and not slow and not lab"),
        *("-k", "ring and not slot", "--", "tests/kvm"),
    )
    assert sent.directory == "/checkout"
    assert sent.silence == 75
    assert sent.timeout == pytest.approx(90, abs=1)
    assert sent.environment == {
        "PYKVM_LAB_FACTS": "1",
        "PYKVM_LAB_LEAVE_OUT": "/lab/work/tests-done",
        "PYKVM_LAB_TEST_TIMEOUT": "7.5",
    }
    assert lab.left_out == [[]]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"{}",
        b'{"event": []}',
        b'{"event": "unheard"}',
        b'{"event": "start"}',
        b'{"event": "session", "kernel": "x", "collected": "many"}',
        b'{"event": "result", "nodeid": "a"}',
        result("a", "brilliant"),
        result("a", seconds="long"),
        result("a", kvm="yes"),
        b'{"event": "end", "status": "x"}',
        b'{"event": "broken", "nodeid": "x"}',
        b'{"event": "facts"}',
        ran("a")[1][:-10],
    ],
)
def test_garbage_is_told_and_passed_over(garbage: bytes) -> None:
    watch = Watch()
    found = run_suite(suite_spec(), watch, FakeLab([session(1), garbage, *ran("a"), end()]))
    assert outcomes(found) == {"a": "passed"}
    assert found.state == "finished"
    (note,) = watch.notes
    assert note.startswith("A record from the lab is garbled")


def test_a_file_that_cannot_be_collected_is_no_success() -> None:
    lab = FakeLab(
        [record("broken", nodeid="tests/x.py", text="…\nE   ImportError: no y\n"), session(0), end(5)]
    )
    found = run_suite(suite_spec(), Watch(), lab)
    assert found.state == "broken"
    assert "tests/x.py: E   ImportError: no y" in found.problem


def test_pytest_that_does_not_start_says_why() -> None:
    found = run_suite(suite_spec(), Watch(), FakeLab(["ERROR: file not found: tests/nowhere\n", end(4), 4]))
    assert (found.state, found.problem) == ("broken", "pytest ended with status 4.")
    found = run_suite(suite_spec(), Watch(), FakeLab(["No module named pytest\n", 1]))
    assert found.state == "broken"
    assert found.problem == "pytest ended with status 1 before it ran a test. It said: No module named pytest"


def test_an_interruption_in_the_guest_is_no_success() -> None:
    found = run_suite(suite_spec(), Watch(), FakeLab([session(2), *ran("a"), end(0)]))
    assert (found.state, found.left) == ("broken", 1)


# --- deaths --------------------------------------------------------------------------------------


def died() -> LabDiedError:
    return LabDiedError("The lab died: a panic. Log: /x.", "a panic.", "/x")


def test_the_test_that_killed_the_lab_is_named_and_the_rest_runs() -> None:
    lab = FakeLab(
        [session(3), *ran("a"), start("b"), "last words\n", died()],
        [session(1), *ran("c"), end()],
    )
    watch = Watch()
    found = run_suite(suite_spec(), watch, lab)
    assert outcomes(found) == {"a": "passed", "b": "died", "c": "passed"}
    assert found.cases[1].reason == "a panic"
    assert found.cases[1].text == "The lab died: a panic. Log: /x.\nlast words\n"
    assert (found.state, found.collected, found.boots, found.left) == ("finished", 3, 2, 0)
    assert lab.left_out == [[], ["a", "b"]]
    assert [(done, collected) for _, done, collected in watch.cases] == [(1, 3), (2, 3), (3, 3)]
    assert watch.notes == ["The lab died: a panic. Log: /x. Another one runs the rest."]


def test_a_process_that_vanishes_is_the_tests_fault_and_not_the_labs() -> None:
    lab = FakeLab([session(2), start("a"), 137], [session(1), *ran("b"), end()])
    found = run_suite(suite_spec(), Watch(), lab)
    assert outcomes(found) == {"a": "died", "b": "passed"}
    assert found.cases[0].reason == "the process of the tests ended with status 137"
    assert found.state == "finished"


def test_a_test_over_its_limit_is_named_with_its_stacks() -> None:
    lab = FakeLab(
        [session(2), start("a"), "Timeout (0:00:07)!\nThread 0x1: File x, line 3\n", 1],
        [session(1), *ran("b"), end()],
    )
    found = run_suite(suite_spec(test_timeout=7), Watch(), lab)
    assert found.cases[0].outcome == "died"
    assert found.cases[0].reason == "it took longer than its 7 s"
    assert "line 3" in found.cases[0].text


def test_a_lab_that_dies_too_often_is_given_up() -> None:
    boots = [[session(9 - n), start(f"t{n}"), died()] for n in range(9)]
    lab = FakeLab(*boots)
    found = run_suite(suite_spec(most_deaths=3), Watch(), lab)
    assert len(lab.specs) == 3
    assert (found.state, found.count("died"), found.left) == ("died", 3, 6)
    assert found.problem == "The lab died: a panic. That was death number 3. 6 of 9 tests did not run."


def test_a_lab_that_never_boots_is_tried_twice() -> None:
    lab = FakeLab([died()], [died()], [died()])
    found = run_suite(suite_spec(), Watch(), lab)
    assert (len(lab.specs), found.state, found.cases) == (2, "died", ())
    assert found.problem == "The lab died: a panic. That was death number 2. No test ran."


def test_a_death_between_tests_blames_none() -> None:
    lab = FakeLab([session(2), *ran("a"), died()], [session(1), *ran("b"), end()])
    found = run_suite(suite_spec(), Watch(), lab)
    assert outcomes(found) == {"a": "passed", "b": "passed"}
    assert found.state == "finished"


def test_a_death_after_the_end_costs_nothing() -> None:
    found = run_suite(suite_spec(), Watch(), FakeLab([session(1), *ran("a"), end(), died()]))
    assert (found.state, found.boots) == ("finished", 1)


def test_a_look_at_the_host_that_kills_it_is_left_out_next_time() -> None:
    lab = FakeLab([start("pykvm info"), died()], [session(1), *ran("a"), end()])
    found = run_suite(suite_spec(), Watch(), lab)
    assert outcomes(found) == {"a": "passed"}
    assert found.facts == {"error": "a panic"}
    assert ["PYKVM_LAB_FACTS" in spec.environment for spec in lab.specs] == [True, False]


def test_facts_are_asked_for_once() -> None:
    lab = FakeLab(
        [record("facts", facts={"kernel": "x"}), session(1), start("a"), died()], [session(0), end(5), 5]
    )
    found = run_suite(suite_spec(), Watch(), lab)
    assert ["PYKVM_LAB_FACTS" in spec.environment for spec in lab.specs] == [True, False]
    assert (found.facts, found.state) == ({"kernel": "x"}, "finished")


# --- time ----------------------------------------------------------------------------------------


def test_time_over_keeps_what_is_known() -> None:
    clock = Clock()
    lab = FakeLab(
        [session(3), *ran("a"), start("b"), clock.passes(100), LabTimeoutError("Not within 100 s.")]
    )
    found = run_suite(suite_spec(timeout=100, test_timeout=60), Watch(), lab, clock)
    assert outcomes(found) == {"a": "passed"}
    assert (found.state, found.left, found.seconds) == ("timeout", 2, 100)
    assert found.problem == "The time of 100 s is over. 2 of 3 tests did not run."


def test_the_time_of_all_boots_counts() -> None:
    clock = Clock()
    lab = FakeLab([session(2), start("a"), clock.passes(70), died()], [session(1), clock.passes(40), died()])
    found = run_suite(suite_spec(timeout=100), Watch(), lab, clock)
    assert [spec.timeout for spec in lab.specs] == [100, 30]
    assert (found.state, found.problem) == ("timeout", "The time of 100 s is over. 1 of 2 tests did not run.")


@pytest.mark.parametrize("error", [HostError("No QEMU."), KeyboardInterrupt()])
def test_other_errors_are_the_callers(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_suite(suite_spec(), Watch(), FakeLab([session(1), error]))


# --- JSON ----------------------------------------------------------------------------------------


def full_result() -> SuiteResult:
    cases = tuple(Case(f"t::{outcome}", outcome, 1.5, "why", "text", True, "bug") for outcome in OUTCOMES)
    return SuiteResult(
        *("6.1", "6.1.0-43-cloud-amd64", "amd-npt", "QEMU", "qemu-tcg", "6.1.0-43", "timeout", "Too slow."),
        collected=9,
        boots=2,
        boot_seconds=9.5,
        seconds=77,
        cases=cases,
        facts={"capabilities": {"DIRTY_LOG_RING": 65536}},
    )


def test_a_result_survives_json() -> None:
    found = full_result()
    document = json.loads(json.dumps(found.to_json()))
    assert SuiteResult.from_json(document) == found
    assert document["counts"] == dict.fromkeys(OUTCOMES, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"state": "brilliant"},
        {"cases": None},
        {"cases": [3]},
        {"cases": [{"nodeid": "x"}]},
        {"kind": 3},
        {"collected": "9"},
        {"facts": []},
    ],
)
def test_another_document_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GarbledResult):
        SuiteResult.from_json(full_result().to_json() | change)


def test_no_document_is_refused() -> None:
    for text in ("[]", "3", "{}"):
        with pytest.raises(GarbledResult):
            SuiteResult.from_json(json.loads(text))


# --- selections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_name_what_exists(name: str) -> None:
    for path in selection(name).paths:
        assert (ROOT / path.partition("::")[0]).exists(), path


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_leave_out_what_exists(name: str) -> None:
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for word in re.findall(r"\w{3,}", selection(name).keyword):
        assert word in ("not", "and") or word in text, word


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("", "", ""), ("a or b", "", "a or b"), ("", "c", "c"), ("a or b", "not c", "(a or b) and (not c)")],
)
def test_expressions_join(one: str, other: str, expected: str) -> None:
    assert both(one, other) == expected


def test_bochs_gets_less_to_do_and_more_time() -> None:
    core = selection("core")
    assert fitting(core, slow=False) is core
    assert fitting(core, slow=True) is selection("smoke")
    assert fitting(selection("smoke"), slow=True) is selection("smoke")
    quick, slow = limits(core, slow=False), limits(core, slow=True)
    assert slow.whole > quick.whole
    # Its clock is slower than ours, and nobody waits for hours for a test that hangs.
    assert slow.test < quick.test
    assert quick.test < quick.silence < quick.whole
    assert quick.test < slow.silence < slow.whole
    assert limits(core, slow=False, test=7.0).test == limits(core, slow=True, test=7.0).test == 7.0


def test_an_unknown_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="no selection 'best'; choose one of smoke, core"):
        selection("best")


# --- the plugin in the guest ---------------------------------------------------------------------

SAMPLE = """
    import time, pytest

    def test_passes(): pass
    def test_fails(): assert 1 == 2, "one is not two"
    def test_skips(): pytest.skip("no such device")
    def test_expected(): pytest.xfail("a finding")
    @pytest.mark.xfail(reason="was expected")
    def test_unexpected(): pass
    @pytest.mark.xfail(reason="strictly", strict=True)
    def test_strict(): pass
    @pytest.fixture
    def broken():
        yield
        raise OSError("cannot tidy up")
    def test_teardown(broken): pass
    @pytest.fixture
    def absent(): raise OSError("cannot set up")
    def test_setup(absent): pass
    @pytest.mark.emulator_bug("qemu-tcg", "TCG forgets it")
    @pytest.mark.xfail(reason="emulator", strict=False)
    def test_bug(): assert False
    @pytest.mark.emulator_bug("bochs", "Bochs forgets it")
    @pytest.mark.xfail(reason="other", strict=False)
    def test_other_bug(): assert False
    @pytest.mark.emulator_bug("qemu-tcg", "TCG forgets it")
    def test_no_bug(): assert False, "for another reason"
    @pytest.fixture
    def reluctant():
        yield
        pytest.skip("nothing to tidy up")
    def test_skips_after(reluctant): assert False, "before"
    def test_says(record_property):
        record_property("kvm", True)
        print("said before it failed")
        pytest.fail("plainly", pytrace=False)
    @pytest.mark.parametrize("x", ["ü\\n", "b"])
    def test_names(x): pass
"""


PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-p",
    "pytest_timeout",
    "-p",
    "tests.lab_plugin",
    "-p",
    "no:cacheprovider",
)


def run_plugin(folder: Path, source: str, **environment: str) -> tuple[int, list[dict[str, Any]], str]:
    """pytest with the plugin on one file: its status, the records, its output."""
    (folder / "test_sample.py").write_text(textwrap.dedent(source))
    markers = "emulator_bug(slug, why): x"
    read, write = os.pipe()
    try:
        done = subprocess.run(
            [
                *(
                    *PYTEST,
                    "-q",
                    "-c",
                    os.devnull,
                    "--rootdir",
                    str(folder),
                    "-o",
                    f"markers={markers}",
                    str(folder),
                ),
            ],
            pass_fds=(write,),
            env=os.environ
            | {
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "PYKVM_LAB_RECORDS": str(write),
                "PYKVM_LAB_EMULATOR": "qemu-tcg",
            }
            | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    with os.fdopen(read) as lines:
        return done.returncode, [json.loads(line) for line in lines], done.stdout


def test_the_plugin_writes_what_happens(tmp_path: Path) -> None:
    status, records, output = run_plugin(tmp_path, SAMPLE)
    assert status == 1, output
    assert records[0]["event"] == "collected"
    assert records[0]["nodeid"].endswith("test_sample.py")
    assert records[1] == {"event": "session", "kernel": os.uname().release, "collected": 15}
    assert records[-1] == {"event": "end", "status": 1}
    results = {item["nodeid"].partition("::")[2]: item for item in records if item["event"] == "result"}
    starts = [item["nodeid"].partition("::")[2] for item in records if item["event"] == "start"]
    assert starts == list(results)
    assert {name: (item["outcome"], item["reason"]) for name, item in results.items()} == {
        "test_passes": ("passed", ""),
        "test_fails": ("failed", "AssertionError: one is not two"),
        "test_skips": ("skipped", "no such device"),
        "test_expected": ("xfailed", "a finding"),
        "test_unexpected": ("xpassed", "was expected"),
        "test_strict": ("failed", "[XPASS(strict)] strictly"),
        "test_teardown": ("failed", "in teardown: OSError: cannot tidy up"),
        "test_setup": ("failed", "in setup: OSError: cannot set up"),
        "test_bug": ("xfailed", "emulator"),
        "test_other_bug": ("xfailed", "other"),
        "test_no_bug": ("failed", "AssertionError: for another reason"),
        "test_skips_after": ("failed", "AssertionError: before"),
        "test_says": ("failed", "Failed: plainly"),
        "test_names[\\xfc\\n]": ("passed", ""),
        "test_names[b]": ("passed", ""),
    }
    assert {name for name, item in results.items() if item["bug"]} == {"test_bug"}
    assert results["test_bug"]["bug"] == "TCG forgets it"
    assert {name for name, item in results.items() if item["kvm"]} == {"test_says"}
    assert "assert 1 == 2" in results["test_fails"]["text"]
    assert "said before it failed" in results["test_says"]["text"]


def test_the_plugin_leaves_out_what_was_done(tmp_path: Path) -> None:
    _, records, _ = run_plugin(tmp_path, SAMPLE)
    done = tmp_path / "done"
    done.write_text("".join(f"{item['nodeid']}\n" for item in records if item["event"] == "start")[:-10])
    status, records, _ = run_plugin(tmp_path, SAMPLE, PYKVM_LAB_LEAVE_OUT=str(done))
    assert status == 0
    assert [item["event"] for item in records] == ["collected", "session", "start", "result", "end"]
    assert records[1]["collected"] == 1
    assert records[2]["nodeid"].endswith("test_names[b]")


def test_the_plugin_ends_a_test_over_its_limit_but_not_one_with_a_longer_own(tmp_path: Path) -> None:
    source = """
        import time, pytest
        @pytest.mark.timeout(30)
        def test_longer(): time.sleep(0.4)
        @pytest.mark.timeout(0.1)
        def test_patient(): time.sleep(0.15)
        def test_hangs(): time.sleep(50)
    """
    status, records, output = run_plugin(tmp_path, source, PYKVM_LAB_TEST_TIMEOUT="0.3")
    assert status == 1
    ends = [(item["event"], item["nodeid"].partition("::")[2]) for item in records[2:]]
    assert ends == [
        ("start", "test_longer"),
        ("result", "test_longer"),
        ("start", "test_patient"),
        ("result", "test_patient"),
        ("start", "test_hangs"),
    ]
    assert [item["outcome"] for item in records if item["event"] == "result"] == ["passed", "passed"]
    assert "Timeout (" in output
    assert "test_hangs" in output


def test_the_plugin_names_what_cannot_be_collected(tmp_path: Path) -> None:
    status, records, _ = run_plugin(tmp_path, "import no_such_module_here\n")
    assert status == 2
    assert records[0]["event"] == "broken"
    assert "no_such_module_here" in records[0]["text"]
    assert records[-1] == {"event": "end", "status": 2}


def test_the_plugin_outlives_its_reader(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text("def test_passes(): pass\n")
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [
                *(*PYTEST, "-q", "-c", os.devnull, str(tmp_path)),
            ],
            pass_fds=(write,),
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYKVM_LAB_RECORDS": str(write)},
            cwd=ROOT,
            capture_output=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert done.returncode == 0
