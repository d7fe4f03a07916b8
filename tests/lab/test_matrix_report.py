"""The support matrix as a page: counts, reasons, what KVM offers, what changed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykvm.lab.matrix import Saved, State
from pykvm.lab.matrix_facts import changes, differences, facts, plain
from pykvm.lab.matrix_report import (
    CLASSES,
    classify,
    code,
    escaped,
    groups,
    markdown,
    problems,
    report,
    text_of,
)
from pykvm.lab.results import OUTCOMES, Case, SuiteResult
from pykvm.report import matrix as page

NOW = State("f" * 16, "abc123")
WHEN = "2026-01-02T03:04:05Z"


def info(tdp_mmu: bool = True, **capabilities: int) -> dict[str, Any]:
    """What 'pykvm info --json' prints, in short."""
    return {
        "kernel": "x",
        "mmu": {"kind": "npt", "tdp_mmu": tdp_mmu},
        "modes": [{"mode": "real", "cpl": 0, "execution": "native"}],
        "capabilities": {"IRQCHIP": 1} | capabilities,
        "module_parameters": {"kvm": {"tdp_mmu": "Y" if tdp_mmu else "N"}, "kvm_amd": {"npt": "Y"}},
        "limits": {"memslots": 32764},
    }


def saved(
    series: str, kind: str, *cases: Case, state: State = NOW, not_offered: str = "", **changed: Any
) -> Saved:
    result = None
    if not not_offered:
        known: dict[str, Any] = {
            "emulator": "QEMU 10.0, TCG",
            "slug": "qemu-tcg",
            "collected": len(cases),
            "boot_seconds": 9.4,
            "seconds": 81.0,
            "boots": 1,
            "cases": cases,
        }
        result = SuiteResult(series, f"{series}.9-cloud", kind, **(known | changed))
    return Saved(
        *(series, f"{series}.9-cloud", kind, "core", state.fingerprint, state.revision, WHEN),
        result=result,
        not_offered=not_offered,
    )


CELLS = [
    saved(
        "6.1",
        "amd-npt",
        Case("tests/a.py::test_one[x]", "passed"),
        Case("tests/a.py::test_two[x]", "failed", reason="assert 1 == 2 | pipe"),
        Case("tests/a.py::test_two[y]", "failed", reason="assert 1 == 2 | pipe"),
        Case("tests/a.py::test_three", "xfailed", reason="KVM cannot emulate it"),
        Case("tests/a.py::test_four", "xfailed", reason="r", bug="TCG forgets breakpoints"),
        Case("tests/a.py::test_five", "skipped", reason="no device"),
        facts=info(DIRTY_LOG_RING=65536),
    ),
    saved("6.1", "intel-ept", not_offered="the kernel has no module kvm_intel"),
    saved(
        "6.12",
        "amd-npt",
        Case("tests/a.py::test_one[x]", "passed"),
        Case("tests/a.py::test_three", "xfailed", reason="KVM cannot emulate it"),
        state=State("0" * 16, "old777"),
        facts=info(DIRTY_LOG_RING=65536, USER_MEMORY2=1),
    ),
    saved(
        "6.12",
        "amd-npt-oldmmu",
        Case("tests/a.py::test_one[x]", "died", reason="its kernel panicked: Oops"),
        collected=3,
        facts=info(tdp_mmu=False, DIRTY_LOG_RING=65536, USER_MEMORY2=1),
    ),
]


def document() -> dict[str, Any]:
    return report(CELLS, NOW, WHEN)


def test_cells_of_the_main_table() -> None:
    cells = {(cell["series"], cell["kind"]): text_of(cell) for cell in document()["cells"]}
    assert cells == {
        ("6.1", "amd-npt"): "core: 1 of 5 (2 failed, 2 xfailed, 1 skipped)",
        ("6.1", "intel-ept"): "not offered",
        ("6.12", "amd-npt"): "core: 1 of 2 (1 xfailed), older",
        ("6.12", "amd-npt-oldmmu"): "core: 0 of 1 (1 died, 2 not run)",
    }
    assert text_of(None) == "not run"


def test_a_cell_without_any_result_says_so() -> None:
    known = saved("6.1", "amd-npt", problem="Too slow.")
    assert known.result is not None
    late = Saved.from_json(known.to_json() | {"result": known.result.to_json() | {"state": "timeout"}})
    (cell,) = report([late], NOW, WHEN)["cells"]
    assert text_of(cell) == "core: no result (timeout)"


def test_reasons_are_grouped_worst_first() -> None:
    found = [(item["class"], item["reason"], item["count"], item["where"]) for item in document()["groups"]]
    assert found == [
        ("unexplained", "assert 1 == 2 | pipe", 2, ["6.1 amd-npt"]),
        ("died", "its kernel panicked: Oops", 1, ["6.12 amd-npt-oldmmu"]),
        ("finding", "KVM cannot emulate it", 2, ["6.1 amd-npt", "6.12 amd-npt"]),
        ("emulator", "TCG forgets breakpoints", 1, ["6.1 amd-npt"]),
    ]
    assert document()["groups"][0]["tests"] == ["tests/a.py::test_two[x]", "tests/a.py::test_two[y]"]


def test_a_lab_without_all_results_is_a_group() -> None:
    cell = saved("6.1", "amd-npt", state=NOW, problem="Too slow.")
    assert cell.result is not None
    late = Saved.from_json(cell.to_json() | {"result": cell.result.to_json() | {"state": "timeout"}})
    (group,) = groups([late])
    assert (group["class"], group["reason"], group["tests"]) == ("unfinished", "Too slow.", [])


def test_every_outcome_has_a_class_or_is_no_problem() -> None:
    found = {outcome: classify(Case("x", outcome)) for outcome in OUTCOMES}
    assert found == {
        "passed": "",
        "failed": "unexplained",
        "xfailed": "finding",
        "xpassed": "unexpected",
        "skipped": "",
        "died": "died",
    }
    assert {name for name in found.values() if name} | {"emulator", "unfinished"} == set(CLASSES)
    assert set(page._HEADINGS) == set(CLASSES)


# --- what KVM offers -----------------------------------------------------------------------------


def test_facts_that_differ_name_the_kinds() -> None:
    found = facts([cell for cell in CELLS if cell.result], ["6.1", "6.12"])
    differ = {row["name"]: row["values"] for row in found["differ"]}
    assert differ["KVM_CAP_USER_MEMORY2"] == {"6.1": "no", "6.12": "1"}
    assert differ["kvm.tdp_mmu"] == {"6.1": "Y", "6.12": "Y (amd-npt); N (amd-npt-oldmmu)"}
    assert differ["paging of the MMU"]["6.12"] == ("npt, TDP MMU (amd-npt); npt, older MMU (amd-npt-oldmmu)")
    same = {row["name"]: row["value"] for row in found["same"]}
    assert same["KVM_CAP_DIRTY_LOG_RING"] == "65536"
    assert same["kvm_amd.npt"] == "Y"
    assert same["guests: real, CPL 0"] == "native"
    assert not differ.keys() & same.keys()


@pytest.mark.parametrize("garbage", [{}, {"error": "died"}, {"mmu": 3, "modes": [3], "capabilities": []}])
def test_facts_that_a_lab_did_not_say_are_left_out(garbage: dict[str, Any]) -> None:
    assert plain(garbage) == {}
    cells = [saved(series, "amd-npt", facts=garbage) for series in ("6.1", "6.2")]
    assert changes(cells, ["6.1", "6.2"]) == []


def test_changes_between_kernels_merge_kinds() -> None:
    cells = [
        saved("6.1", "amd-npt", facts=info(A=1, OLD=1)),
        saved("6.1", "amd-shadow", facts=info(A=1, OLD=1)),
        saved("6.12", "amd-npt", facts=info(A=3, NEW=1, ONLY=1)),
        saved("6.12", "amd-shadow", facts=info(A=3, NEW=1, tdp_mmu=False)),
        saved("6.12", "intel-ept", facts=info()),
    ]
    found = [
        (item["from"], item["to"], item["kinds"], item["what"], item["names"])
        for item in changes(cells, ["6.1", "6.12"])
    ]
    both = ["amd-npt", "amd-shadow"]
    assert found == [
        ("6.1", "6.12", both, "capabilities that are gone", ["KVM_CAP_OLD"]),
        ("6.1", "6.12", both, "new capabilities", ["KVM_CAP_NEW"]),
        ("6.1", "6.12", ["amd-npt"], "new capabilities", ["KVM_CAP_ONLY"]),
        ("6.1", "6.12", both, "other values of capabilities", ["KVM_CAP_A 1 → 3"]),
        ("6.1", "6.12", ["amd-shadow"], "other values of parameters", ["kvm.tdp_mmu Y → N"]),
    ]


def test_a_kernel_that_was_not_run_is_stepped_over() -> None:
    cells = [saved("6.1", "amd-npt", facts=info()), saved("7.2", "amd-npt", facts=info(NEW=1))]
    (found,) = changes(cells, ["6.1", "6.12", "7.2"])
    assert (found["from"], found["to"]) == ("6.1", "7.2")


def test_parameters_come_and_go() -> None:
    old = {"module_parameters": {"kvm": {"a": "1", "b": "1"}}}
    new = {"module_parameters": {"kvm": {"b": "1", "c": "1"}}}
    assert differences(old, new) == [
        ("new parameters", ("kvm.c",)),
        ("parameters that are gone", ("kvm.a",)),
    ]


# --- pages ---------------------------------------------------------------------------------------


# As GitHub's scanner has it: a backslash takes the punctuation after it along.
CELL = re.compile(r"(?:\\[!-/:-@\[-`{-~]|[^|])+")


def tables(text: str) -> list[list[str]]:
    """The rows of all tables."""
    return [CELL.findall(line[1:-1]) for line in text.splitlines() if line.startswith("|")]


def test_the_markdown_page_has_everything() -> None:
    text = markdown(document())
    for part in (
        "# Support matrix",
        "* `core`: KVM",
        "`abc123`, 2026-01-02T03:04:05Z",
        "Linux 6.1 | Linux 6.12",
        "core: 1 of 5 (2 failed, 2 xfailed, 1 skipped)",
        "core: 1 of 2 (1 xfailed), older",
        "### Failures that nothing explains yet",
        "assert 1 == 2 &#124; pipe",
        "`test_two`",
        "### Bugs of the emulators, not of KVM",
        "TCG forgets breakpoints",
        "| `KVM_CAP_USER_MEMORY2` | no | 1 |",
        "| paging of the MMU |",
        "6.1 to 6.12",
        "QEMU 10.0, TCG | `core` | 9 s | 81 s",
        r"not offered: the kernel has no module kvm\_intel",
        "old777",
    ):
        assert part in text, part
    assert text.endswith("\n")


def test_rows_are_as_wide_as_their_heads() -> None:
    text = markdown(document())
    for block in text.split("\n\n"):
        rows = tables(block)
        assert len({len(row) for row in rows}) <= 1, block


def test_a_matrix_without_cells_says_so() -> None:
    assert "No cell has been run yet." in markdown(report([], NOW, WHEN))


@settings(deadline=None)
@given(st.text() | st.text("\\|`\n*a "))
@example("\\|")
@example("\\")
def test_no_text_breaks_a_table(text: str) -> None:
    for made in (escaped(text), code(text)):
        assert tables(f"| {made} | next |\n") == [[f" {made} ", " next "]]


def test_an_old_cell_is_no_problem_of_today() -> None:
    bad, older = problems(CELLS, NOW)
    assert [(result.series, result.kind) for result in bad] == [
        ("6.1", "amd-npt"),
        ("6.12", "amd-npt-oldmmu"),
    ]
    assert older == 1


class Structure(HTMLParser):
    """Complains about tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_html_page_is_whole_and_escaped() -> None:
    bad = "<script>alert('&')</script>"
    evil = [
        saved(
            "6.1",
            "amd-npt",
            Case(bad, "failed", reason=bad),
            emulator=bad,
            facts=info() | {"capabilities": {bad: 1}},
        ),
        saved("6.2", "amd-npt", state=State(bad, bad), facts={"mmu": {"kind": bad}, "capabilities": {}}),
        saved("6.2", "amd-shadow", not_offered=bad),
    ]
    for cells in (CELLS, evil, []):
        text = page.matrix_page(report(cells, NOW, WHEN))
        parser = Structure()
        parser.feed(text)
        assert parser.open == []
        assert "<script" not in text
        assert "http" not in text.replace("http-equiv", "")
        assert text == page.matrix_page(report(cells, NOW, WHEN))


def test_the_html_page_has_everything() -> None:
    text = page.matrix_page(document())
    for part in (
        "1 of 5",
        "2 failed, 2 xfailed, 1 skipped",
        "boot 9.4 s, run 81 s",
        "older: old777",
        "not offered",
        "TCG forgets breakpoints",
        "KVM_CAP_USER_MEMORY2",
        "3 tests failed",
        "6.1 to 6.12",
        "tests/a.py::test_two[y]",
    ):
        assert part in text, part
    good = page.matrix_page(report([saved("6.1", "amd-npt", Case("x", "passed"))], NOW, WHEN))
    assert "no unexplained failure" in good
