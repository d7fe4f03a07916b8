"""KVM's rules keep every promise in every schedule of the cases; and the cases contain what they should."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from pykvm.model.interleave import CASES, MUTATIONS, Rules
from pykvm.model.interleave.explorer import Actor, Start, explore
from pykvm.model.interleave.state import Vm
from tests.model.interleavings import count_schedules, moves, proof

SMALL = [name for name, case in CASES.items() if not case.large]
LARGE = [name for name, case in CASES.items() if case.large]


@pytest.mark.parametrize("name", SMALL)
def test_no_schedule_breaks_a_promise(name: str) -> None:
    result = proof(name)
    assert result.counterexample is None
    assert result.schedules is not None, "every schedule ends"


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_no_schedule_of_a_large_case_breaks_a_promise(name: str) -> None:
    result = proof(name)
    assert result.counterexample is None
    assert result.schedules is not None


@pytest.mark.parametrize("name", ["ring-full", "shadow-forbid", "shadow-clean"])
def test_as_many_schedules_as_walking_them_one_by_one_gives(name: str) -> None:
    """Forgetting nothing and comparing no states: what is left out as known would be missing here."""
    assert proof(name).schedules == count_schedules(CASES[name].build(Rules()))


# --- what the cases contain: a proof about steps that never happen proves nothing ----------------------


def reached(name: str) -> Iterator[tuple[Any, str, str]]:
    """Shared state, actor and text of every step of a case."""
    starts, actors = CASES[name].build(Rules())
    known = set()
    waiting = [(start.shared, [actor.frame for actor in actors]) for start in starts]
    while waiting:
        shared, frames = waiting.pop()
        for actor, text, after, later, _ in moves(actors, shared, frames):
            key = (after.key(), *(frame.key() for frame in later))
            yield after, actor, text
            if key not in known:
                known.add(key)
                waiting.append((after, later))


EXPECTED = {
    "bitmap": [
        "stores to page 0 through its TLB",
        "walks: SPTE 0 has W=1, caches it",
        "fast page fault: SPTE 0 has changed, tries again",
        "fast page fault: reads SPTE 0, W=1 by now: spurious; enters the guest",
        "fast page fault: reads SPTE 0, not present: takes the slow path",
        "slow page fault: installs SPTE 0 with W=1, releases mmu_lock; enters the guest",
        "takes mmu_lock, exchanges the word with 0: page 0",
        "copies page 0: contents 2",
    ],
    "bitmap-pages": ["takes mmu_lock, exchanges the word with 0: pages 0 and 1"],
    "manual": ["takes mmu_lock, clears pages 0 and 1", "takes mmu_lock, clears page 1"],
    "ring": ["RESET, ring of vCPU 0, entry 1: takes page 0 back, flags = 0"],
    "ring-full": [
        "ring entry 0: publishes it, flags = DIRTY; its ring is full: KVM_EXIT_DIRTY_RING_FULL",
        "runs again: its ring has room",
    ],
    "pml": [
        "kicks all vCPUs: they leave the guest",
        "flushes its PML buffer: marks page 0",
        "clears D in SPTE 0, releases mmu_lock",
        "pauses all vCPUs: KVM_RUN has returned, vCPU 1 flushed page 0 from its PML buffer",
    ],
    "outside": ["marks page 0 in the bitmap", "writes page 0, no vCPU is loaded"],
    "tracking": [
        "page fault: page 0 is tracked, the store is emulated",
        "slow page fault: takes mmu_lock, page 0 is tracked: SPTE 0 stays W=0, the store is emulated",
        "emulator: track_write for page 0; enters the guest",
        "add returns: from now on it is to be told of every store to page 0",
    ],
    "tracking-removed": ["remove: page 0 is tracked no more"],
    "tracking-logging": ["add: finds SPTE 0 protected already, no flush is due, releases mmu_lock"],
    "removal": [
        "slow page fault: the slot is INVALID, RET_PF_RETRY; enters the guest",
        "page fault: no slot has page 0, the store becomes an MMIO exit; enters the guest",
        "frees the slot: bitmap, rmap, and userspace takes the memory back",
    ],
    "tdp-bitmap": ["slow page fault: SPTE 0 has changed, RET_PF_RETRY, releases mmu_lock; enters the guest"],
    "tdp-ring": [
        "slow page fault: takes mmu_lock for reading, SPTE 0 has W=1 by now: spurious; enters the guest"
    ],
    "unsync": [
        "sync: reads unsync without mmu_lock, not set: nothing to do",
        "sync: under mmu_lock nothing is unsync any more",
        "sync: builds the SPTE from the gPTE, version 2",
    ],
    "shadow-remap": ["frame 7 is given to gfn 1", "stores to X through its TLB: gfn 1"],
    "shadow-forbid": ["slow page fault: the gPTE forbids it, the guest gets #PF; enters the guest"],
    "shadow-table": ["slow page fault: gfn 0 is a page table, emulates the store; enters the guest"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_case_contains_the_races_that_it_is_about(name: str) -> None:
    texts = {text for _, _, text in reached(name)}
    assert not [text for text in EXPECTED[name] if text not in texts]


def test_tracked_pages_are_never_mapped_writable_once_the_add_returned() -> None:
    """Stronger than what the explorer checks: not even an SPTE or a TLB entry lets a store through."""
    for name in ("tracking", "tracking-removed", "tracking-logging"):
        for vm, _, _ in reached(name):
            assert isinstance(vm, Vm)
            if vm.promised[0]:
                assert not vm.spte[0].writable
                assert not any(tlb[0] for tlb in vm.tlb)


def test_nothing_maps_a_slot_that_is_gone() -> None:
    for vm, _, _ in reached("removal"):
        if vm.slot.value in ("absent", "freed"):
            assert not vm.spte[0].present
            assert not any(tlb[0] for tlb in vm.tlb)


def test_no_spte_has_w_without_mmu_writable() -> None:
    """'W=1 with MMU=0 is a bug' (kvm-mmu.md 8)."""
    for name in ("bitmap", "ring", "pml", "tracking-removed", "removal"):
        for vm, _, _ in reached(name):
            assert not [spte for spte in vm.spte if spte.writable and not spte.mmu_writable]


def test_a_writable_page_is_marked_or_about_to_be() -> None:
    """The invariant behind logging (bitmap): W=1 and no bit only while a vCPU is between exchange and mark,
    or a collection between the bits and the protection."""
    for vm, _, _ in reached("bitmap"):
        collecting = vm.mmu_lock != ""
        marking = any(since is not None for since in vm.readers)
        if vm.spte[0].writable and not vm.bitmap:
            assert collecting or marking


# --- the mutations' knobs --------------------------------------------------------------------------------


def test_every_knob_is_turned_by_a_mutation() -> None:
    turned = {name for mutation in MUTATIONS.values() for name in mutation.changes}
    assert turned == set(Rules.__dataclass_fields__)


def test_a_start_says_what_it_is() -> None:
    """Schedules name their start, so the words must tell starts apart."""
    for name in CASES:
        starts: Sequence[Start[Any]] = CASES[name].build(Rules())[0]
        assert len({start.words for start in starts}) == len(starts)


def test_actors_have_names_of_their_own() -> None:
    for name in CASES:
        actors: Sequence[Actor[Any, Any]] = CASES[name].build(Rules())[1]
        assert len({actor.name for actor in actors}) == len(actors)


def test_an_exploration_leaves_its_case_as_it_was() -> None:
    starts, actors = CASES["ring-full"].build(Rules())
    assert explore(starts, actors) == explore(starts, actors)
