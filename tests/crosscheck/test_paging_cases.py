"""The page-table product: its numbering, and real KVM against the reference machine's page walk."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest

from pykvm.cli.walks import explain
from pykvm.crosscheck.paging_cases import TOTAL, Features, Kind, PagingCase, Runnable
from pykvm.crosscheck.paging_guest import PagingOutcome
from pykvm.crosscheck.paging_known import known
from pykvm.crosscheck.paging_run import (
    PagingDifference,
    Subject,
    compare,
    outcomes,
    replay,
    run_case,
    run_paging,
)
from pykvm.errors import UsageError
from pykvm.kvm import KvmSystem
from pykvm.model import paging
from pykvm.model.system import ModelSystem
from tests.crosscheck.walked import check, expected
from tests.paged import with_everything

EVERYTHING = Features(46, True, True, True, True, True, True)
PLAIN = Features(48, True, False, False, False, False, False, legacy=False)
UPPERS = 8 * 2 * 2 + 3 + 2 + 1
"""Rights, A and the others' A; reserved bits; absent entries; ignored bits."""
LEAVES = 8 * 4 + 4 + 2 + 2
PATHS = {
    4: (UPPERS - 16) + (2 * UPPERS - 4) + (3 * UPPERS - 4),
    5: (2 * UPPERS - 4) + (3 * UPPERS - 4) + (4 * UPPERS - 6),
    "legacy": (8 * 2 + 3 + 2) + 1 + (4 * 2 + 1) + 1,
}
"""By levels, for each page size: a path of two entries has no others; one whose upper entries are all alike
is the same wherever the special one is; PAE and 32-bit paging have one upper entry or none."""
SEED = 20


# --- numbers -------------------------------------------------------------------------------------------


def test_a_processor_with_everything_can_run_all_cases() -> None:
    """12 kinds; WP, NXE, SMEP, SMAP and AC (3), PKE and rights (5)."""
    assert 12 * (2 * 2 * 2 * 3 * 5) * LEAVES * sum(PATHS.values()) == TOTAL
    runnable = Runnable(EVERYTHING)
    assert len(runnable) == TOTAL
    assert [runnable[number] for number in (0, 1, TOTAL - 1)] == [0, 1, TOTAL - 1]


def test_features_leave_dimensions_out() -> None:
    assert len(Runnable(PLAIN)) == 12 * 4 * LEAVES * PATHS[4]
    assert len(Runnable(PLAIN._replace(nx=False))) == 12 * 2 * LEAVES * PATHS[4]
    assert len(Runnable(PLAIN._replace(legacy=True))) == 12 * 4 * LEAVES * (PATHS[4] + PATHS["legacy"])
    assert len(Runnable(PLAIN._replace(smap=True))) == 12 * 4 * 3 * LEAVES * PATHS[4]
    wide = Runnable(PLAIN._replace(physical_bits=52))  # no reserved bits: 4 leaves and 3 uppers fewer
    assert len(wide) == 12 * 4 * (LEAVES - 4) * (PATHS[4] - 3 * 6)
    assert PLAIN.left_out == (
        "32-bit and PAE paging",
        "5-level paging",
        "CR4.SMEP = 1",
        "CR4.SMAP = 1",
        "CR4.PKE = 1",
        "1 GiB pages that work (PS of a PDPTE is a reserved bit here)",
    )
    assert EVERYTHING.left_out == ()


def test_the_numbers_that_can_run_are_exactly_those_that_can() -> None:
    chosen = random.Random(SEED).sample(range(TOTAL), 20_000)
    for features in (
        PLAIN,
        EVERYTHING._replace(la57=False),
        EVERYTHING._replace(physical_bits=52, pku=False),
    ):
        runnable = Runnable(features)
        found = sum(PagingCase.from_index(index).can_run(features) for index in chosen)
        assert found / len(chosen) == pytest.approx(len(runnable) / TOTAL, abs=0.02)
        numbers = random.Random(SEED).sample(range(len(runnable)), 2000)
        assert all(PagingCase.from_index(runnable[number]).can_run(features) for number in numbers)
        assert len({runnable[number] for number in numbers}) == 2000


def test_different_numbers_are_different_cases() -> None:
    """Different table contents, in a part of the product that no other test samples as densely."""
    runnable = Runnable(PLAIN._replace(nx=False))
    cases = [PagingCase.from_index(runnable[number]) for number in range(0, len(runnable), 7)]
    distinct = {(case.kind, case.cpl, case.control, case.shape[:2], case.entries(0, 0, 48)) for case in cases}
    assert len(distinct) == len(cases)


def test_random_numbers_follow_from_the_seed() -> None:
    first, again, other = (list(islice(Runnable(PLAIN).shuffled(seed), 1000)) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) > 990
    assert all(PagingCase.from_index(index).can_run(PLAIN) for index in first)


def test_a_number_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="does not exist"):
        PagingCase.from_index(TOTAL)
    with pytest.raises(IndexError):
        Runnable(PLAIN)[len(Runnable(PLAIN))]


def test_entries_lie_where_the_linear_address_leads() -> None:
    """0x8080203120 is entry 1 of the PML4, 2 of the PDPT, 1 of the page directory and 3 of the page table."""
    case = PagingCase.from_index(0)
    assert case.linear == 0x80_8020_3120
    rights, key = 7, 5 << 59
    assert case.entries(0x400000, 0x203000, 46) == (
        (0x400000 + 8, 0x401000 | rights),
        (0x401000 + 16, 0x402000 | rights),
        (0x402000 + 8, 0x403000 | rights),
        (0x403000 + 24, 0x203000 | rights | key),
    )


# --- real KVM against the page walk --------------------------------------------------------------------


def test_kvm_translates_as_the_page_walk_does(system: KvmSystem) -> None:
    """Cases from all over the product; every kind of access succeeds in some and faults in others."""
    runnable = Runnable(Subject.of(system).features)
    seen = check(system, islice(runnable.shuffled(SEED), 6000))
    assert set(seen) == {(kind, cpl, end) for kind in Kind for cpl in (0, 3) for end in ("done", "#PF")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kvm_translates_as_the_page_walk_does_in_every_case(system: KvmSystem) -> None:
    """The whole product as far as the host goes, at most a million cases spread over it: 391,680 and two to
    five minutes with 4-level paging and NX alone.
    """
    runnable = Runnable(Subject.of(system).features)
    step = -(-len(runnable) // 1_000_000)
    seen = check(system, (runnable[number] for number in range(0, len(runnable), step)))
    assert sum(seen.values()) == -(-len(runnable) // step)


def test_a_case_alone_does_what_it_does_among_others(system: KvmSystem) -> None:
    subject = Subject.of(system)
    runnable = Runnable(subject.features)
    indices = [runnable[number] for number in range(0, len(runnable), len(runnable) // 40)]
    together = list(outcomes(system, subject.cpuid, map(PagingCase.from_index, indices)))
    assert [run_case(system, index) for index in indices] == together


# --- the model's CPU and machine against the page walk ---------------------------------------------------


def test_the_model_makes_the_walks_that_each_access_needs() -> None:
    """With every feature: which walks an instruction makes, in which mode, with which rights and flags."""
    with ModelSystem() as model:
        cpuid = with_everything(Subject.of(model).cpuid)
        features = Features.of(cpuid)
        assert features.left_out == ()
        assert Subject.of(model).features.legacy
        cases = [PagingCase.from_index(index) for index in islice(Runnable(features).shuffled(SEED), 2000)]
        assert {case.shape.levels for case in cases} == {2, 3, 4, 5}
        for case, seen in zip(cases, outcomes(model, cpuid, cases), strict=True):
            words = compare(case, ("walk", expected(case, cpuid)), ("model", seen))
            assert not words, str(PagingDifference(case, words, "", explain(case, cpuid)))


# --- the model against real KVM ------------------------------------------------------------------------


def some_indices(system: KvmSystem, count: int, seed: int = SEED) -> list[int]:
    with ModelSystem() as model:
        runnable = Runnable(Subject.of(system, model).features)
    return list(islice(runnable.shuffled(seed), count))


def test_the_model_and_kvm_agree(system: KvmSystem) -> None:
    indices = some_indices(system, 2000)
    progress: list[int] = []
    with ModelSystem() as model:
        result = run_paging(model, system, indices, progress=progress.append, explain=explain)
    assert result.disagreements == ()
    assert result.cases == progress[-1] == 2000


def test_a_model_that_ignores_write_protection_is_found_out(
    system: KvmSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison names the machines, what each did, and what should happen."""
    right = paging._violation

    def wrong(control: paging.Control, kind: int, rights: int, disabled: int) -> paging.Rule | None:
        rule = right(control, kind, rights, disabled)
        return None if rule is paging.Rule.READ_ONLY else rule

    monkeypatch.setattr(paging, "_violation", wrong)
    with ModelSystem() as model:
        result = run_paging(model, system, some_indices(system, 300))
    assert result.disagreements
    for found in result.disagreements:
        assert found.case.kind in {Kind.WRITE, Kind.EXCHANGE, Kind.MARK_SEGMENT}
        assert any("model: done; kvm: #PF" in line for line in found.words)
    monkeypatch.undo()
    with ModelSystem() as model:
        again = run_paging(model, system, [found.case.index for found in result.disagreements])
    assert again.disagreements == ()


def test_a_replayed_case_tells_everything(system: KvmSystem) -> None:
    with ModelSystem() as model:
        text = replay([model, system], 1 + 12 * 120 * 16, explain)
    assert text.splitlines()[:3] == [
        "case 23041: read at CPL 0, 4 levels, 4 KiB page, CR0.WP=1, EFER.NXE=0, CR4.SMEP=0, CR4.SMAP=0, "
        "CR4.PKE=0; leaf P+US; PML4E P+RW+US; A=0 in the other entries",
        "model: done, the target holds 0x4030201feeb10e6, the register holds 0xfeeb10e6, "
        "A of the PML4E changed, A of the PDPTE changed, A of the PDE changed, A of the PTE changed",
        "kvm: done, the target holds 0x4030201feeb10e6, the register holds 0xfeeb10e6, "
        "A of the PML4E changed, A of the PDPTE changed, A of the PDE changed, A of the PTE changed",
    ]
    assert text.splitlines()[3].startswith("supervisor read of 0x8080203120, 4-level paging")


def test_a_case_that_the_host_cannot_run_is_refused(system: KvmSystem) -> None:
    features = Subject.of(system).features
    if not features.left_out:
        pytest.skip("this host can run every case")
    index = next(
        index for index in range(0, TOTAL, 1013) if not PagingCase.from_index(index).can_run(features)
    )
    with pytest.raises(UsageError, match="which a machine here lacks"):
        run_case(system, index)


# --- comparison ----------------------------------------------------------------------------------------


def test_differences_are_told_in_words() -> None:
    case = PagingCase.from_index(0)
    done = PagingOutcome("done", None, None, "", (32, 32, 32, 32), 1, 2)
    fault = PagingOutcome("#PF", 7, 0x8080203120, "access", (32, 0, 32, 96), 3, 2)
    assert compare(case, ("model", done), ("kvm", done)) == ()
    assert compare(case, ("model", done), ("kvm", fault)) == (
        "model: done; kvm: #PF at the access with error code 0x7 (P WR US), CR2 0x8080203120",
        "model: the target holds 0x1; kvm: the target holds 0x3",
        "model: A of the PDPTE changed; kvm: nothing of the PDPTE changed",
        "model: A of the PTE changed; kvm: A, D of the PTE changed",
    )


def test_entries_of_the_older_modes_are_as_wide_and_as_many_as_there() -> None:
    """0x80203120: entry 2 of PAE's pointers, 1 and 3; entries 0x200 and 0x203 of 32-bit paging."""
    found = {}
    for index in range(TOTAL - TOTAL // 600 * 40, TOTAL, 12 * 120 * LEAVES):
        case = PagingCase.from_index(index)
        found[case.shape[:2]] = tuple(at for at, _ in case.entries(0x400000, 0, 46))
    assert found[3, 12] == (0x400010, 0x401008, 0x402018)
    assert found[3, 21] == (0x400010, 0x401008)
    assert found[2, 12] == (0x400800, 0x40180C)
    assert found[2, 22] == (0x400800,)


FAULT = PagingOutcome("#PF", 3, 0x8080203120, "access", (0, 0, 0, 0), 1, 2)


def test_only_accessed_flags_of_an_access_that_faults_are_excused() -> None:
    case = PagingCase.from_index(2)
    accessed = replace(FAULT, flags=(32, 0, 0, 32))
    assert known(case, FAULT, accessed)
    assert known(case, accessed, FAULT)
    assert not known(case, FAULT, replace(FAULT, flags=(32, 0, 0, 96)))
    assert not known(case, FAULT, replace(accessed, error=2))
    assert not known(case, FAULT, replace(accessed, target=2))
    done = replace(FAULT, end="done", error=None, cr2=None, at="")
    assert not known(case, done, replace(done, flags=(32, 0, 0, 0)))


def test_no_walk_uses_what_lies_behind_an_entry_that_is_not_present() -> None:
    step = 12 * 120 * LEAVES
    paths = (PagingCase.from_index(number * step) for number in range(PATHS[4]))
    case = next(each for each in paths if each.shape.upper == 1 and not each.upper.flags & 1)
    fault = replace(FAULT, error=0)
    assert known(case, fault, replace(fault, flags=(32, 0, 0, 0)))
    assert not known(case, fault, replace(fault, flags=(0, 32, 0, 0)))
    assert not known(case, fault, replace(fault, flags=(0, 0, 32, 0)))


def test_an_implicit_access_that_shadow_paging_repeats_is_kvms() -> None:
    """Only where SMAP alone forbids the read of the descriptor and RFLAGS.AC is set."""
    stuck = PagingOutcome("Kicked()", None, None, "", (0, 0, 0, 0), 1, 2)
    forbidden = replace(FAULT, error=1)
    assert known(SMAP, forbidden, stuck).startswith("KVM with shadow page tables repeats")
    assert not known(SMAP, replace(FAULT, error=0), stuck)
    assert not known(SMAP, DONE, stuck)
    assert not known(SMAP_WITHOUT_AC, forbidden, stuck)
    assert not known(WRITE, forbidden, stuck)


def test_a_fetch_that_is_named_without_pae_is_kvms() -> None:
    def fetch(levels: int, nxe: bool) -> PagingCase:
        return first(
            lambda case: case.kind is Kind.FETCH and case.shape.levels == levels and case.control.nxe == nxe
        )

    named = replace(FAULT, error=0x11)
    fault = replace(FAULT, error=1)
    assert known(fetch(2, nxe=True), fault, named).startswith("KVM's walk reports I/D")
    assert not known(fetch(2, nxe=True), named, fault)
    assert not known(fetch(2, nxe=True), fault, replace(named, error=0x15))
    assert not known(fetch(2, nxe=False), fault, named)
    assert not known(fetch(4, nxe=True), fault, named)


@pytest.fixture
def tcg(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lab whose processor is QEMU's TCG."""
    monkeypatch.setenv("PYKVM_LAB_EMULATOR", "qemu-tcg")


def first(chosen: Callable[[PagingCase], bool]) -> PagingCase:
    """Some case like that."""
    return next(
        case for case in map(PagingCase.from_index, Runnable(EVERYTHING).shuffled(SEED)) if chosen(case)
    )


WRITE = first(lambda case: case.kind is Kind.WRITE)
EXCHANGE = first(lambda case: case.kind is Kind.EXCHANGE)
PAE = first(lambda case: case.shape.levels == 3)
MARK = first(lambda case: case.kind is Kind.MARK_SEGMENT)
BIT_8 = first(lambda case: case.upper.reserved == "8")
SMAP = first(
    lambda case: (
        case.kind is Kind.LOAD_SEGMENT and case.cpl == 0 and bool(case.control.smap and case.control.ac)
    )
)
SMAP_WITHOUT_AC = first(
    lambda case: case.kind is Kind.LOAD_SEGMENT and case.cpl == 0 and case.control[3:5] == (True, False)
)
DONE = replace(FAULT, end="done", error=None, cr2=None, at="")
TCG_BUGS: dict[str, tuple[PagingCase, PagingOutcome, PagingOutcome, str]] = {
    "P of a reserved bit": (WRITE, replace(FAULT, error=0xB), replace(FAULT, error=0xA), "leaves P out"),
    "read of an exchange": (EXCHANGE, replace(FAULT, error=7), replace(FAULT, error=5), "a read and then"),
    "A of a PDPTE": (PAE, replace(DONE, flags=(0, 96)), replace(DONE, flags=(32, 96)), "sets A in PAE's"),
    "bit 8": (BIT_8, replace(FAULT, error=0xB), DONE, "takes bit 8"),
    "AC and SMAP": (SMAP, replace(FAULT, error=1), DONE, "suspend SMAP"),
}
NO_BUGS: dict[str, tuple[PagingCase, PagingOutcome, PagingOutcome]] = {
    "and other contents": (WRITE, replace(FAULT, error=0xB), replace(FAULT, error=0xA, target=2)),
    "P of a page that is there": (WRITE, replace(FAULT, error=3), replace(FAULT, error=2)),
    "P too many": (WRITE, replace(FAULT, error=0xA), replace(FAULT, error=0xB)),
    "read of a write": (WRITE, replace(FAULT, error=7), replace(FAULT, error=5)),
    "another error": (EXCHANGE, replace(FAULT, error=7), replace(FAULT, error=4)),
    "D of a PDPTE": (PAE, replace(DONE, flags=(0, 96)), replace(DONE, flags=(64, 96))),
    "A of a PDE": (PAE, replace(DONE, flags=(0, 0)), replace(DONE, flags=(0, 32))),
    "another reserved bit": (WRITE, replace(FAULT, error=0xB), DONE),
    "a write under SMAP": (SMAP, replace(FAULT, error=3), DONE),
    "SMAP without AC": (SMAP_WITHOUT_AC, replace(FAULT, error=1), DONE),
}


@pytest.mark.usefixtures("tcg")
@pytest.mark.parametrize("name", TCG_BUGS)
def test_tcgs_bugs_are_named_as_the_emulators(name: str) -> None:
    case, model, other, words = TCG_BUGS[name]
    reason = known(case, model, other)
    assert reason.startswith("emulator: QEMU's TCG ")
    assert words in reason


@pytest.mark.parametrize("name", TCG_BUGS)
@pytest.mark.parametrize("emulator", ["", "qemu-kvm", "bochs"])
def test_tcgs_bugs_excuse_nobody_else(name: str, emulator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKVM_LAB_EMULATOR", emulator)
    case, model, other, _ = TCG_BUGS[name]
    assert not known(case, model, other)


@pytest.mark.usefixtures("tcg")
@pytest.mark.parametrize("name", NO_BUGS)
def test_other_differences_are_no_bug_of_tcg(name: str) -> None:
    assert not known(*NO_BUGS[name])


@pytest.mark.usefixtures("tcg")
def test_two_bugs_at_once_are_both_named() -> None:
    model, other = replace(FAULT, error=0xF), replace(FAULT, error=0xC, flags=(32, 0, 0, 0))
    case = first(lambda case: case.kind is Kind.EXCHANGE and case.shape.depth == 4)
    reason = known(case, model, other)
    assert reason.count("emulator: ") == 2
    assert "SDM vol. 3, 4.8" in reason


def test_a_descriptor_may_be_marked_by_a_write_of_any_of_its_bytes() -> None:
    model = replace(FAULT, cr2=MARK.linear)
    assert "descriptor" in known(MARK, model, replace(model, cr2=MARK.linear + 4))
    assert not known(MARK, model, replace(model, cr2=MARK.linear + 8))
    assert not known(WRITE, model, replace(model, cr2=MARK.linear + 4))
    read = replace(model, error=1)
    assert not known(MARK, read, replace(read, cr2=MARK.linear + 4))
