"""``pykvm interleave``: proof, counterexample, names that do not exist, JSON, statuses."""

from __future__ import annotations

import pytest

from pykvm.model.interleave import CASES, MUTATIONS, Rules, mutation
from pykvm.model.interleave import cases as cases_module
from tests.cli.runner import invoke


def test_a_case_is_proved(capfd: pytest.CaptureFixture[str]) -> None:
    result = invoke(capfd, "interleave", "--case", "ring-full")
    assert result.status == 0
    assert "All schedules of 1 case keep every promise." in result.out


def test_a_mutation_prints_its_schedule(capfd: pytest.CaptureFixture[str]) -> None:
    name = "track-without-flush"
    result = invoke(capfd, "interleave", "--mutation", name)
    assert result.status == 0
    assert str(MUTATIONS[name].explore().counterexample) in result.out
    for text in (MUTATIONS[name].change, MUTATIONS[name].outcome, MUTATIONS[name].rule):
        assert text in result.out


def test_a_harmless_mutation_says_that_nothing_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    result = invoke(capfd, "interleave", "--mutation", "track-protect-before-count")
    assert result.status == 0
    assert "Nothing is lost in any schedule" in result.out


def test_the_list_has_all_names(capfd: pytest.CaptureFixture[str]) -> None:
    result = invoke(capfd, "interleave", "--list")
    assert result.status == 0
    for name in (*CASES, *MUTATIONS):
        assert name in result.out
    document = invoke(capfd, "interleave", "--list", "--json").document
    assert [case["name"] for case in document["cases"]] == list(CASES)
    assert [item["name"] for item in document["mutations"]] == list(MUTATIONS)


def test_json_has_the_schedule(capfd: pytest.CaptureFixture[str]) -> None:
    document = invoke(capfd, "interleave", "--mutation", "track-without-flush", "--json").document
    (found,) = document["results"]
    assert (found["case"], found["mutation"]) == ("tracking", "track-without-flush")
    assert found["schedules"] is None
    schedule = found["counterexample"]["schedule"]
    assert [step["actor"] for step in schedule] == ["vCPU 0", "tracker", "tracker", "tracker", "vCPU 0"]
    assert found["counterexample"]["broken"].startswith("page 0 is tracked")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--case", "nothing"), "There is no case 'nothing'; 'pykvm interleave --list' has the names."),
        (("--mutation", "nothing"), "There is no mutation 'nothing'"),
        (("--mutation", "track-without-flush", "--case", "ring"), "A mutation has its own case"),
        (("--mutation", "track-without-flush", "--large"), "A mutation has its own case"),
    ],
)
def test_what_cannot_be_explored(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    result = invoke(capfd, "interleave", *arguments)
    assert result.status == 2
    assert words in result.err


def test_a_counterexample_to_kvms_rules_is_an_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases_module, "Rules", lambda: Rules(get_order=("kick", "xchg", "protect", "read")))
    result = invoke(capfd, "interleave", "--case", "bitmap")
    assert result.status == 10
    assert "Start: page 0" in result.out
    assert "Case bitmap breaks under KVM's rules" in result.err
    document = invoke(capfd, "interleave", "--case", "bitmap", "--json").document
    assert document["exit_status"] == 10
    assert document["results"][0]["counterexample"]["schedule"]


def test_a_mutation_that_is_not_found_is_an_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutation.Mutation, "rules", Rules())
    result = invoke(capfd, "interleave", "--mutation", "track-without-flush")
    assert result.status == 1
    assert "should lose something, and it does not" in result.err
