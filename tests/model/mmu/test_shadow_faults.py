"""Faults of shadow paging that end otherwise: no host memory, no room, no root; NX huge pages, MMIO SPTEs
(docs/reference/kvm-mmu.md 7.2, 7.3, 7.5, 8, 10.2, 10.5)."""

from __future__ import annotations

import errno

import pytest

from pykvm.errors import KvmError
from pykvm.model.mmu import roles, spte
from pykvm.model.mmu.memslots import PinnedPages
from pykvm.model.mmu.outcomes import EmulateInstruction, TripleFault
from pykvm.model.mmu.vcpu import ControlChange, VcpuMmu
from tests.model.mmu.shadow_guest import (
    FETCH,
    HOST,
    LONG,
    PAE,
    PAGE,
    PS,
    STORE,
    TABLE,
    UNPAGED,
    ShadowGuest,
)

ROOT, PDPT, PD, PT = 0x10, 0x11, 0x12, 0x13
HOLE = 0x8000
"""A gfn beyond the slot."""


class Memory:
    """A host whose pages are readable and writable as the test says."""

    def __init__(self, answer: bool | None) -> None:
        self.answer = answer

    def writable(self, page: int, *, write_fault: bool) -> bool | None:
        return self.answer

    def level(self, page: int) -> int:
        return 1


def guest(**options: object) -> tuple[ShadowGuest, VcpuMmu]:
    made = ShadowGuest(**options)  # type: ignore[arg-type]
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, PAGE)
    return made, made.vcpu(LONG, ROOT)


# --- the host's memory (7.2, hosts.md C.3) -----------------------------------------------------------


@pytest.mark.parametrize(("answer", "access"), [(None, FETCH), (None, STORE), (False, STORE)], ids=str)
@pytest.mark.parametrize("paged", [True, False])
def test_without_host_memory_kvm_run_fails(answer: bool | None, access: int, paged: bool) -> None:
    """PROT_NONE for all, PROT_READ for writes: EFAULT, not an emulated access."""
    made, vcpu = guest()
    if not paged:
        vcpu.set_control(UNPAGED, ControlChange.HOST)
    made.slot.host = Memory(answer)
    with pytest.raises(KvmError) as refused:
        made.access(vcpu, 0x50000, access)
    assert refused.value.errno == errno.EFAULT


def test_a_write_to_a_readonly_slot_is_emulated() -> None:
    made, vcpu = guest()
    memory = memoryview(bytearray(4096))
    made.mmu.memslots.set_region(1, 2, HOLE << 12, 4096, HOST, memory)
    made.entry(PT, 0x50, HOLE << 12 | PAGE)
    assert made.store(vcpu, 0x50000).emulate is not None


# --- the budget (7.5) --------------------------------------------------------------------------------


def test_no_room_but_roots_in_use_fails_with_enospc() -> None:
    made = ShadowGuest()
    made.mmu.shadow.requested = True
    made.mmu.shadow.change_limit(64)
    for number in range(64):
        made.enter(made.vcpu(LONG, 0x100 + number))
    with pytest.raises(KvmError) as refused:
        made.enter(made.vcpu(LONG, 0x200))
    assert refused.value.errno == errno.ENOSPC


# --- roots without a slot (10.2) ---------------------------------------------------------------------


def test_a_dummy_root_is_replaced_when_its_gfn_gets_a_slot() -> None:
    made = ShadowGuest()
    vcpu = made.vcpu(LONG, HOLE)
    assert made.load(vcpu, 0x50000).fault is not None
    memory = memoryview(bytearray(4096))
    memory.cast("Q")[0] = PDPT << 12 | TABLE
    made.mmu.memslots.set_region(1, 0, HOLE << 12, 4096, HOST, memory)
    made.map_long(0x100, (PDPT, PD, PT), 0, 256, PAGE)
    moved = made.load(vcpu, 0x50000).moved
    assert moved["pf_fixed"] == 1
    assert moved["pf_taken"] == 2, "the first fault only has the root loaded"


@pytest.mark.parametrize("pdptrs", [(0x11001, 0, 0, 0), (HOLE << 12 | 1, 0, 0, 0)], ids=["cr3", "pdpte"])
def test_pae_tables_without_a_slot_are_dummies_or_a_triple_fault(pdptrs: tuple[int, int, int, int]) -> None:
    root = HOLE if pdptrs[0] == 0x11001 else ROOT
    made = ShadowGuest()
    made.enter(made.vcpu(PAE._replace(pdptrs=pdptrs), root))
    assert made.mmu.shadow.used == 0
    older = ShadowGuest(era="6.1")
    vcpu = older.vcpu(PAE._replace(pdptrs=pdptrs), root)
    with pytest.raises(TripleFault):
        vcpu.enter()


# --- NX huge pages (7.2, 11.1) -----------------------------------------------------------------------


def huge(**changes: object) -> tuple[ShadowGuest, VcpuMmu]:
    """A guest page of 2 MiB at 2 MiB on host pages of that size, in a slot that does not log."""
    made = ShadowGuest(pages=4096, flags=0, **changes)  # type: ignore[arg-type]
    made.slot.host = PinnedPages(2)
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, PAGE)
    made.entry(PD, 1, 0x200 << 12 | PS | PAGE)
    return made, made.vcpu(LONG, ROOT)


def test_executing_in_a_huge_page_splits_it_under_the_mitigation() -> None:
    made, vcpu = huge(nx_huge_pages=True)
    assert made.store(vcpu, 0x205000).moved["pages_2m"] == 1
    moved = made.access(vcpu, 0x205000, FETCH).moved
    assert moved["pages_2m"] == -1
    assert moved["nx_lpage_splits"] == 1
    assert moved["pf_fixed"] == 1
    assert "pages_2m" not in made.store(vcpu, 0x206000 + (0x100 << 12)).moved, "it stays split"


def test_a_split_that_is_zapped_is_one_no_more() -> None:
    made, vcpu = huge(nx_huge_pages=True)
    made.access(vcpu, 0x205000, FETCH)
    made.mmu.shadow.zap_all_fast()
    assert made.did().moved["nx_lpage_splits"] == -1


def test_unpaged_code_in_huge_pages_is_split_too() -> None:
    made = ShadowGuest(pages=4096, flags=0, nx_huge_pages=True)
    made.slot.host = PinnedPages(2)
    vcpu = made.vcpu(UNPAGED, 0)
    assert made.store(vcpu, 0x205000).moved["pages_2m"] == 1
    assert made.access(vcpu, 0x205000, FETCH).moved["nx_lpage_splits"] == 1


def test_without_the_mitigation_huge_pages_are_executed() -> None:
    made, vcpu = huge()
    made.store(vcpu, 0x205000)
    assert made.access(vcpu, 0x205000, FETCH).moved == {}


# --- SPTEs (8, 10.5) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ["6.12", "7.2"])
def test_a_huge_leaf_in_place_of_a_table_has_d(era: str) -> None:
    """The table that it replaces is no writable leaf, whatever its own W bit says: make_spte sets D."""
    made = ShadowGuest(era=era, pages=4096, flags=1)
    made.slot.host = PinnedPages(2)
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, PAGE)
    made.entry(PD, 1, 0x200 << 12 | PS | PAGE)
    vcpu = made.vcpu(LONG, ROOT)
    made.store(vcpu, 0x205000)
    made.mmu.memslots.set_region(0, 0, 0, 4096 * 4096, HOST)
    assert made.access(vcpu, 0x206000, FETCH).moved["pages_2m"] == 1
    leaf = made.mmu.shadow.by_gfn[PD][0].spt[1]
    assert leaf & spte.PS
    assert leaf & spte.W
    assert leaf & spte.D


def mmio() -> tuple[ShadowGuest, VcpuMmu]:
    """A guest that has an MMIO SPTE and an unsync page table around it."""
    made, vcpu = guest()
    made.entry(PT, 0x50, HOLE << 12 | PAGE)
    assert made.store(vcpu, 0x50000).moved["pf_mmio_spte_created"] == 1
    made.store(vcpu, PT << 12)
    return made, vcpu


def test_a_sync_renews_the_generation_of_an_mmio_spte() -> None:
    """``sync_mmio_spte``: afterwards the access is known for MMIO again, without a fault that counts."""
    made, vcpu = mmio()
    made.mmu.memslots.set_region(1, 0, HOLE + 16 << 12, 4096, HOST, memoryview(bytearray(4096)))
    vcpu.set_control(vcpu.control, ControlChange.MOV_CR3)
    made.enter(vcpu)
    found = made.store(vcpu, 0x50000)
    assert found.emulate is not None
    assert found.moved == {}


def test_a_stale_mmio_spte_counts_a_fault() -> None:
    made, vcpu = mmio()
    made.mmu.memslots.set_region(1, 0, HOLE + 16 << 12, 4096, HOST, memoryview(bytearray(4096)))
    assert made.store(vcpu, 0x50000).moved["pf_mmio_spte_created"] == 1


@pytest.mark.parametrize(("era", "bits"), [("6.12", 19), ("7.2", 18)], ids=str)
def test_a_round_of_the_mmio_generation_zaps_everything(era: str, bits: int) -> None:
    """Section 2: MMIO SPTEs carry the low bits of the generation; when they are all 0, none may be left."""
    made, vcpu = guest(era=era)
    made.load(vcpu, 0x50000)
    memslots = made.mmu.memslots
    memslots.generations[0] = (1 << bits) - 4
    memslots.set_region(0, 0, 0, 4096 * 4096, HOST)
    assert "mmu_shadow_zapped" not in made.did().moved
    memslots.set_region(0, 1, 0, 4096 * 4096, HOST)
    assert memslots.generations[0] == 1 << bits
    assert made.did().moved["mmu_shadow_zapped"] == 4


def test_invlpg_of_an_absent_entry_prefetches_it_in_6_1() -> None:
    """FNAME(invlpg) of 6.1 looks at the table whether or not there was an SPTE, as long as it is unsync."""
    made, vcpu = guest(era="6.1")
    made.mmu.memslots.set_region(0, 0, 0, 4096 * 4096, HOST)
    made.entry(PT, 0x50, 0)
    made.store(vcpu, 0x60000)
    made.store(vcpu, PT << 12)
    made.entry(PT, 0x50, 0x70 << 12 | PAGE)
    vcpu.invlpg(0x50000)
    assert made.did().moved == {"invlpg": 1, "pages_4k": 1}


def test_direct_pages_without_a_bits_are_not_prefetched() -> None:
    made = ShadowGuest("intel-ept-noad", flags=0, tdp_mmu=False)
    vcpu = made.vcpu(UNPAGED, 0)
    assert made.store(vcpu, 0x50000).moved["pages_4k"] == 1
    with_ad = ShadowGuest("intel-ept", flags=0, tdp_mmu=False)
    vcpu = with_ad.vcpu(UNPAGED, 0)
    assert with_ad.store(vcpu, 0x50000).moved["pages_4k"] == 8


# --- retry (12.3, 10.7) ------------------------------------------------------------------------------


def test_a_forced_retry_is_remembered_even_if_the_walk_fails() -> None:
    made, vcpu = guest()
    made.load(vcpu, 0x50000)
    cause = EmulateInstruction(0x70000, allow_retry=True)
    made.entry(PT, 0x70, 0)
    assert vcpu.retry_after_failure(cause, 0x1000)
    assert vcpu.last_retry == (0x1000, 0x70000)


def test_in_6_1_a_failed_emulation_without_memory_is_not_retried() -> None:
    """``reexecute_instruction``: a READONLY slot or none is a failure at once, else retried for ever."""
    for era, retried in (("6.1", False), ("6.12", True)):
        made, vcpu = guest(era=era)
        made.load(vcpu, 0x50000)
        memory = memoryview(bytearray(4096))
        made.mmu.memslots.set_region(1, 2, HOLE << 12, 4096, HOST, memory)
        made.entry(PT, 0x51, HOLE << 12 | PAGE)
        cause = EmulateInstruction(0x51000, allow_retry=True)
        assert vcpu.retry_after_failure(cause, 0x1000) == retried


def test_in_6_1_a_write_to_a_table_of_its_own_translation_unprotects_and_fails() -> None:
    """EMULTYPE_WRITE_PF_TO_SP: 6.1 zaps all the same; later kernels do not try."""
    for era, zapped in (("6.1", 1), ("6.12", 0)):
        made, vcpu = guest(era=era)
        made.load(vcpu, 0x50000)
        cause = EmulateInstruction(PD << 12, allow_retry=True, write_pf_to_sp=True)
        assert not vcpu.retry_after_failure(cause, 0x1000)
        assert made.did().moved.get("mmu_shadow_zapped", 0) == zapped


def test_nothing_is_walked_where_no_table_is_shadowed() -> None:
    """``indirect_shadow_pages`` is 0: no A or D is set on the way to an unprotect that cannot be."""
    made = ShadowGuest()
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, PAGE & ~0x60)
    vcpu = made.vcpu(LONG, ROOT)
    assert vcpu.retry_after_failure(EmulateInstruction(0x50000, allow_retry=True), 0x1000)
    assert made.did().pushed == []


def test_whether_4_byte_writes_are_widened_follows_cr4_pae() -> None:
    """``is_pae``: CR4.PAE alone, paging or not (10.6)."""
    made, vcpu = guest()
    made.load(vcpu, 0x50000)
    unpaged = made.vcpu(UNPAGED._replace(cr4=0x20), 0)
    assert "mmu_flooded" not in made.emulated_store(unpaged, (PD << 12) + 6, bytes(4)).moved
    unpaged.set_control(UNPAGED, ControlChange.HOST)
    assert made.emulated_store(unpaged, (PD << 12) + 6, bytes(4)).moved["mmu_flooded"] == 1


def test_roles_of_direct_pages_say_whether_there_are_a_bits() -> None:
    made = ShadowGuest("intel-ept-noad", tdp_mmu=False)
    assert made.vcpu(UNPAGED, 0).root.role & roles.AD_DISABLED
