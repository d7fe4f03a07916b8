"""docs/interleavings.md against the explorer: schedules, what is said about mutations, the proof's table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pykvm.model.interleave import CASES, MUTATIONS, TOPICS
from tests.model.interleavings import explored, proof

TEXT = (Path(__file__).resolve().parents[2] / "docs/interleavings.md").read_text()
SECTIONS = dict(re.findall(r"^### (\S+)\n\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def plain(text: str) -> str:
    return " ".join(text.split())


def test_every_mutation_has_its_section_in_the_order_of_the_topics() -> None:
    assert list(SECTIONS) == list(MUTATIONS)
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert headings[-len(TOPICS) :] == list(TOPICS)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_section_tells_what_the_explorer_finds(name: str) -> None:
    mutation = MUTATIONS[name]
    result = explored(name)
    before, schedule, after = re.split(r"```(?:text)?\n", SECTIONS[name])
    assert plain(before) == mutation.change
    assert plain(after) == plain(f"{mutation.outcome} *Rule:* {mutation.rule}")
    expected = f"Nothing is lost in any schedule: {result.states:,} states."
    assert schedule.rstrip("\n") == str(result.counterexample or expected)


def row(name: str) -> list[str]:
    """Summary, bounds, states, schedules and longest of a case in the table of the proof."""
    (found,) = re.findall(rf"^\| `{name}`(?: \(large\))? \| (.*) \|$", TEXT, re.MULTILINE)
    assert (f"`{name}` (large)" in TEXT) == CASES[name].large
    return str(found).split(" | ")


def check(name: str) -> None:
    case = CASES[name]
    result = proof(name)
    assert result.schedules is not None
    schedules = result.schedules
    shown = f"{schedules:,}" if schedules < 10**6 else f"{schedules:.1e}"
    assert row(name) == [case.summary, case.bounds, f"{result.states:,}", shown, str(result.longest)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.large])
def test_the_table_of_the_proof(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.large])
def test_the_table_of_the_proof_large(name: str) -> None:
    check(name)


def test_all_cases_are_in_the_table() -> None:
    assert [row(name)[0] for name in CASES] == [case.summary for case in CASES.values()]


def test_what_the_text_refers_to_exists() -> None:
    for name in re.findall(r"`([a-z]+(?:-[a-z]+)+)`", TEXT):
        assert name in MUTATIONS or name in CASES, name
