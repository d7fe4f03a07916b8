"""Nested paging without the TDP MMU (kvm.tdp_mmu=N): direct shadow pages as the second stage.

Expected values: labs with kvm_amd and kvm.tdp_mmu=0 (6.1 and 6.12 under QEMU, whose host kernel runs with
LA57: the root has level 5), and docs/reference/kvm-mmu.md 7.2, 11.5.
"""

from __future__ import annotations

import pytest

from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES
from pykvm.model.mmu.outcomes import EmulateInstruction
from pykvm.model.mmu.spte import A
from pykvm.model.mmu.tdp_stage import DirectPages
from tests.model.mmu.tdp_rig import DATA, PRESET, USERSPACE, WRITE, TdpRig, faults, moved

ERAS = ["6.1", "6.12"]


def _rig(era: str, **changes: object) -> TdpRig:
    return TdpRig(f"amd-npt-oldmmu {era}", leaf=PRESET, tdp_root_level=5, **changes)


def _kvm(seen: dict[str, int]) -> dict[str, int]:
    """Without the statistic that only later kernels have."""
    return {name: value for name, value in seen.items() if name != "mmu_shadow_pages"}


@pytest.mark.parametrize("era", ERAS)
def test_a_first_store_makes_a_shadow_page_for_each_table(era: str) -> None:
    rig = TdpRig(f"amd-npt-oldmmu {era}", tdp_root_level=5)
    # The root was loaded when the rig entered the guest: five of the six pages are left.
    assert rig.mmu.counters.mmu_cache_miss == 1
    assert _kvm(rig.store(DATA)) == faults(7, pages_4k=7, mmu_cache_miss=5)
    assert rig.pushed() == [2, 0x100, 0x101, 0x102, 1, 0x112, DATA]


@pytest.mark.parametrize("era", ERAS)
def test_what_was_harvested_is_fixed_by_the_fast_path(era: str) -> None:
    rig = TdpRig(f"amd-npt-oldmmu {era}", tdp_root_level=5)
    rig.store(DATA)
    rig.store(DATA + 1)
    rig.harvest()
    assert rig.store(DATA) == faults(6, pf_fast=6)
    assert rig.pushed() == [2, 0x100, 0x101, 0x102, 0x112, DATA]


@pytest.mark.parametrize("era", ERAS)
def test_a_slot_that_goes_zaps_the_pages(era: str) -> None:
    rig = _rig(era)
    rig.mmu.memslots.set_region(5, 0, 0x8000 << 12, 16 << 12, USERSPACE, memoryview(bytearray(16 << 12)))
    rig.put(0x112, 0x20, 0x8000 << 12 | PRESET)
    rig.store(DATA)
    rig.vcpu.enter()
    before = rig.counters()
    rig.vcpu.translate(DATA + 0x20 << 12, WRITE)
    # A slot without logging has its neighbours mapped ahead: eight aligned pages.
    assert _kvm(moved(before, rig.counters())) == faults(1, pages_4k=8, mmu_cache_miss=1)
    before = rig.counters()
    rig.mmu.memslots.set_region(5, 0, 0x8000 << 12, 0, USERSPACE)
    assert _kvm(moved(before, rig.counters())) == {
        "pages_4k": -15,
        "mmu_shadow_zapped": 7,
        "remote_tlb_flush_requests": 1,
    }


@pytest.mark.parametrize("era", ERAS)
def test_nothing_is_split_ahead_of_time(era: str) -> None:
    rig = _rig(era, flags=0, host_level=2)
    assert _kvm(rig.store(0x800)) == faults(2, pages_2m=2, mmu_cache_miss=3)
    assert rig.set_flags(LOG_DIRTY_PAGES) == {"remote_tlb_flush_requests": 1}
    # Both huge pages go with a flush each, and with them the mapping of the code.
    assert _kvm(rig.store(0x800)) == faults(
        7, pages_2m=-2, pages_4k=7, mmu_cache_miss=2, remote_tlb_flush_requests=2
    )


@pytest.mark.parametrize("era", ERAS)
def test_an_access_without_a_slot_leaves_an_mmio_spte(era: str) -> None:
    rig = _rig(era)
    rig.put(0x112, 9, 0x9000 << 12 | PRESET)
    rig.store(DATA)
    seen = []
    for _ in range(2):
        rig.vcpu.enter()
        before = rig.counters()
        with pytest.raises(EmulateInstruction):
            rig.vcpu.translate(DATA + 9 << 12, WRITE)
        seen.append(_kvm(moved(before, rig.counters())))
    assert seen == [
        {"pf_taken": 1, "pf_emulate": 1, "pf_mmio_spte_created": 1, "mmu_cache_miss": 1},
        {},
    ]


def test_the_processor_sets_a_again_after_it_was_cleared() -> None:
    rig = _rig("6.12")
    rig.store(DATA)
    stage = DirectPages(rig.vcpu)
    sp = rig.vcpu.top_page(DATA << 12)
    while sp is not None and sp.level > 1:
        sp = sp.children[DATA >> 9 * (sp.level - 1) & 511]
    assert sp is not None
    sp.spt[DATA & 511] &= ~A
    rig.vcpu.flush_tlb()
    assert rig.load(DATA) == {}
    assert stage.leaf(DATA)[0] & A
