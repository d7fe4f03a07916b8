"""Nested paging: which pages the processor's walks and accesses have KVM map, and report.

Expected values: docs/reference/kvm-mmu.md 14.3 A to C and 13.4, docs/reference/hosts.md B.9; every row was
also seen in labs (AMD NPT with 6.1, 6.12 and 7.2 under QEMU, Intel EPT with 6.12 and 7.2 under Bochs).
"""

from __future__ import annotations

import pytest

from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES, READONLY
from pykvm.model.mmu.outcomes import EmulateInstruction, GuestPageFault, LeaveGuest
from pykvm.model.paging import Control
from tests.model.mmu.tdp_rig import (
    DATA,
    DATA_PT,
    FETCH,
    LONG_MODE,
    PAGES,
    PD,
    PDPT,
    PML4,
    PRESET,
    READ,
    UNPAGED,
    USERSPACE,
    WRITE,
    TdpRig,
    faults,
    moved,
)

EVERY = [
    f"{kind} {era}" for kind in ("amd-npt", "intel-ept", "intel-ept-nopml") for era in ("6.1", "6.12", "7.2")
]
WITHOUT_PML = [name for name in EVERY if not name.startswith("intel-ept ")]
FIRST = [PML4, PDPT, PD, 0x102, 1, DATA_PT, DATA]
"""hosts.md B.9: the order of the first run, code fetched and then one store."""


@pytest.mark.parametrize("name", [*EVERY, "intel-ept-noad 6.12"])
def test_a_first_store_reports_every_table_and_the_code(name: str) -> None:
    rig = TdpRig(name)
    assert rig.store(DATA) == faults(7, pages_4k=7)
    assert rig.pushed() == FIRST


@pytest.mark.parametrize("name", EVERY)
def test_what_is_mapped_moves_nothing(name: str) -> None:
    rig = TdpRig(name)
    rig.store(DATA)
    rig.pushed()
    assert rig.store(DATA) == {}
    assert rig.load(DATA) == {}
    assert rig.pushed() == []


@pytest.mark.parametrize("name", WITHOUT_PML)
def test_after_a_harvest_each_table_of_the_walk_is_reported_again(name: str) -> None:
    rig = TdpRig(name)
    rig.store(DATA)
    assert rig.harvest() == 7
    assert rig.store(DATA) == faults(6, pf_fast=6)
    assert rig.pushed() == [PML4, PDPT, PD, 0x102, DATA_PT, DATA]  # the code page is fetched, not written


@pytest.mark.parametrize("name", WITHOUT_PML)
def test_even_a_guest_that_writes_nothing_dirties_its_tables(name: str) -> None:
    rig = TdpRig(name, leaf=PRESET)
    rig.store(DATA)
    rig.harvest()
    assert rig.load(DATA) == faults(5, pf_fast=5)
    assert rig.pushed() == [PML4, PDPT, PD, 0x102, DATA_PT]


def test_without_a_and_d_bits_a_walk_that_sets_none_dirties_nothing() -> None:
    rig = TdpRig("intel-ept-noad 6.12", leaf=PRESET)
    rig.store(DATA)
    rig.harvest()
    assert rig.store(DATA) == faults(1, pf_fast=1)
    assert rig.pushed() == [DATA]


def test_without_a_and_d_bits_setting_a_guests_flag_is_a_write() -> None:
    rig = TdpRig("intel-ept-noad 6.12")
    rig.store(DATA)
    rig.harvest()
    assert rig.load(DATA + 1) == faults(2, pf_fast=1, pages_4k=1)
    assert rig.pushed() == [DATA_PT, DATA + 1]
    assert rig.entry(DATA_PT, 1) & 0x60 == 0x20


# --- kvm-mmu.md 14.3 -----------------------------------------------------------------------------------


def _all_mapped(name: str) -> TdpRig:
    """Rows A and C: every SPTE is there and writable, then logging is enabled."""
    rig = TdpRig(name, flags=0)
    assert rig.store(DATA) == faults(7, pages_4k=7)
    assert rig.set_flags(LOG_DIRTY_PAGES) == {"remote_tlb_flush_requests": 1}
    return rig


@pytest.mark.parametrize("name", WITHOUT_PML)
def test_row_a_logging_is_enabled_over_present_sptes(name: str) -> None:
    rig = _all_mapped(name)
    assert rig.store(DATA) == faults(6, pf_fast=6)
    assert rig.pushed() == [PML4, PDPT, PD, 0x102, DATA_PT, DATA]


@pytest.mark.parametrize("name", EVERY)
def test_row_b_a_logging_slot_without_sptes(name: str) -> None:
    rig = TdpRig(name)
    assert rig.store(DATA) == faults(7, pages_4k=7)
    assert rig.pushed() == FIRST


@pytest.mark.parametrize(("era", "reverse"), [("6.1", True), ("6.12", True), ("7.2", False)])
def test_row_c_pml_reports_without_a_fault(era: str, reverse: bool) -> None:
    rig = _all_mapped(f"intel-ept {era}")
    assert rig.store(DATA) == {}
    expected = [PML4, PDPT, PD, 0x102, DATA_PT, DATA]
    assert rig.pushed() == (expected[::-1] if reverse else expected)


@pytest.mark.parametrize(
    ("era", "expected"), [("6.12", [0x112, 0x102, PD, PDPT, PML4]), ("7.2", [PML4, PDPT, PD, 0x102, 0x112])]
)
def test_pml_entries_come_before_what_the_exit_itself_marks(era: str, expected: list[int]) -> None:
    rig = TdpRig(f"intel-ept {era}")
    rig.store(DATA)
    rig.harvest()
    assert rig.load(DATA + 7) == faults(1, pages_4k=1)
    assert rig.pushed() == [*expected, DATA + 7]


def test_get_collects_the_pml_buffer_of_a_vcpu_that_another_thread_runs() -> None:
    """KVM_GET_DIRTY_LOG kicks the vCPU, and its own exit marks what it holds: no mark without a vCPU, which
    a 6.1 kernel would drop."""
    rig = TdpRig("intel-ept 6.1", ring=False, flags=0, leaf=PRESET)
    rig.store(DATA)
    rig.set_flags(LOG_DIRTY_PAGES)
    rig.vcpu.translate(DATA << 12, WRITE)
    rig.mmu.loaded = None
    words = rig.mmu.dirty_log.get(rig.slot)
    assert int(words[DATA >> 6]) >> (DATA & 63) & 1


def test_a_full_pml_buffer_exits_in_the_middle() -> None:
    rig = TdpRig("intel-ept 7.2", leaf=PRESET)
    pages = range(DATA, DATA + 600)
    for gfn in pages:
        rig.store(gfn)
    rig.harvest()
    assert rig.vcpu.enter()
    for gfn in pages:
        rig.vcpu.translate(gfn << 12, WRITE)
    # Two tables for 600 pages, three above; the 513th entry made the processor exit.
    assert len(rig.pushed()) == 512
    rig.vcpu.flush_pml()
    assert len(rig.pushed()) == 600 + 5 - 512


# --- reads and fetches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [READ, FETCH])
@pytest.mark.parametrize("name", EVERY)
def test_a_read_that_installs_a_writable_spte_is_reported_and_its_repetition_is_not(
    name: str, kind: int
) -> None:
    rig = TdpRig(name, leaf=PRESET)
    rig.access(DATA, kind)
    assert DATA in rig.pushed()
    rig.harvest()
    rig.access(DATA, kind)
    assert DATA not in rig.pushed()
    rig.access(DATA, WRITE)
    assert DATA in rig.pushed()


def test_a_readonly_slot_is_mapped_read_only_and_its_reads_are_not_reported() -> None:
    rig = TdpRig("amd-npt 6.12")
    rig.mmu.memslots.set_region(
        5, READONLY | LOG_DIRTY_PAGES, 0x8000 << 12, 16 << 12, USERSPACE, memoryview(bytearray(16 << 12))
    )
    rig.put(DATA_PT, 0x20, 0x8000 << 12 | 7)
    rig.vcpu.enter()
    before = rig.counters()
    assert rig.vcpu.translate(DATA + 0x20 << 12, READ) == 0x8000 << 12
    assert moved(before, rig.counters()) == faults(5, pages_4k=5)
    assert 0x8000 not in rig.pushed()
    before = rig.counters()
    with pytest.raises(EmulateInstruction) as emulate:
        rig.vcpu.translate(DATA + 0x20 << 12, WRITE)
    assert emulate.value.gpa == 0x8000 << 12
    assert moved(before, rig.counters()) == {"pf_taken": 1, "pf_emulate": 1}
    # Measured: the processor sets A and D before it looks at the second stage of the page.
    assert rig.entry(DATA_PT, 0x20) & 0x60 == 0x60


# --- guest A and D, and guest faults -------------------------------------------------------------------


def test_an_upper_a_flag_is_set_by_a_walk_that_fails_under_npt_only() -> None:
    for name, expected in (("amd-npt 6.12", 0x20), ("intel-ept 6.12", 0)):
        rig = TdpRig(name)
        rig.put(DATA_PT + 4, 5, 0)
        rig.vcpu.enter()
        with pytest.raises(GuestPageFault) as fault:
            rig.vcpu.translate(0x2805 << 12, READ)
        assert (fault.value.error, fault.value.address, fault.value.injected) == (4, 0x2805 << 12, False)
        assert rig.entry(PD, 0x14) & 0x20 == expected, name
        assert rig.vcpu.counters.pf_guest == 0


@pytest.mark.parametrize("name", ["amd-npt 6.12", "intel-ept 6.12", "intel-ept-noad 6.12"])
def test_a_denied_access_sets_no_flag_of_the_leaf(name: str) -> None:
    rig = TdpRig(name)
    rig.put(DATA_PT, 0, DATA << 12 | 5)
    rig.vcpu.enter()
    with pytest.raises(GuestPageFault) as fault:
        rig.vcpu.translate(DATA << 12, WRITE)
    assert fault.value.error == 7
    assert rig.entry(DATA_PT, 0) & 0x60 == 0
    assert DATA not in rig.pushed()


# --- other modes ---------------------------------------------------------------------------------------


def test_an_unpaged_guest_has_its_data_reported_only() -> None:
    rig = TdpRig("amd-npt 6.12", control=UNPAGED)
    assert rig.store(0x300) == faults(2, pages_4k=2)
    assert rig.pushed() == [1, 0x300]


@pytest.mark.parametrize(("name", "pdpt"), [("amd-npt 6.12", [0x180]), ("intel-ept 6.12", [])])
def test_pae_walks_read_the_pdpt_from_memory_under_npt_only(name: str, pdpt: list[int]) -> None:
    control = Control(0x80010033, 0x180 << 12, 0x620, 0, pdptrs=(PD << 12 | 1, 0, 0, 0))
    rig = TdpRig(name, control=control)
    rig.put(0x180, 0, PD << 12 | 1)
    rig.store(0x300)
    assert rig.pushed() == [*pdpt, PD, 0x102, 1, 0x103, 0x300]


def test_4_byte_entries() -> None:
    control = Control(0x80010033, 0x181 << 12, 0x600, 0)
    rig = TdpRig("amd-npt 6.12", control=control)
    entries = [0x182 << 12 | 7] + [0] * 1023 + [page << 12 | 7 for page in range(1024)]
    rig.memory[0x181 << 12 : 0x183 << 12] = b"".join(entry.to_bytes(4, "little") for entry in entries)
    rig.store(0x300)
    assert rig.pushed() == [0x181, 0x182, 1, 0x300]
    at = (0x182 << 12) + 4 * 0x300
    assert rig.memory[at] == 0x67
    assert rig.memory[0x181 << 12] == 0x27


# --- the TLB and leaving the guest ---------------------------------------------------------------------


def test_a_stale_translation_is_used_until_the_guest_flushes_it() -> None:
    rig = TdpRig("amd-npt 6.12", leaf=PRESET)
    rig.vcpu.enter()
    rig.vcpu.translate(DATA << 12, READ)
    rig.vcpu.translate(DATA + 1 << 12, READ)  # an exit for the page loses translations
    rig.vcpu.translate(DATA << 12, READ)
    rig.put(DATA_PT, 0, DATA + 1 << 12 | PRESET)
    assert rig.vcpu.translate(DATA << 12, READ) == DATA << 12
    rig.vcpu.invlpg(DATA << 12)
    assert rig.vcpu.translate(DATA << 12, READ) == DATA + 1 << 12
    assert rig.vcpu.counters.invlpg == 0  # INVLPG is no exit with nested paging


@pytest.mark.parametrize("name", EVERY)
def test_no_store_passes_unreported_after_a_harvest_from_outside(name: str) -> None:
    rig = TdpRig(name, leaf=PRESET)
    rig.store(DATA)
    rig.vcpu.translate(DATA << 12, WRITE)
    rig.harvest()
    rig.vcpu.translate(DATA << 12, WRITE)  # without another KVM_RUN in between
    rig.vcpu.flush_pml()
    assert DATA in rig.pushed()


def _read_on(rig: TdpRig) -> None:
    """Read one page after the other."""
    for gfn in range(0x200, PAGES):
        rig.vcpu.translate(gfn << 12, READ)


def test_a_full_ring_leaves_before_the_access() -> None:
    rig = TdpRig("amd-npt 6.12", leaf=PRESET)
    with pytest.raises(LeaveGuest):
        _read_on(rig)
    assert len(rig.pushed()) == 65536 // 16 - 64
    assert not rig.vcpu.enter()
    rig.harvest()
    assert rig.vcpu.enter()


def test_what_cr3_cannot_reach_is_emulated() -> None:
    rig = TdpRig("amd-npt 6.12", control=LONG_MODE._replace(cr3=0x9000 << 12))
    before = rig.counters()
    with pytest.raises(EmulateInstruction) as emulate:
        rig.vcpu.translate(DATA << 12, READ)
    assert emulate.value.gpa == 0x9000 << 12
    assert moved(before, rig.counters()) == {"pf_taken": 1, "pf_emulate": 1, "pf_mmio_spte_created": 1}
