"""The known profiles: what they are made of, and that each behaviour says since when it is so."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

import pykvm
from pykvm.errors import UsageError
from pykvm.profiles import DEVELOPMENT_HOST, ERAS, KINDS, Paging, Profile, WriteTrackAllocation, profile

SOURCE = Path(pykvm.__file__).parent / "profiles" / "profile.py"
NAMES = [each.name for each in fields(Profile)]


def texts() -> dict[str, str]:
    """Field to the string below it."""
    tree = ast.parse(SOURCE.read_text())
    (record,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Profile"]
    found = {}
    for field, text in zip(record.body, record.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = str(text.value.value)
    return found


TEXTS = texts()
CHANGING = [
    name
    for name in NAMES
    if name not in ("name", "era")
    and any(len({getattr(profile(kind, era), name) for era in ERAS}) > 1 for kind in KINDS)
]


def test_every_behaviour_has_a_text() -> None:
    assert set(NAMES) - set(TEXTS) == {"name", "era", "paging", "write_track_allocation"}


@pytest.mark.parametrize("name", [name for name in CHANGING if name in TEXTS])
def test_what_changed_cites_the_change(name: str) -> None:
    """A commit, or the kernels before and after it."""
    text = " ".join(TEXTS[name].split())
    assert re.search(r"commit [0-9a-f]{12}", text) or re.search(r"\[[>=]*\d\.\d+", text), text
    assert re.search(r"section \d|\d+\.\d+\)|\d+\.\d+;|B\.\d+|\(\d+\.\d+", text), f"no sheet is named: {text}"


def test_the_write_track_policies_cite_theirs() -> None:
    text = SOURCE.read_text()
    assert "deae4a10f166, Linux 5.16" in text
    assert "a364c014a2c1, Linux 6.9" in text


def test_kinds_and_eras() -> None:
    for kind in KINDS:
        for era in ERAS:
            found = profile(kind, era)
            assert (found.name, found.era) == (kind, era)
    assert DEVELOPMENT_HOST == ("pvm-shadow", "6.18")
    assert profile("amd-npt", "7.2", pml_newest_first=True).pml_newest_first


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("amd",), "amd"), (("amd-npt", "5.4"), "5.4")],
)
def test_what_is_unknown_is_refused(arguments: tuple[str, ...], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        profile(*arguments)
    with pytest.raises(UsageError, match="no_such"):
        profile("amd-npt", no_such=True)


def test_what_changed_between_neighbouring_eras() -> None:
    """kvm-mmu.md, the tags, as counts of behaviours: a new switch has to be put into its era on purpose."""
    changes = [
        {
            name
            for name in NAMES
            if getattr(profile("amd-npt", a), name) != getattr(profile("amd-npt", b), name)
        }
        - {"era"}
        for a, b in pairwise(ERAS)
    ]
    assert changes[1] == {
        "flushes_on_ad_clear", "tdp_spurious_marks", "tdp_recovers_in_place", "pml_newest_first",
        "reset_interruptible",
    }  # fmt: skip
    assert changes[2] >= {
        "smep_in_role",
        "emulates_avx",
        "separate_read_access",
        "has_shadow_pages_statistic",
    }
    assert changes[0] >= {"sync_rebuilds_all", "invlpg_refetches", "retries_always", "tdp_splits_in_place"}
    assert not (changes[0] & changes[1])


@pytest.mark.parametrize(
    ("kind", "changes", "eager"),
    [
        ("amd-shadow", {}, True),
        ("amd-npt", {}, False),
        ("amd-npt", {"write_track_allocation": WriteTrackAllocation.ALWAYS}, True),
        ("amd-npt", {"write_track_allocation": WriteTrackAllocation.ALWAYS, "external_write_tracking": False},
         False),
    ],
)  # fmt: skip
def test_who_has_counts_from_the_start(kind: str, changes: dict[str, object], eager: bool) -> None:
    """kvm-mmu.md 9."""
    assert profile(kind, **changes).write_track_eager is eager


def test_paging_of_the_kinds() -> None:
    assert {kind: profile(kind).paging for kind in KINDS if profile(kind).tdp} == {
        "amd-npt": Paging.NPT,
        "amd-npt-oldmmu": Paging.NPT,
        "intel-ept": Paging.EPT,
        "intel-ept-nopml": Paging.EPT,
        "intel-ept-noad": Paging.EPT,
    }
