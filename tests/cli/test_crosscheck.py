"""``pykvm crosscheck`` end to end: agreement, disagreement, and what it says where KVM is missing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pykvm.crosscheck.instructions.campaign import Campaign
from pykvm.crosscheck.instructions.case import InstructionCase
from pykvm.crosscheck.instructions.known import TABLE
from pykvm.crosscheck.instructions.rule import Known
from pykvm.crosscheck.mmu_examples import EXAMPLES
from pykvm.model.cpu import decode
from pykvm.model.cpu.semantics import TABLE as SEMANTICS
from pykvm.model.system import ModelSystem
from pykvm.profiles import profile
from pykvm.x86.bits import Rflags
from tests.cli.runner import ROOT, invoke
from tests.cli.test_documents import check_keys

FEW = ("--kind", "instructions", "--mode", "64", "--cases", "60", "--seed", "1", "--backend", "model")


def test_agreement_ends_with_status_0(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = invoke(capfd, "crosscheck", *FEW, "--save", str(tmp_path / "none"), "--json")
    assert done.status == 0
    check_keys("pykvm crosscheck", done.document)
    assert done.document["cases"] == 120  # CPL 3 and CPL 0
    assert done.document["unexplained"] == 0
    user, system = done.document["coverage"]["instructions"]
    assert (user["mode"], user["cpl"], user["executors"]) == (64, 3, ["model", "host"])
    assert system["cpl"] == 0
    assert not (tmp_path / "none").exists()


def test_the_seed_is_told_and_repeats(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = invoke(capfd, "crosscheck", *FEW, "--save", str(tmp_path))
    assert "pykvm crosscheck --seed 1 --kind instructions --mode 64 --cases 60\n" in done.err


def test_without_kvm_the_rest_is_named(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--backend", "model", "--seconds", "1", "--seed", "1", "--save", str(tmp_path))
    done = invoke(capfd, "crosscheck", *arguments, "--json")
    assert done.status == 0
    left_out = "\n".join(done.document["left_out"])
    assert "paging: there is no real KVM" in left_out
    assert "scenarios: there is no real KVM" in left_out
    assert "16-bit code at CPL 0 runs on the model only" in left_out
    assert all(len(room["executors"]) > 1 for room in done.document["coverage"]["instructions"])
    assert done.document["cases"] > 0


@pytest.mark.parametrize("what", [("--kind", "paging"), ("--kind", "instructions", "--mode", "16")])
def test_comparing_nothing_is_no_success(capfd: pytest.CaptureFixture[str], what: tuple[str, ...]) -> None:
    done = invoke(capfd, "crosscheck", *what, "--cases", "5", "--backend", "model", "--json")
    assert (done.status, done.document["cases"]) == (3, 0)
    assert done.document["left_out"][0] in done.err


@pytest.mark.parametrize("option", ["--save", "--coverage"])
def test_files_that_cannot_be_written_are_told_before_the_work(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").touch()
    done = invoke(capfd, "crosscheck", *FEW, option, str(tmp_path / "file" / "below"))
    assert done.status == 2
    assert done.err.startswith("pykvm: Cannot write")
    assert "seed" not in done.err


def test_what_was_found_before_an_interruption_stays(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NOP that changes CF, and Ctrl-C right after the case was saved."""
    right = SEMANTICS["nop"]

    def wrong(cpu, insn):  # type: ignore[no-untyped-def]
        right.execute(cpu, insn)
        cpu.rflags ^= int(Rflags.CF)

    def interrupted(self: object, report: object, *rest: object) -> None:
        batch(self, report, *rest)  # type: ignore[arg-type]
        if report.disagreements:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    batch = Campaign._batch
    monkeypatch.setattr(decode, "decoder", decode.Decoder)  # those that are shared know instructions already
    monkeypatch.setitem(SEMANTICS, "nop", replace(right, execute=wrong))
    monkeypatch.setattr(Campaign, "_batch", interrupted)
    arguments = ("--kind", "instructions", "--mode", "64", "--cases", "5000", "--seed", "1")
    done = invoke(capfd, "crosscheck", *arguments, "--backend", "model", "--save", str(tmp_path), "--json")
    assert done.status == 130
    assert len(list(tmp_path.iterdir())) == len(done.document["disagreements"]) > 0


def test_a_wrong_model_is_found_saved_and_replayed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INC that changes CF."""
    right = SEMANTICS["inc"]

    def wrong(cpu, insn):  # type: ignore[no-untyped-def]
        right.execute(cpu, insn)
        cpu.rflags ^= int(Rflags.CF)

    monkeypatch.setattr(decode, "decoder", decode.Decoder)  # those that are shared know instructions already
    monkeypatch.setitem(SEMANTICS, "inc", replace(right, execute=wrong))
    arguments = ("--kind", "instructions", "--mode", "64", "--cases", "1500", "--seed", "1")
    done = invoke(capfd, "crosscheck", *arguments, "--backend", "model", "--save", str(tmp_path), "--json")
    assert done.status == 13
    assert done.document["unexplained"] > 0
    forms = {each["form"] for each in done.document["disagreements"]}
    assert forms <= {"FF /0", "FE /0"}
    files = sorted(tmp_path.iterdir())
    case = InstructionCase.from_json(json.loads(files[0].read_text()))
    assert case.code[-2] in {0xFE, 0xFF} or len(case.code) > 2
    again = invoke(capfd, "replay", str(files[0]), "--backend", "model", "--against", "model")
    assert again.status == 13
    assert "CF" in again.err
    monkeypatch.setitem(SEMANTICS, "inc", right)
    assert invoke(capfd, "replay", str(files[0]), "--backend", "model", "--against", "model").status == 0


def test_the_coverage_table_is_written(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    done = invoke(capfd, "crosscheck", *FEW, "--coverage", str(table), "--save", str(tmp_path))
    assert done.status == 0
    assert table.read_text().startswith("# Coverage of the instruction cross-check\n\n120 cases.")
    refused = invoke(capfd, "crosscheck", "--kind", "paging", "--coverage", str(table))
    assert refused.status == 2


@pytest.mark.kvm
def test_all_kinds_agree_on_kvm(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = invoke(
        capfd,
        "crosscheck",
        "--backend",
        "kvm",
        "--seconds",
        "6",
        "--seed",
        "3",
        "--save",
        str(tmp_path),
        "--json",
    )
    assert done.status == 0, done.document["disagreements"]
    assert set(done.document["coverage"]) == {"instructions", "paging", "scenarios"}
    check_keys("pykvm crosscheck", done.document)


def documented(page: str) -> set[str]:
    return set(re.findall(r"^\| (.+?) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE))


@pytest.mark.parametrize("rule", TABLE, ids=lambda rule: rule.name)
def test_every_known_difference_is_documented(rule: Known) -> None:
    page = "kvm-findings.md" if rule.who in {"kvm", "tcg"} else "crosscheck.md"
    assert rule.name in documented(page)


# --- scenarios of KVM's MMU -----------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("level", ["L2", "L3"])
def test_scenarios_of_the_mmu_agree(capfd: pytest.CaptureFixture[str], tmp_path: Path, level: str) -> None:
    arguments = ("--kind", "scenarios", "--level", level, "--seed", "11", "--count", "12")
    done = invoke(capfd, "crosscheck", *arguments, "--save", str(tmp_path / "none"), "--json")
    assert done.status == 0, done.err
    check_keys("pykvm crosscheck", done.document)
    compared = done.document["coverage"]["mmu"]
    assert (compared["level"], compared["cases"]) == (level, 12)
    assert compared["counters"] > compared["steps"] > 100
    assert f"again with: pykvm crosscheck --seed 11 --kind scenarios --cases 12 --level {level}" in done.err
    assert "model of " in done.err
    assert not (tmp_path / "none").exists()


def test_only_scenarios_have_a_level(capfd: pytest.CaptureFixture[str]) -> None:
    done = invoke(capfd, "crosscheck", "--kind", "paging", "--level", "L3")
    assert done.status == 2
    assert "Only scenarios have a level" in done.err


@pytest.mark.kvm
def test_a_scenario_of_the_mmu_is_replayed_at_l3(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    EXAMPLES["store-load"].scenario.save(path)
    done = invoke(capfd, "replay", str(path), "--steps")
    assert done.status == 0, done.err
    assert "Both machines agree about 1 steps." in done.out
    assert done.err.count("    ring: 0:0x10 0:0x11 0:0x12 0:0x13 0:0x13 0:0x5 0:0x13") == 2


@pytest.mark.kvm
def test_a_model_of_another_host_disagrees_and_it_is_told(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ModelSystem(profile=profile("amd-npt", "6.12"))
    monkeypatch.setattr("pykvm.cli.crosscheck.open_model", lambda kvm: wrong)
    arguments = ("--kind", "scenarios", "--level", "L3", "--seed", "1", "--count", "1")
    done = invoke(capfd, "crosscheck", *arguments, "--save", str(tmp_path), "--json")
    assert done.status == 13
    (found,) = done.document["disagreements"]
    (saved,) = tmp_path.iterdir()
    assert found["replay"] == f"pykvm replay {saved}"
    assert "Rule: " in found["text"]
