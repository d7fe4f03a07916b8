"""Each broken rule is found, with a shortest schedule that can be played again; the harmless ones are not.

What each one must break is told by the rule that it breaks, not by what the explorer says.
"""

from __future__ import annotations

import re

import pytest

from pykvm.model.interleave import CASES, MUTATIONS, Repair, Rules
from tests.model.interleavings import breaks_within, explored, replay

LOST = "a lost write"
UNTRACKED = "page 0 is tracked, and the tracker is not told of the store"
FREED = r"is used after it was freed"
STALE = "the guest still reaches the old page"

BREAKS = {
    "get-without-flush": LOST,
    "get-flush-before-protect": LOST,
    "get-without-protect": LOST,
    "get-copy-before-protect": LOST,
    "get-without-exclusion": LOST,
    "pause-without-waiting": LOST,
    "manual-copy-before-clear": LOST,
    "manual-clear-unread": LOST,
    "fast-mark-before-cmpxchg": LOST,
    "fast-without-compare": UNTRACKED,
    "fast-without-compare-removal": f"the memory of the slot {FREED}",
    "fast-ignores-mmu-writable": UNTRACKED,
    "slow-without-recheck": UNTRACKED,
    "track-without-flush": UNTRACKED,
    "track-flush-after-return": UNTRACKED,
    "track-flush-by-w": UNTRACKED,
    "track-keeps-mmu-writable": UNTRACKED,
    "ring-copy-before-reset": LOST,
    "ring-without-protect": LOST,
    "ring-without-flush": LOST,
    "ring-protect-without-lock": LOST,
    "harvest-without-acquire": LOST,
    "push-flag-before-payload": LOST,
    "ring-without-full-check": LOST,
    "remove-without-wait": f"the dirty bitmap of the slot {FREED}",
    "remove-without-first-wait": f"the memory of the slot {FREED}",
    "remove-without-second-wait": f"the dirty bitmap of the slot {FREED}",
    "remove-without-flush": f"the memory of the slot {FREED}",
    "pml-without-kick": LOST,
    "pml-kick-without-pause": LOST,
    "outside-mark-dropped": LOST,
    "outside-ring": LOST,
    "unsync-after-writable": STALE,
    "sync-without-flush": STALE,
    "sync-copy-before-protect": STALE,
    "sync-clear-before-copy": STALE,
    "shadow-compare": LOST,
    "shadow-look-again": LOST,
    "shadow-pin-alias": LOST,
    "shadow-without-compare": "the guest took this translation back and flushed",
    "shadow-keeps-mmu-writable": "gfn 0 is a shadowed page table",
    "shadow-ignores-dirty": "the guest itself loses the write",
}

HARMLESS = {
    "get-flush-after-return",
    "fast-without-compare-logging",
    "tdp-without-compare",
    "fault-without-first-look",
    "track-protect-before-count",
    "harvest-release-before-payload",
    "pml-pause-without-kick",
    "shadow-pin",
    "shadow-tag",
    "shadow-tag-alias",
}


def test_all_mutations_are_judged_here() -> None:
    assert BREAKS.keys() | HARMLESS == MUTATIONS.keys()
    assert {name for name, mutation in MUTATIONS.items() if mutation.harmless} == HARMLESS


@pytest.mark.parametrize("name", BREAKS)
def test_the_broken_rule_is_found(name: str) -> None:
    mutation = MUTATIONS[name]
    found = explored(name).counterexample
    assert found is not None
    assert re.search(BREAKS[name], found.broken)
    assert replay(CASES[mutation.case].build(mutation.rules), found) == found.broken


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_what_is_harmless_loses_nothing(name: str) -> None:
    result = explored(name)
    assert result.counterexample is None
    assert result.schedules is not None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_changes_something_and_says_so(name: str) -> None:
    mutation = MUTATIONS[name]
    assert mutation.rules != Rules()
    assert not CASES[mutation.case].large
    for text in (mutation.change, mutation.outcome, mutation.rule):
        assert text.endswith(".")
    if not name.startswith("shadow-"):
        assert "kvm-mmu.md" in mutation.rule or mutation.harmless


# Counted by hand from the rules: the fewest steps that can lose something.
SHORTEST = {
    # walk; count, protect, return; store
    "track-without-flush": 5,
    # walk; exchange, protect, copy; store; pause, exchange, compare
    "get-without-flush": 8,
    # walk (sets D, logs), store; exchange, idle, exchange, compare
    "pml-without-kick": 6,
    # write, drop; exchange, pause, exchange, compare
    "outside-mark-dropped": 6,
    # exit, mmu_lock, W=1; the other one: walk, write, flush, check, use
    "unsync-after-writable": 8,
    # exit, read, exchange; the other one: walk, store
    "shadow-ignores-dirty": 5,
    # walk; INVALID, wait, zap, without, wait, free; store
    "remove-without-flush": 8,
    # walk; exchange, protect (logging); count, protect, return (tracking); store
    "track-flush-by-w": 7,
}


@pytest.mark.parametrize("name", SHORTEST)
def test_the_schedule_is_a_shortest_one(name: str) -> None:
    mutation = MUTATIONS[name]
    found = explored(name).counterexample
    assert found is not None
    assert len(found.lines) == SHORTEST[name]
    assert not breaks_within(CASES[mutation.case].build(mutation.rules), SHORTEST[name] - 1)


def places(name: str, *texts: str) -> list[int]:
    """Where in a mutation's schedule the steps stand that contain these texts."""
    found = explored(name).counterexample
    assert found is not None
    lines = [f"{line.actor} {line.text}" for line in found.lines]
    return [next(number for number, line in enumerate(lines) if text in line) for text in texts]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        # A collection takes the mark before W=1 is set.
        (
            "fast-mark-before-cmpxchg",
            ("marks page 0", "exchanges the word with 0: page 0", "sets W=1", "stores"),
        ),
        # The add is complete but for its flush, which comes before the return in vain.
        (
            "track-keeps-mmu-writable",
            ("reads SPTE 0", "finds SPTE 0 protected already", "sets W=1", "stores"),
        ),
        # The late flush of logging, and the add that relies on W.
        ("track-flush-by-w", ("GET clears W", "no flush is due", "add returns", "stores")),
        # The entry is used for its last payload.
        ("harvest-without-acquire", ("ahead of the flags", "writes slot and offset", "DIRTY", "uses page 0")),
        # The full ring is written over before it is harvested.
        ("ring-without-full-check", ("page 0", "writes slot and offset, page 1", "reads page 1", "compares")),
        ("remove-without-first-wait", ("page fault", "publishes the slot as INVALID", "zaps", "installs")),
        ("remove-without-second-wait", ("INVALID", "reads SPTE 0", "zaps", "frees", "marks page 0")),
        ("pml-kick-without-pause", ("logs page 0 to its PML buffer", "stores", "exchanges", "compares")),
        # The page frame moves to the other gfn between the read and the exchange.
        ("shadow-compare", ("of gfn 0", "frame 7 is given to gfn 1", "compare-and-exchange", "marks gfn 0")),
        # Between two looks that say gfn 0 it was gfn 1.
        ("shadow-look-again", ("sets W=1", "marks gfn 0", "stores to X", "looks again, marks gfn 0")),
    ],
)
def test_the_schedule_tells_the_story(name: str, texts: tuple[str, ...]) -> None:
    order = places(name, *texts)
    assert order == sorted(order)


# --- the same question asked of all ways at once --------------------------------------------------


def test_a_late_flush_is_fine_for_logging_and_not_for_tracking() -> None:
    assert explored("get-flush-after-return").counterexample is None
    found = explored("track-flush-after-return").counterexample
    assert found is not None
    assert found.lines[-2].text.startswith("add returns")


def test_a_flush_after_the_contents_were_read_is_too_late_for_logging() -> None:
    rules = Rules(get_order=("kick", "xchg", "protect", "return", "read", "flush"))
    assert CASES["bitmap"].explore(rules).counterexample is not None


@pytest.mark.parametrize(
    ("repair", "remap", "alias"),
    [
        (Repair.SLOW, True, True),
        (Repair.COMPARE, False, False),
        (Repair.LOOK_AGAIN, False, True),
        (Repair.PIN, True, False),
        (Repair.TAG, True, True),
    ],
)
def test_the_ways_to_know_the_gfn_of_a_shadow_spte(repair: Repair, remap: bool, alias: bool) -> None:
    rules = Rules(shadow_repair=repair)
    assert (CASES["shadow-remap"].explore(rules).counterexample is None) == remap
    assert (CASES["shadow-alias"].explore(rules).counterexample is None) == alias


@pytest.mark.parametrize("repair", Repair)
@pytest.mark.parametrize("case", ["shadow-forbid", "shadow-table", "shadow-clean"])
def test_the_rest_is_settled_by_the_exchange(case: str, repair: Repair) -> None:
    assert CASES[case].explore(Rules(shadow_repair=repair)).counterexample is None
