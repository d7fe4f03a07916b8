"""JUnit XML of runs in labs: what common readers need, whatever the tests said."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.lab.junit import clean, junit, names, write_junit
from pykvm.lab.results import OUTCOMES, Case, SuiteResult


def sample(**changes: object) -> SuiteResult:
    cases = tuple(
        Case(f"tests/kvm/test_x.py::test_{outcome}[a::b]", outcome, 1.25, f"why {outcome}", "text", True)
        for outcome in OUTCOMES
    )
    known: dict[str, object] = {
        "series": "6.1",
        "release": "6.1.0-43-cloud-amd64",
        "kind": "amd-npt",
        "emulator": "QEMU 10.0, TCG",
        "slug": "qemu-tcg",
        "running": "6.1.0-43",
        "collected": 6,
        "boots": 2,
        "boot_seconds": 9.5,
        "seconds": 70.0,
        "cases": cases,
    }
    return SuiteResult(**(known | changes))  # type: ignore[arg-type]


def test_counts_cases_and_properties() -> None:
    root = Xml.fromstring(junit([sample(), sample(kind="amd-shadow")]))
    assert root.tag == "testsuites"
    assert {name: root.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "12",
        "failures": "2",
        "errors": "2",
        "skipped": "4",
    }
    suite = root[0]
    assert suite.get("name") == "amd-npt 6.1.0-43-cloud-amd64"
    assert suite.get("time") == "70.000"
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert properties == {
        "kernel": "6.1.0-43",
        "kind": "amd-npt",
        "emulator": "QEMU 10.0, TCG",
        "emulator_slug": "qemu-tcg",
        "boots": "2",
        "boot_seconds": "9.5",
        "state": "finished",
    }
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert {case.get("classname") for case in cases.values()} == {"tests.kvm.test_x"}
    found = {name: [(part.tag, part.get("message")) for part in case] for name, case in cases.items()}
    assert found == {
        "test_passed[a::b]": [],
        "test_failed[a::b]": [("failure", "why failed")],
        "test_xfailed[a::b]": [("skipped", "why xfailed")],
        "test_xpassed[a::b]": [("system-out", None)],
        "test_skipped[a::b]": [("skipped", "why skipped")],
        "test_died[a::b]": [("error", "why died")],
    }
    assert cases["test_failed[a::b]"][0].text == "text"
    assert cases["test_failed[a::b]"].get("time") == "1.250"


def test_a_bug_of_the_emulator_is_named() -> None:
    case = Case("tests/x.py::test_y", "xfailed", reason="generic", bug="TCG forgets it")
    root = Xml.fromstring(junit([sample(cases=(case,))]))
    (skipped,) = root.iter("skipped")
    assert skipped.get("message") == "the emulator's bug: TCG forgets it"


def test_a_lab_that_died_is_an_error_of_its_own() -> None:
    root = Xml.fromstring(junit([sample(state="died", problem="The lab died: a panic.", cases=())]))
    (case,) = root.iter("testcase")
    assert (root.get("tests"), root.get("errors")) == ("1", "1")
    assert (case.get("classname"), case.get("name")) == ("pykvm.lab", "the lab")
    assert case[0].get("message") == "The lab died: a panic."


@pytest.mark.parametrize(
    ("nodeid", "expected"),
    [
        ("tests/kvm/test_x.py::test_z", ("tests.kvm.test_x", "test_z")),
        ("tests/kvm/test_x.py::TestY::test_z[1::2/3]", ("tests.kvm.test_x.TestY", "test_z[1::2/3]")),
        ("test_x.py", ("", "test_x")),
    ],
)
def test_names(nodeid: str, expected: tuple[str, str]) -> None:
    assert names(nodeid) == expected


@settings(deadline=None)
@given(st.text())
def test_any_text_makes_valid_xml(text: str) -> None:
    # The characters that XML forbids, lone surrogates included, come out of dying guests.
    case = Case(f"tests/x.py::test[{text}]", "failed", reason=text, text=text)
    root = Xml.fromstring(junit([sample(cases=(case,), problem=text, emulator=text)]))
    (failure,) = root.iter("failure")
    normal = clean(text).replace("\r\n", "\n").replace("\r", "\n")
    assert (failure.text or "") == normal


def test_it_is_written(tmp_path: Path) -> None:
    write_junit(tmp_path / "x.xml", [sample()])
    assert (tmp_path / "x.xml").read_bytes() == junit([sample()])
    assert junit([]).startswith(b"<?xml version='1.0' encoding='utf-8'?>")
