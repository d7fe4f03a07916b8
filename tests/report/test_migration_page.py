"""The HTML page and the JSON of a migration."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from pykvm.report.charts import nice_steps
from pykvm.report.document import encode
from pykvm.report.html import migration_page
from pykvm.report.migration import MigrationReport, Round
from pykvm.report.terminal import rounds_table, summary_table

MIB = 1 << 20
REPORT = MigrationReport(
    verified=True,
    backend="kvm",
    tracker="ring",
    workload="hotspot",
    memory=4 * MIB,
    vcpus=1,
    transport="unix",
    rounds=(
        Round(0, 1024, 1000, 200_000, 0.0, 0.5, 3, heat=(2, 0, 1, 0)),
        Round(1, 3, 0, 12_400, 0.5, 0.25, 0, final=True),
    ),
    total_seconds=1.0,
    downtime_seconds=0.25,
    digest_seconds=0.2,
    bytes_sent=212_400,
    pages_total=1024,
    digest_source="aa" * 16,
    digest_destination="aa" * 16,
    guest_checks=77,
    guest_corruptions=0,
    parameters={"Seed": "1"},
)


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and checks that elements nest."""

    VOID = frozenset({"meta", "br", "rect", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")
        ]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_page_nests_and_fetches_nothing() -> None:
    text = migration_page(REPORT)
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", text)


def test_the_same_report_gives_the_same_bytes() -> None:
    assert migration_page(REPORT) == migration_page(replace(REPORT))


def test_everything_from_outside_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"
    page = Page(
        migration_page(
            replace(
                REPORT,
                workload=evil,
                tracker=evil,
                backend=evil,
                transport=evil,
                problem=evil,
                digest_source=evil,
                parameters={evil: evil},
                verified=False,
            )
        )
    )
    assert "script" not in page.tags
    # Four fields in the subtitle, a digest, the problem, a parameter and its name: nowhere raw.
    assert page.text.count(evil) == 8


def test_a_failed_migration_says_so_and_marks_the_page() -> None:
    text = migration_page(
        replace(REPORT, verified=False, problem="Page 0x201 differs.", wrong_pages=(0x201,))
    )
    page = Page(text)
    assert "✗ failed" in page.text
    assert "✓ verified" not in page.text
    assert "Page 0x201 differs." in page.text
    assert "page 0x201 differs between the two sides" in page.text
    assert 'class="wrong"' in text


def test_the_heat_map_names_the_addresses_and_their_pages() -> None:
    page = Page(migration_page(REPORT))
    assert "round 0, 0x0 to 0x100000: 2 of 256 pages" in page.text
    assert "round 0, 0x200000 to 0x300000: 1 of 256 pages" in page.text


def test_limits_that_were_not_kept_are_mentioned() -> None:
    remark = "the rounds ran out"
    assert remark not in migration_page(REPORT)
    assert remark in migration_page(replace(REPORT, converged=False))


def test_both_colour_schemes_are_there() -> None:
    assert "prefers-color-scheme: dark" in migration_page(REPORT)


def test_a_migration_that_failed_at_once_still_gives_a_page() -> None:
    page = Page(migration_page(replace(REPORT, verified=False, rounds=(), problem="Refused.")))
    assert page.open == []
    assert "Refused." in page.text


def test_json_has_no_values_that_parsers_reject() -> None:

    text = encode(
        {"rate": float("inf"), "none": float("nan"), "n": np.int64(3), "a": np.array([1.5]), "t": (1,)}
    )
    assert json.loads(text) == {"rate": None, "none": None, "n": 3, "a": [1.5], "t": [1]}


def test_json_keeps_a_list_of_numbers_on_one_line() -> None:
    document = {"heat": [1, 2, 3], "rounds": [{"n": 1}, {"n": 2}], "none": {}, "nested": [[1], []]}
    text = encode(document)
    assert json.loads(text) == document
    assert '  "heat": [1, 2, 3],\n' in text
    assert text.count("\n") == 16


def test_tables_render_for_a_terminal() -> None:
    output = StringIO()
    console = Console(file=output, width=120)
    console.print(rounds_table(REPORT))
    console.print(summary_table(replace(REPORT, verified=False, problem="Page 0x201 differs [bold]")))
    text = output.getvalue()
    assert "1,024" in text
    assert "FAILED: Page 0x201 differs [bold]" in text


@pytest.mark.parametrize("top", [0.003, 1, 7, 99.9, 100, 640, 12345.6])
def test_axis_marks_reach_the_top_in_round_steps(top: float) -> None:
    marks = nice_steps(top)
    assert marks[-1] >= top
    assert marks[-2] < top
    assert 2 <= len(marks) <= 5
