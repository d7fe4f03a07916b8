"""``pykvm explain`` end to end: worked examples, files, other hosts, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykvm.crosscheck.mmu_examples import EXAMPLES
from pykvm.crosscheck.mmu_findings import FINDINGS
from pykvm.crosscheck.saved import SavedPaging, save_case
from tests.cli.runner import invoke
from tests.cli.test_documents import check_keys, documented_keys

OURS = ("--profile", "pvm-shadow", "--era", "6.18", "--backend", "model")


def test_the_worked_examples_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    done = invoke(capfd, "explain", "--list")
    assert done.status == 0
    for name in (*EXAMPLES, *FINDINGS):
        assert name in done.out
    document = invoke(capfd, "explain", "--list", "--json").document
    assert [each["name"] for each in document["examples"]] == [*EXAMPLES, *FINDINGS]


def test_an_example_is_told_with_rules_and_counters(capfd: pytest.CaptureFixture[str]) -> None:
    done = invoke(capfd, "explain", "store-to-directory", *OURS)
    assert done.status == 0
    assert "step 1: access store8 at 0x12800, value 0x2, CPL 3" in done.out
    assert "PTE   at 0x13090: 0x0000000000012067 P R/W U/S A D -> page 0x12000" in done.out
    assert "the fault ends as RET_PF_EMULATE [kvm-mmu.md 7.6]" in done.out
    assert "gfn 0x12 is pushed to the ring of vCPU 0 [kvm-mmu.md 4.3]" in done.out
    assert "  mmu_pde_zapped                  +1  kvm-mmu.md 6" in done.out
    assert "model: as the sheet says" in done.out


def test_walks_are_short_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    short = "KVM walks the guest's tables: user write of 0x5000: gpa 0x5000: every level permits"
    assert short in invoke(capfd, "explain", "first-store", *OURS).out
    whole = invoke(capfd, "explain", "first-store", "--walks", *OURS).out
    assert short not in whole
    assert whole.count("PTE   at 0x13028: 0x0000000000005007 P R/W U/S -> page 0x5000") == 2


def test_what_repeats_is_told_once_and_lost_pages_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    told = invoke(capfd, "explain", "ring-overflow", *OURS).out
    assert told.count("gfn 0x6 is pushed to the ring of vCPU 0") == 1
    assert "\n  and so 299 more times\n" in told
    assert "ring: 0:0x6 (256 times)\n" in told
    assert "changed: 0:0x5 0:0x6\n" in told
    assert "written and in no log: 0:0x5\n" in told
    assert "in no log" not in invoke(capfd, "explain", "read-marks", *OURS).out


def test_the_json_has_the_documented_keys(capfd: pytest.CaptureFixture[str]) -> None:
    document = invoke(capfd, "explain", "add-to-directory", *OURS, "--json").document
    check_keys("pykvm explain", document)
    assert documented_keys("pykvm explain").keys() == document.keys() | {"examples"}
    assert document["machines"] == ["model"]
    assert document["unexpected"] == {"model": []}
    step = document["steps"][1]
    assert step["counters"]["vcpu0.pf_taken"] == {"model": 3}
    assert {event["rule"] for event in step["events"]} >= {"kvm-mmu.md 10.6", "kvm-mmu.md 10.7"}


def test_another_host_can_be_explained(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("nested-first-store", "--profile", "amd-npt", "--era", "7.2")
    done = invoke(capfd, "explain", *arguments, "--json")
    assert done.document["unexpected"] == {"model": []}
    assert done.document["machines"] == ["model"]
    wrong = invoke(capfd, "explain", "nested-first-store", *OURS).out
    assert "model: step 0: pf_taken moved by 0, not by 6" in wrong


def test_a_file_is_explained(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    EXAMPLES["flooding"].scenario.save(path)
    done = invoke(capfd, "explain", str(path), *OURS)
    assert done.status == 0
    assert "misaligned or floods it [kvm-mmu.md 10.6]" in done.out


@pytest.mark.kvm
def test_real_values_stand_beside_the_models(capfd: pytest.CaptureFixture[str]) -> None:
    document = invoke(capfd, "explain", "first-store", "--json").document
    assert document["machines"] == ["model", "kvm"]
    assert document["difference"] is None
    values = document["steps"][0]["counters"]
    assert values["vcpu0.pf_taken"]["kvm"] == values["vcpu0.pf_taken"]["model"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Say which scenario"),
        (("nonsense",), "There is neither a file nor a worked example 'nonsense'"),
        (("first-store", "--era", "7.2", "--backend", "model"), "An era is of a kind of host"),
    ],
)
def test_what_cannot_be_explained(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    done = invoke(capfd, "explain", *arguments)
    assert done.status == 2
    assert sentence in done.err


def test_a_case_without_a_machine_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "walk.json"
    save_case(SavedPaging(1), path)
    done = invoke(capfd, "explain", str(path))
    assert done.status == 2
    assert "pykvm replay explains those" in done.err
