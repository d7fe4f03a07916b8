"""``pykvm replay``: saved cases of every kind, agreeing and not, and files that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.instructions.case import FLAT, InstructionCase, Outcome
from pykvm.crosscheck.instructions.machine import MachineExecutor
from pykvm.crosscheck.mmu_findings import NAMED
from pykvm.crosscheck.saved import SavedPaging, load_case, save_case
from pykvm.errors import UsageError
from pykvm.machine import Registers
from tests.cli.runner import execute, invoke
from tests.cli.test_documents import check_keys
from tests.crosscheck.samples import OUT, every_step, guest, load, page, scenario, writer

Capture = pytest.CaptureFixture[str]
PAGING_CASE = 5
FAILURE = {"error", "exit_status"}
"""What any command prints that fails."""
UNEXCUSED = scenario(
    "a read of a page whose entry has D set, without the rule that excuses KVM",
    guest("long", 3, load(page(2), "long") + OUT, data_flags=0x67),
    plan.Run(),
    plan.Collect(1),
)
CLOCK = scenario("rdtsc: two machines never agree", guest("long", 0, b"\x0f\x31" + OUT), plan.Run())


POPCNT = InstructionCase(64, 0, b"\xf3\x0f\xb8\xc3", Registers(rip=FLAT.code, rbx=7))
ADD = InstructionCase(64, 3, b"\x48\x01\xd8", Registers(rip=FLAT.code, rax=5, rbx=7))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "case.json"


@pytest.mark.kvm
def test_a_scenario_that_agrees_has_status_0(capfd: Capture, file: Path) -> None:
    save_case(scenario("s", guest("long", 3, writer("long", 1)), plan.Run(), plan.Collect(1)), file)
    result = invoke(capfd, "replay", str(file))
    assert (result.status, result.out, result.err) == (0, "Both machines agree about 2 steps.\n", "")


@pytest.mark.kvm
def test_a_scenario_that_differs_has_status_13_and_says_where(capfd: Capture, file: Path) -> None:
    save_case(CLOCK, file)
    result = invoke(capfd, "replay", str(file))
    assert result.status == 13
    assert result.out == ""
    assert result.err.startswith("pykvm: L4, step 0 (run vcpu=0 exits=1 fill=None): ")
    assert f"Replay: pykvm replay {file}" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.kvm
def test_a_set_that_no_rule_excuses_is_a_difference(capfd: Capture, file: Path) -> None:
    """Every known KVM marks it (hosts.md B.0, B.9): with a rule this is among the fixed scenarios."""
    save_case(UNEXCUSED, file)
    result = invoke(capfd, "replay", str(file), "--json")
    assert result.status == 13
    difference = result.document["difference"]
    assert (difference["level"], difference["what"]) == ("L1", "gfn 0x82 of slot 1")
    assert difference["values"] == ["reported", "not reported"]


@pytest.mark.kvm
@pytest.mark.parametrize("case", [every_step(), CLOCK, SavedPaging(PAGING_CASE), ADD])
def test_the_json_has_the_documented_keys(capfd: Capture, file: Path, case: object) -> None:
    save_case(case, file)  # type: ignore[arg-type]
    document = invoke(capfd, "replay", str(file), "--json").document
    check_keys("pykvm replay", {name: value for name, value in document.items() if name not in FAILURE})


@pytest.mark.kvm
def test_steps_are_shown_when_asked_for(capfd: Capture, file: Path) -> None:
    save_case(every_step(), file)
    shown = invoke(capfd, "replay", str(file), "--steps").err
    assert "On kvm:" in shown
    assert "On model:" in shown
    assert "step 1: collect slot=1\n    dirty: 1:0x81\n" in shown
    assert "READONLY of a live slot cannot change" in shown


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["straddling-store", "read-marks", "first-store"])
def test_an_example_or_finding_runs_by_its_name(capfd: Capture, name: str) -> None:
    result = invoke(capfd, "replay", name)
    assert result.status == 0, result.err
    assert result.out == f"Both machines agree about {len(NAMED[name].scenario.steps)} steps.\n"


@pytest.mark.kvm
def test_a_paging_case_runs_by_its_index(capfd: Capture, file: Path) -> None:
    save_case(SavedPaging(PAGING_CASE), file)
    result = invoke(capfd, "replay", str(file))
    assert result.status == 0
    assert f"agree about paging case {PAGING_CASE}." in result.out


@pytest.mark.kvm
@pytest.mark.parametrize("case", [ADD, POPCNT])
def test_an_instruction_runs_on_all_processors(capfd: Capture, file: Path, case: InstructionCase) -> None:
    save_case(case, file)
    result = invoke(capfd, "replay", str(file))
    assert result.status == 0
    assert result.out.endswith(f"{case.code.hex(' ')}), 64-bit, CPL {case.cpl}: agree.\n")
    shown = dict(line.split(": ") for line in result.err.splitlines())
    assert shown["model"] == f"completed at {FLAT.code + len(case.code):#x}"
    assert shown["kvm"] in {shown["model"], "unsupported"}


@pytest.mark.kvm
def test_an_instruction_that_nobody_explains_has_status_13(
    capfd: Capture, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute_case = MachineExecutor.execute

    def wrong(executor: MachineExecutor, case: InstructionCase) -> Outcome:
        outcome = execute_case(executor, case)
        if executor.name == "model":
            outcome.registers.rax += 1
        return outcome

    monkeypatch.setattr(MachineExecutor, "execute", wrong)
    save_case(ADD, file)
    result = invoke(capfd, "replay", str(file))
    assert result.status == 13
    assert "add rax, rbx (48 01 d8), 64-bit, CPL 3: " in result.err
    assert "rax 0xd against 0xc" in result.err


def test_the_model_is_held_against_itself_where_nothing_else_is_wanted(file: Path) -> None:
    save_case(CLOCK, file)
    result = execute("replay", str(file), "--backend", "model")
    assert "Only the model is used: it is held against itself." in result.err


def test_cases_survive_a_file(file: Path) -> None:
    for case in (every_step(), SavedPaging(7), ADD):
        save_case(case, file)
        assert load_case(file) == case


NO_CASES = {
    "not JSON": ("{", "is not JSON"),
    "not text": ("\x00", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "no object": ("[1]", "'kind' must be one of scenario"),
    "no kind": ("{}", "'kind' must be one of scenario"),
    "an unknown kind": ('{"kind": "dream"}', "'kind' must be one of scenario"),
    "an odd kind": ('{"kind": ["scenario"]}', "'kind' must be one of scenario"),
    "a broken scenario": ('{"kind": "scenario"}', "scenario.name is missing"),
    "a broken instruction case": ('{"kind": "instruction", "mode": 64}', "not an instruction case"),
    "a broken paging case": ('{"kind": "paging", "index": -1}', "paging.index must be in 0 to"),
    "a paging case with more": ('{"kind": "paging", "index": 1, "x": 1}', "unknown member 'x'"),
}


@pytest.mark.parametrize("name", NO_CASES)
def test_a_file_without_a_case_is_one_sentence_and_status_2(capfd: Capture, file: Path, name: str) -> None:
    text, expected = NO_CASES[name]
    file.write_text(text)
    result = invoke(capfd, "replay", str(file))
    assert (result.status, result.out) == (2, "")
    assert expected in result.err
    assert result.err.count("\n") == 1


def test_a_file_that_is_not_there_is_one_sentence(capfd: Capture, tmp_path: Path) -> None:
    result = invoke(capfd, "replay", str(tmp_path / "none.json"))
    assert result.status == 2
    assert result.err.endswith("none.json: No such file or directory.\n")


def test_a_file_that_never_ends_is_refused() -> None:
    with pytest.raises(UsageError, match="longer than 64 MiB"):
        load_case(Path("/dev/zero"))


def test_what_is_saved_is_readable(file: Path) -> None:
    save_case(SavedPaging(3), file)
    assert json.loads(file.read_text()) == {"kind": "paging", "index": 3}
