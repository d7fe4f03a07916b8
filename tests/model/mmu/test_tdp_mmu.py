"""The TDP MMU: huge pages and what logging does to them, tracking, MMIO, zapping.

Expected values: docs/reference/kvm-mmu.md 11 and 7.2, docs/reference/hosts.md B.11 (8) and F, and the same
steps in labs (AMD NPT with 6.1, 6.12 and 7.2, Intel EPT with 6.12 and 7.2).
"""

from __future__ import annotations

import numpy as np
import pytest

from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES
from pykvm.model.mmu.outcomes import EmulateInstruction
from pykvm.model.mmu.spte import HOST_WRITABLE, MMU_WRITABLE, NX, A, D, P, W
from tests.model.mmu.tdp_rig import DATA, FETCH, PRESET, READ, USERSPACE, WRITE, TdpRig, faults, moved

HUGE = (0x800, 0xA00, 0xC00, 0xE00)
"""One page in each of four ranges of 2 MiB; the tables and the code lie in a fifth."""


def _huge(name: str, *, manual: int = 0, ring: bool = False, **changes: object) -> TdpRig:
    """Five huge pages, in a slot that does not log yet."""
    rig = TdpRig(name, flags=0, leaf=PRESET, host_level=2, ring=ring, **changes)
    rig.mmu.dirty_log.manual = manual > 0
    rig.mmu.dirty_log.initially_set = manual == 3
    assert rig.store(HUGE[0]) == faults(2, pages_2m=2)
    for gfn in HUGE[1:]:
        assert rig.store(gfn) == faults(1, pages_2m=1)
    return rig


def _clear(rig: TdpRig, first: int, count: int) -> dict[str, int]:
    before = rig.counters()
    words = np.full(-(-count // 64), 2**64 - 1, dtype=np.uint64)
    rig.mmu.dirty_log.clear(rig.slot, first, count, words)
    return moved(before, rig.counters())


# --- how large a leaf is -------------------------------------------------------------------------------


def test_the_level_is_the_least_of_host_slot_and_logging() -> None:
    assert TdpRig("amd-npt 6.12", flags=0, host_level=1).store(DATA)["pages_4k"] == 7
    assert TdpRig("amd-npt 6.12", flags=0, host_level=2).store(DATA) == faults(2, pages_2m=2)
    assert TdpRig("amd-npt 6.12", flags=LOG_DIRTY_PAGES, host_level=2).store(DATA) == faults(7, pages_4k=7)
    # 64 MiB: no range of 1 GiB lies within the slot.
    assert TdpRig("amd-npt 6.12", flags=0, host_level=3).store(DATA) == faults(2, pages_2m=2)


def test_a_gigabyte() -> None:
    rig = TdpRig("amd-npt 6.12", flags=0, leaf=PRESET, host_level=3)
    host = rig.slot.host
    rig.mmu.memslots.set_region(1, 0, 1 << 30, 1 << 30, USERSPACE + (1 << 30), memoryview(rig.memory), host)
    rig.put(0x112, 0, 1 << 30 | PRESET)
    rig.vcpu.enter()
    before = rig.counters()
    assert rig.vcpu.translate(DATA << 12, READ) == 1 << 30
    assert moved(before, rig.counters()) == faults(2, pages_1g=1, pages_2m=1)


def test_a_slot_whose_host_address_is_not_congruent_has_small_pages_only() -> None:
    rig = TdpRig("amd-npt 6.12", flags=0, host_level=2)
    rig.mmu.memslots.set_region(0, 0, 0, 0, USERSPACE)
    memory = memoryview(rig.memory)
    rig.mmu.memslots.set_region(0, 0, 0, len(memory), USERSPACE + 4096, memory, rig.slot.host)
    rig.vcpu.enter()
    assert rig.store(DATA) == faults(7, pages_4k=7)


def test_a_tracked_page_keeps_its_range_small() -> None:
    rig = TdpRig("amd-npt 6.12", flags=0, leaf=PRESET, host_level=2)
    rig.mmu.page_track.external_write_tracking = True
    rig.mmu.page_track.allocate_all()
    rig.mmu.page_track.add_gfn(DATA + 5)
    assert rig.store(DATA) == faults(2, pages_2m=1, pages_4k=1)


# --- logging begins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ["6.1", "6.12", "7.2"])
@pytest.mark.parametrize("kind", ["amd-npt", "intel-ept", "intel-ept-noad"])
def test_enabling_splits_all_huge_pages_at_once(kind: str, era: str) -> None:
    rig = _huge(f"{kind} {era}")
    assert rig.set_flags(LOG_DIRTY_PAGES) == {
        "remote_tlb_flush_requests": 1,
        "pages_2m": -5,
        "pages_4k": 2560,
    }
    first = {"amd-npt": faults(6, pf_fast=6), "intel-ept": {}, "intel-ept-noad": faults(1, pf_fast=1)}
    assert rig.store(0x800) == first[kind]
    assert rig.store(0x801) == ({} if kind == "intel-ept" else faults(1, pf_fast=1))


def test_a_bitmap_of_ones_splits_what_is_cleared() -> None:
    rig = _huge("amd-npt 6.12", manual=3)
    assert rig.set_flags(LOG_DIRTY_PAGES) == {}
    split = {"remote_tlb_flush_requests": 1, "pages_2m": -1, "pages_4k": 512}
    assert _clear(rig, 0x800, 64) == split
    assert _clear(rig, 0x9C0, 128) == split
    assert _clear(rig, 0xE00, 512) == split
    assert _clear(rig, 0, 0x800) == split
    assert rig.store(0x800) == faults(6, pf_fast=6)
    assert rig.store(0x801) == faults(1, pf_fast=1)
    # Still huge, and writable: its bits are set anyway.  Only the walk's table is reported.
    assert rig.store(0xC01) == faults(1, pf_fast=1)


def test_the_split_of_a_single_page_is_missed_where_its_end_is_exclusive() -> None:
    for era, split in (("6.1", {}), ("6.12", {"pages_2m": -1, "pages_4k": 512})):
        rig = _huge(f"amd-npt {era}", manual=3)
        rig.set_flags(LOG_DIRTY_PAGES)
        before = rig.counters()
        words = np.array([1], dtype=np.uint64)
        rig.mmu.dirty_log.clear(rig.slot, 0x800, 64, words)
        assert moved(before, rig.counters()) == {"remote_tlb_flush_requests": 1} | split, era


def _write_protected_huge(era: str) -> TdpRig:
    """Logging begins where nothing is split ahead of time."""
    rig = _huge(f"amd-npt {era}", ring=True, eager_page_split=False)
    assert rig.set_flags(LOG_DIRTY_PAGES) == {"remote_tlb_flush_requests": 1}
    return rig


def test_a_fault_below_a_huge_page_splits_it_in_place() -> None:
    rig = _write_protected_huge("6.12")
    # Four tables, of which the first takes the huge page of all of them apart; then the page itself.
    assert rig.store(0x800) == faults(6, pages_2m=-2, pages_4k=1024, pf_fast=4)
    assert rig.pushed() == [2, 0x100, 0x101, 0x102, 0x106, 0x800]
    assert rig.store(0x801) == faults(1, pf_fast=1)


def test_a_fault_below_a_huge_page_zaps_it() -> None:
    rig = _write_protected_huge("6.1")
    # The code page went with the rest of its 2 MiB, and its read fault is reported.
    assert rig.store(0x800) == faults(7, pages_2m=-2, pages_4k=7, remote_tlb_flush_requests=2)
    assert rig.store(0x801) == faults(1, pages_4k=1)


def test_a_split_keeps_the_rights() -> None:
    rig = _huge("amd-npt 6.12", manual=3)
    rig.set_flags(LOG_DIRTY_PAGES)
    huge, level = rig.spte(0x800)
    assert level == 2
    assert (
        huge & (P | W | A | D | MMU_WRITABLE | HOST_WRITABLE) == P | W | A | D | MMU_WRITABLE | HOST_WRITABLE
    )
    assert rig.mmu.tdp is not None
    rig.mmu.tdp.split_huge(rig.slot, 0x800, 0x800)
    small, level = rig.spte(0x9FF)
    assert level == 1
    assert small >> 12 & 0xFFFFF == 0x9FF
    assert (
        small & (P | W | A | D | MMU_WRITABLE | HOST_WRITABLE) == P | W | A | D | MMU_WRITABLE | HOST_WRITABLE
    )


@pytest.mark.parametrize("era", ["6.12", "7.2"])
def test_a_cleared_range_loses_mmu_writable_at_its_edges(era: str) -> None:
    """So that no fast page fault can make the huge page, or what it is split into, writable again."""
    rig = _huge(f"amd-npt {era}", manual=3, eager_page_split=False)
    rig.set_flags(LOG_DIRTY_PAGES)
    assert rig.store(0x800) == {}
    assert _clear(rig, 0x800, 64) == {"remote_tlb_flush_requests": 1}
    assert rig.load(0x805) == {}
    assert rig.store(0x800) == faults(1, pages_2m=-1, pages_4k=512)
    assert rig.store(0x801) == faults(1)
    assert rig.store(0xA01) == {}


# --- logging ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ["6.1", "6.12"])
def test_disabling_zaps_what_could_be_huge(era: str) -> None:
    rig = _huge(f"amd-npt {era}")
    rig.set_flags(LOG_DIRTY_PAGES)
    assert rig.set_flags(0) == {"remote_tlb_flush_requests": 5, "pages_4k": -2560}
    assert rig.store(0x800) == faults(2, pages_2m=2)
    assert rig.store(0xA00) == faults(1, pages_2m=1)
    assert rig.load(0xC00) == faults(1, pages_2m=1)


def test_disabling_makes_huge_pages_in_place() -> None:
    rig = _huge("amd-npt 7.2")
    rig.set_flags(LOG_DIRTY_PAGES)
    rig.store(0x800)
    rig.store(0x801)
    assert rig.set_flags(0) == {"remote_tlb_flush_requests": 1, "pages_4k": -2560, "pages_2m": 5}
    # Each has the rights of its first small page, and that of 0xA00 was write-protected; so was gfn 0.
    assert rig.store(0x800) == faults(1, pf_fast=1)
    assert rig.store(0xA00) == faults(1, pf_fast=1)
    assert rig.load(0xC00) == {}


def test_disabling_leaves_alone_what_never_can_be_huge() -> None:
    for era in ("6.12", "7.2"):
        rig = TdpRig(f"amd-npt {era}")
        rig.store(DATA)
        assert rig.set_flags(0) == {}
        assert rig.store(DATA) == {}


def test_a_page_protected_for_a_log_that_ended_is_made_writable_without_a_mark() -> None:
    rig = TdpRig("amd-npt 6.12", flags=0, leaf=PRESET)
    rig.store(DATA)
    rig.store(DATA + 1)
    rig.set_flags(LOG_DIRTY_PAGES)
    rig.store(DATA)
    rig.pushed()
    rig.set_flags(0)
    assert rig.store(DATA + 1) == faults(1, pf_fast=1)
    assert rig.pushed() == []


# --- spurious faults, tracking, MMIO -------------------------------------------------------------------


def test_a_spurious_fault_marks_again_before_7_2() -> None:
    """A second vCPU's fault on what is mapped already; with EPT A/D a read is no fast page fault."""
    for era, again in (("6.12", [DATA]), ("7.2", [])):
        rig = TdpRig(f"intel-ept {era}")
        rig.store(DATA)
        rig.pushed()
        assert rig.vcpu.tdp is not None
        result = rig.vcpu.tdp.page_fault(DATA << 12, 0)
        assert result.name == "SPURIOUS"
        assert rig.pushed() == again


@pytest.mark.parametrize("era", ["6.1", "6.12", "7.2"])
def test_a_tracked_page_is_mapped_read_only_and_its_writes_are_emulated(era: str) -> None:
    rig = TdpRig(f"amd-npt {era}", leaf=PRESET)
    if era == "6.1":
        assert rig.slot.gfn_write_track is not None
    else:
        rig.mmu.page_track.allocate_all()
    rig.mmu.page_track.add_gfn(DATA)
    rig.load(DATA)
    spte, _ = rig.spte(DATA)
    assert spte & (P | W | MMU_WRITABLE | HOST_WRITABLE) == P | HOST_WRITABLE
    assert DATA not in rig.pushed()
    before = rig.counters()
    with pytest.raises(EmulateInstruction):
        rig.vcpu.translate(DATA << 12, WRITE)
    assert moved(before, rig.counters()) == {"pf_taken": 1, "pf_emulate": 1}
    rig.mmu.page_track.remove_gfn(DATA)
    assert rig.store(DATA) == faults(1)
    assert rig.pushed() == [DATA]


def test_tracking_takes_the_right_to_write_at_once_and_asks_for_a_flush() -> None:
    rig = TdpRig("amd-npt 6.12", leaf=PRESET)
    rig.store(DATA)
    rig.vcpu.translate(DATA << 12, WRITE)
    rig.mmu.page_track.allocate_all()
    before = rig.counters()
    rig.mmu.page_track.add_gfn(DATA)
    assert moved(before, rig.counters()) == {"remote_tlb_flush_requests": 1}
    with pytest.raises(EmulateInstruction):
        rig.vcpu.translate(DATA << 12, WRITE)


def _reach(rig: TdpRig, gpa: int, kind: int = WRITE) -> dict[str, int]:
    """Access a page without a slot: what moved."""
    before = rig.counters()
    rig.vcpu.enter()
    with pytest.raises(EmulateInstruction):
        rig.vcpu.translate(gpa, kind)
    return moved(before, rig.counters())


@pytest.mark.parametrize("name", ["amd-npt 6.12", "intel-ept 7.2"])
def test_the_second_access_without_a_slot_costs_no_fault(name: str) -> None:
    rig = TdpRig(name, leaf=PRESET)
    rig.put(0x112, 9, 0x9000 << 12 | PRESET)
    rig.store(DATA)
    at = DATA + 9 << 12
    assert _reach(rig, at) == {"pf_taken": 1, "pf_emulate": 1, "pf_mmio_spte_created": 1}
    assert _reach(rig, at) == {}
    assert _reach(rig, at, READ) == {}
    # Any change of memslots makes MMIO SPTEs stale.
    rig.mmu.memslots.set_region(3, 0, 0xA000 << 12, 4096, USERSPACE, memoryview(bytearray(4096)))
    assert _reach(rig, at) == {"pf_taken": 1, "pf_emulate": 1, "pf_mmio_spte_created": 1}


def test_without_mmio_caching_every_access_is_a_fault() -> None:
    rig = TdpRig("amd-npt 6.12", leaf=PRESET, mmio_caching=False)
    rig.put(0x112, 9, 0x9000 << 12 | PRESET)
    rig.store(DATA)
    for _ in range(2):
        assert _reach(rig, DATA + 9 << 12) == {"pf_taken": 1, "pf_emulate": 1}


def test_a_slot_made_where_an_mmio_spte_is_gets_mapped() -> None:
    rig = TdpRig("amd-npt 6.12", leaf=PRESET)
    rig.put(0x112, 9, 0x9000 << 12 | PRESET)
    rig.store(DATA)
    _reach(rig, DATA + 9 << 12)
    rig.mmu.memslots.set_region(3, 0, 0x9000 << 12, 4096, USERSPACE, memoryview(bytearray(4096)))
    rig.vcpu.enter()
    before = rig.counters()
    assert rig.vcpu.translate(DATA + 9 << 12, WRITE) == 0x9000 << 12
    assert moved(before, rig.counters()) == faults(1, pages_4k=1)
    assert rig.mmu.tdp is not None
    assert not rig.mmu.tdp.root().maps_mmio(0x9000)


# --- zapping -------------------------------------------------------------------------------------------


def test_a_slot_that_goes_takes_every_mapping_along_without_a_flush_request() -> None:
    rig = TdpRig("amd-npt 6.12", leaf=PRESET)
    rig.mmu.memslots.set_region(5, 0, 0x8000 << 12, 4096, USERSPACE, memoryview(bytearray(4096)))
    rig.put(0x112, 0x20, 0x8000 << 12 | PRESET)
    rig.store(DATA)
    rig.vcpu.translate(DATA + 0x20 << 12, WRITE)
    before = rig.counters()
    rig.mmu.memslots.set_region(5, 0, 0x8000 << 12, 0, USERSPACE)
    assert moved(before, rig.counters()) == {"pages_4k": -8}
    rig.pushed()
    assert rig.store(DATA) == faults(7, pages_4k=7)
    assert rig.pushed() == [2, 0x100, 0x101, 0x102, 1, 0x112, DATA]


def test_the_host_changes_memory() -> None:
    rig = TdpRig("amd-npt 6.12", leaf=PRESET)
    rig.store(DATA)
    rig.store(DATA + 1)
    before = rig.counters()
    assert rig.mmu.tdp is not None
    assert rig.mmu.tdp.zap_range(rig.slot, DATA, DATA)
    assert not rig.mmu.tdp.zap_range(rig.slot, DATA + 2, DATA + 5)
    assert moved(before, rig.counters()) == {"pages_4k": -1}
    assert rig.store(DATA) == faults(1, pages_4k=1)


# --- the NX mitigation ---------------------------------------------------------------------------------


def test_executing_in_a_huge_page_splits_it() -> None:
    rig = TdpRig("amd-npt 6.12", flags=0, leaf=PRESET, host_level=2, nx_huge_pages=True)
    rig.vcpu.enter()
    before = rig.counters()
    rig.vcpu.translate(DATA << 12, READ)
    assert moved(before, rig.counters()) == faults(2, pages_2m=2)
    assert rig.spte(DATA)[0] & NX
    before = rig.counters()
    rig.vcpu.translate(DATA << 12, FETCH)
    # Once the page is taken apart, its small one is already as it should be.
    assert moved(before, rig.counters()) == {
        "pf_taken": 1,
        "pf_spurious": 1,
        "pages_2m": -1,
        "pages_4k": 512,
        "nx_lpage_splits": 1,
    }


def test_data_in_a_range_that_execution_made_small_stays_small() -> None:
    rig = TdpRig("intel-ept 6.1", flags=0, leaf=PRESET, host_level=2, nx_huge_pages=True)
    # Seen in a lab (nx_huge_pages=force): the first table is mapped huge, the fetch of the code zaps that and
    # builds small pages for the code and all four tables; then the second range's table and page.
    assert rig.access(DATA, FETCH) == faults(8, pages_4k=7, nx_lpage_splits=2, remote_tlb_flush_requests=1)
    assert rig.store(DATA + 1) == faults(1, pages_4k=1)
    assert rig.store(DATA + 0x200) == faults(2, pages_2m=1, pages_4k=1)  # and its page table
