"""Fast page fault: when it fixes an SPTE, and what it leaves alone (docs/reference/kvm-mmu.md 11.2)."""

from __future__ import annotations

import pytest

from pykvm.model.mmu.direct_fault import FETCH, PRESENT, RSVD, USER, WRITE
from pykvm.model.mmu.fast_page_fault import fast_page_fault
from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES
from pykvm.model.mmu.outcomes import RetPf
from pykvm.model.mmu.spte import ACCESS_TRACKED, HOST_WRITABLE, MMU_WRITABLE, NX, A, D, P, W
from tests.model.mmu.tdp_rig import DATA, PRESET, READ, TdpRig, faults, moved

PROTECTED = PRESENT | WRITE
"""The error code of a write to a present translation."""


def _rig(name: str = "amd-npt 6.12", *, clear: int = 0, add: int = 0, log: bool = True) -> TdpRig:
    """A page that is mapped writable, with bits of its SPTE changed."""
    rig = TdpRig(name, leaf=PRESET, flags=LOG_DIRTY_PAGES if log else 0)
    rig.store(DATA)
    rig.pushed()
    assert rig.mmu.tdp is not None
    small = rig.mmu.tdp.root().small
    small[DATA] = small[DATA] & ~clear | add
    return rig


def _outcome(rig: TdpRig, error: int, gfn: int = DATA) -> tuple[RetPf, int, list[int]]:
    """The result, how far pf_fast moved, and what was pushed."""
    before = rig.vcpu.counters.pf_fast
    result = fast_page_fault(rig.vcpu, gfn << 12, error)
    return result, rig.vcpu.counters.pf_fast - before, rig.pushed()


def test_a_write_to_a_page_protected_for_logging_is_fixed_and_marked() -> None:
    rig = _rig(clear=W | D)
    assert _outcome(rig, PROTECTED) == (RetPf.FIXED, 1, [DATA])
    spte, _ = rig.spte(DATA)
    assert spte & W
    assert not spte & D  # the processor sets D when it repeats the store


def test_without_logging_it_is_fixed_and_not_marked() -> None:
    assert _outcome(_rig(clear=W, log=False), PROTECTED) == (RetPf.FIXED, 1, [])


def test_what_is_allowed_already_is_spurious() -> None:
    rig = _rig()
    assert _outcome(rig, PROTECTED) == (RetPf.SPURIOUS, 1, [])


@pytest.mark.parametrize(
    ("clear", "error", "why"),
    [
        (W, PROTECTED | RSVD, "a reserved bit means MMIO"),
        (W, WRITE, "a fault on an absent translation needs the slow path where A bits exist"),
        (W, PRESENT, "a read of a present translation"),
        (W | MMU_WRITABLE, PROTECTED, "the gfn is tracked"),
        (W | MMU_WRITABLE | HOST_WRITABLE, PROTECTED, "the host's page is read-only"),
    ],
)
def test_what_the_slow_path_has_to_decide(clear: int, error: int, why: str) -> None:
    rig = _rig(clear=clear)
    before = rig.spte(DATA)
    assert _outcome(rig, error) == (RetPf.INVALID, 0, []), why
    assert rig.spte(DATA) == before


def test_an_absent_spte_is_not_for_the_fast_path() -> None:
    assert _outcome(_rig(), PROTECTED, DATA + 1) == (RetPf.INVALID, 0, [])


def test_a_fetch_that_nx_denies_stays_denied() -> None:
    rig = _rig("intel-ept-noad 6.12", add=NX)
    assert _outcome(rig, FETCH) == (RetPf.INVALID, 0, [])


# --- huge SPTEs ----------------------------------------------------------------------------------------


def test_a_huge_page_of_a_logging_slot_is_split_by_the_slow_path() -> None:
    rig = TdpRig("amd-npt 6.12", flags=0, leaf=PRESET, host_level=2, eager_page_split=False)
    rig.store(DATA)
    rig.set_flags(LOG_DIRTY_PAGES)
    assert rig.spte(DATA)[1] == 2
    assert _outcome(rig, PROTECTED) == (RetPf.INVALID, 0, [])


def test_a_huge_page_whose_log_ended_is_made_writable_as_a_whole() -> None:
    rig = TdpRig("amd-npt 6.12", flags=0, leaf=PRESET, host_level=2, eager_page_split=False)
    rig.store(DATA)
    rig.set_flags(LOG_DIRTY_PAGES)
    rig.set_flags(0)
    assert _outcome(rig, PROTECTED) == (RetPf.FIXED, 1, [])
    assert rig.store(DATA + 1) == faults(1, pf_fast=1)  # only the walk's huge page was left
    spte, level = rig.spte(DATA)
    assert (bool(spte & W), level) == (True, 2)


# --- access tracking: EPT without A/D ------------------------------------------------------------------


def test_aging_takes_all_rights_and_the_next_access_restores_them() -> None:
    rig = _rig("intel-ept-noad 6.12")
    assert rig.mmu.tdp is not None
    assert rig.mmu.tdp.age(rig.slot, DATA, DATA)
    spte, _ = rig.spte(DATA)
    assert spte & (P | W | ACCESS_TRACKED) == ACCESS_TRACKED
    assert not rig.mmu.tdp.age(rig.slot, DATA, DATA)  # not accessed since
    rig.vcpu.flush_tlb()
    assert rig.load(DATA) == faults(1, pf_fast=1)
    spte, _ = rig.spte(DATA)
    assert spte & (P | W | ACCESS_TRACKED) == P
    # W is not restored by a read: the next write is one more fault, and is reported.
    assert rig.pushed() == []
    assert rig.store(DATA) == faults(1, pf_fast=1)
    assert rig.pushed() == [DATA]


def test_a_write_restores_everything_at_once() -> None:
    rig = _rig("intel-ept-noad 6.12")
    assert rig.mmu.tdp is not None
    rig.mmu.tdp.age(rig.slot, DATA, DATA)
    assert _outcome(rig, WRITE) == (RetPf.FIXED, 1, [DATA])
    assert rig.spte(DATA)[0] & (P | W | ACCESS_TRACKED) == P | W


def test_aging_with_a_bits_costs_no_fault() -> None:
    rig = _rig("amd-npt 6.12")
    assert rig.mmu.tdp is not None
    assert rig.mmu.tdp.age(rig.slot, DATA, DATA)
    assert not rig.mmu.tdp.age(rig.slot, DATA, DATA)
    before = rig.counters()
    rig.vcpu.flush_tlb()
    rig.vcpu.translate(DATA << 12, READ)
    assert moved(before, rig.counters()) == {}
    assert rig.spte(DATA)[0] & A
    assert rig.mmu.tdp.age(rig.slot, DATA, DATA)


# --- where it comes into play --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["amd-npt", "intel-ept-nopml", "intel-ept-noad"])
def test_each_page_costs_one_fast_fault_a_harvest(kind: str) -> None:
    rig = TdpRig(f"{kind} 6.12", leaf=PRESET)
    rig.store(DATA)
    for _ in range(3):
        rig.harvest()
        rig.load(DATA)  # the tables
        rig.pushed()
        assert rig.store(DATA) == faults(1, pf_fast=1)
        assert rig.pushed() == [DATA]


def test_pml_has_no_use_for_it() -> None:
    rig = TdpRig("intel-ept 6.12", leaf=PRESET)
    for _ in range(3):
        rig.store(DATA)
        rig.harvest()
    assert rig.vcpu.counters.pf_fast == 0


@pytest.mark.parametrize("error", [PROTECTED, PROTECTED | USER])
def test_the_user_bit_does_not_matter(error: int) -> None:
    assert _outcome(_rig(clear=W), error)[0] is RetPf.FIXED
