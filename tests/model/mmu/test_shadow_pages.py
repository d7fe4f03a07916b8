"""Shadow pages: roles, roots, sharing, zapping, the budget (docs/reference/kvm-mmu.md 10.1 to 10.4, 7.5)."""

from __future__ import annotations

import pytest

from pykvm.model.mmu import roles
from pykvm.model.mmu.outcomes import TripleFault
from pykvm.model.mmu.vcpu import ControlChange, VcpuMmu
from pykvm.profiles import profile
from pykvm.x86.bits import Cr0, Cr4
from tests.model.mmu.shadow_guest import (
    LA57,
    LONG,
    PAE,
    PAGE,
    PAGING_32,
    PS,
    TABLE,
    UNPAGED,
    P,
    ShadowGuest,
    U,
    W,
)

ROOT, PDPT, PD, PT = 0x10, 0x11, 0x12, 0x13


def guest(**options: object) -> tuple[ShadowGuest, VcpuMmu]:
    """A 4-level guest that maps gfns 0 to 255, A and D set everywhere."""
    made = ShadowGuest(**options)  # type: ignore[arg-type]
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, PAGE)
    return made, made.vcpu(LONG, ROOT)


# --- roots (10.2) ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "pages", "counts"),
    [(UNPAGED, 4, 0), (PAGING_32, 4, 4), (LONG, 1, 1), (LA57, 1, 1)],
    ids=["unpaged", "32-bit", "4-level", "5-level"],
)
def test_a_root_load_makes_so_many_pages(control: roles.Control, pages: int, counts: int) -> None:
    made = ShadowGuest()
    vcpu = made.vcpu(control, ROOT)
    assert made.enter(vcpu).moved["mmu_cache_miss"] == pages
    assert made.mmu.page_track.count(made.slot, ROOT) == counts


def test_pae_has_a_root_page_a_present_pdpte_and_does_not_track_the_pdpt() -> None:
    made = ShadowGuest()
    vcpu = made.vcpu(PAE._replace(pdptrs=(0x20 << 12 | P, 0, 0x21 << 12 | P, 0)), ROOT)
    assert made.enter(vcpu).moved["mmu_cache_miss"] == 2
    track = made.mmu.page_track
    assert [track.count(made.slot, gfn) for gfn in (ROOT, 0x20, 0x21)] == [0, 1, 1]


def test_cr3_without_a_slot_ends_in_a_dummy_root_or_a_triple_fault() -> None:
    made = ShadowGuest(era="6.12")
    vcpu = made.vcpu(LONG, 1 << 30)
    assert "mmu_cache_miss" not in made.enter(vcpu).moved
    found = made.load(vcpu, 0x5000)
    assert found.fault is not None
    assert found.fault.error & 1 == 0
    assert found.moved == {"pf_taken": 1, "pf_guest": 1}
    old = ShadowGuest(era="6.1")
    with pytest.raises(TripleFault):
        old.enter(old.vcpu(LONG, 1 << 30))


def test_the_current_root_and_three_before_it_are_kept() -> None:
    made, vcpu = guest()
    for root in (0x20, 0x21, 0x22, 0x23):
        made.entry(root, 0, PDPT << 12 | TABLE)
    made.enter(vcpu)

    def switch(root: int) -> int:
        vcpu.set_control(vcpu.control._replace(cr3=root << 12), ControlChange.MOV_CR3)
        return made.enter(vcpu).moved.get("mmu_cache_miss", 0)

    assert [switch(root) for root in (0x20, 0x21, 0x22)] == [1, 1, 1]
    kept = [made.mmu.shadow.by_gfn[gfn][0].root_count for gfn in (ROOT, 0x20, 0x21, 0x22)]
    assert kept == [1, 1, 1, 1]
    assert switch(0x23) == 1
    counts = {gfn: made.mmu.shadow.by_gfn[gfn][0].root_count for gfn in (ROOT, 0x20, 0x21, 0x22, 0x23)}
    assert counts == {ROOT: 0, 0x20: 1, 0x21: 1, 0x22: 1, 0x23: 1}
    assert switch(ROOT) == 0, "its page is in the hash still"


# --- roles (10.1) ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("era", "cr0", "cr4", "same"),
    [
        ("6.12", 0, int(Cr4.SMEP), True),  # smep_andnot_wp, and WP is set
        ("7.2", 0, int(Cr4.SMEP), False),  # cr4_smep
        ("6.12", 0, int(Cr4.PGE), True),
        ("6.12", int(Cr0.WP), 0, False),
        ("6.12", int(Cr0.WP), int(Cr4.SMAP), False),
        ("6.12", 0, int(Cr4.SMAP), True),
    ],
)
def test_which_control_bits_are_part_of_the_role(era: str, cr0: int, cr4: int, same: bool) -> None:
    host = profile("amd-shadow", era)
    other = LONG._replace(cr0=LONG.cr0 ^ cr0, cr4=LONG.cr4 ^ cr4)
    assert (roles.root_role(LONG, host) == roles.root_role(other, host)) is same


def test_without_wp_smep_is_part_of_the_role_in_every_era() -> None:
    no_wp = LONG._replace(cr0=LONG.cr0 & ~int(Cr0.WP))
    smep = no_wp._replace(cr4=no_wp.cr4 | Cr4.SMEP)
    for era in ("6.1", "6.12", "7.2"):
        host = profile("amd-shadow", era)
        assert roles.root_role(no_wp, host) != roles.root_role(smep, host)


def test_a_child_role_has_its_level_access_and_quadrant() -> None:
    root = roles.root_role(PAGING_32, profile("amd-shadow")).role & ~roles.LEVEL | 2
    child = roles.child_role(root | 3 << roles.QUADRANT_SHIFT, roles.ACC_USER, 5, direct=False)
    assert child & roles.LEVEL == 1
    assert roles.access_of(child) == roles.ACC_USER
    assert child >> roles.QUADRANT_SHIFT & 3 == 1
    assert not child & roles.DIRECT
    assert roles.child_role(root, roles.ACC_ALL, 4, direct=True) & roles.DIRECT


def test_a_table_reached_with_other_rights_is_another_page() -> None:
    made, vcpu = guest()
    made.entry(ROOT, 1, PDPT << 12 | TABLE & ~W)
    made.load(vcpu, 0x50000)
    again = made.load(vcpu, 1 << 39 | 0x50000)
    assert again.moved["mmu_cache_miss"] == 3
    accesses = {sp.access for sp in made.mmu.shadow.by_gfn[PT]}
    assert accesses == {roles.ACC_ALL, roles.ACC_ALL & ~roles.ACC_WRITE}


def test_a_table_reached_twice_with_the_same_rights_is_shared() -> None:
    made, vcpu = guest(era="7.2")
    made.entry(ROOT, 1, PDPT << 12 | TABLE)
    made.load(vcpu, 0x50000)
    again = made.load(vcpu, 1 << 39 | 0x50000)
    assert again.moved == {"pf_taken": 1, "pf_spurious": 1}


def test_a_32_bit_table_is_shadowed_in_quadrants() -> None:
    """hosts.md B.7: one 4-byte table makes two pages, one a half; writing to it unsyncs both."""
    made = ShadowGuest()
    vcpu = made.vcpu(PAGING_32, ROOT)
    made.entry_4(ROOT, 0, PT << 12 | TABLE)
    for page in (0, 0x1FF, 0x200, 0x3FF):
        made.entry_4(PT, page, 0x300 + (page & 1) << 12 | PAGE)
    made.entry_4(PT, 0x10, PT << 12 | PAGE)
    assert made.load(vcpu, 0).moved["mmu_cache_miss"] == 1
    assert made.load(vcpu, 0x200 << 12).moved["mmu_cache_miss"] == 1
    found = {sp.role >> roles.QUADRANT_SHIFT & 3 for sp in made.mmu.shadow.by_gfn[PT]}
    assert found == {0, 1}
    assert made.store(vcpu, 0x10 << 12).moved["mmu_unsync"] == 2


def test_a_write_to_a_32_bit_pde_hits_two_sptes() -> None:
    """kvm-mmu.md 10.6: off <<= 1 twice; four root pages of the same gfn, one quadrant each."""
    made = ShadowGuest()
    vcpu = made.vcpu(PAGING_32, ROOT)
    made.entry_4(ROOT, 0x180, PT << 12 | TABLE)  # linear 0x60000000: quadrant 1
    made.entry_4(PT, 0, 0x300 << 12 | PAGE)
    made.load(vcpu, 0x60000000)
    moved = made.emulated_store(vcpu, ROOT << 12 | 0x180 * 4, (PT << 12 | TABLE).to_bytes(4, "little")).moved
    assert moved == {"mmu_pte_write": 1, "mmu_pde_zapped": 2, "remote_tlb_flush_requests": 1}


# --- zapping (10.3) ----------------------------------------------------------------------------------


def test_slot_deletion_zaps_all_and_counts_the_active_root_twice() -> None:
    made, vcpu = guest()
    made.load(vcpu, 0x50000)
    made.mmu.memslots.set_region(1, 0, 1 << 30, 4096, HOST2, memoryview(bytearray(4096)))
    made.did()
    made.mmu.memslots.set_region(1, 0, 1 << 30, 0, HOST2)
    assert made.did().moved == {"mmu_shadow_zapped": 4, "pages_4k": -1, "remote_tlb_flush_requests": 1}
    # The root is freed at the next entry, which makes another one.
    assert made.enter(vcpu).moved == {
        "mmu_shadow_zapped": 1,
        "mmu_cache_miss": 1,
        "remote_tlb_flush_requests": 1,
        "tlb_flush": 1,
    }


HOST2 = 0x2000_0000_0000


def test_an_unsync_child_goes_with_its_parent_unless_the_host_leaves_it() -> None:
    """hosts.md B.11, 3."""
    for zaps, moved in (
        (True, {"mmu_shadow_zapped": 2, "mmu_unsync": -1}),
        (False, {"mmu_shadow_zapped": 1}),
    ):
        made, vcpu = guest(zaps_unsync_children=zaps)
        assert made.store(vcpu, PT << 12).moved["mmu_unsync"] == 1
        zapped: list[object] = []
        made.mmu.shadow.prepare_zap(made.mmu.shadow.by_gfn[PD][0], zapped)  # type: ignore[arg-type]
        found = made.did().moved
        found.pop("pages_4k", None)
        assert found == moved
        assert len(zapped) == moved["mmu_shadow_zapped"]


def test_an_orphan_is_found_again() -> None:
    made, vcpu = guest(era="7.2")
    made.load(vcpu, 0x50000)
    made.mmu.shadow.zap_entry(made.mmu.shadow.by_gfn[PD][0], 0)
    vcpu.request_tlb_flush()
    assert made.load(vcpu, 0x50000).moved == {"pf_taken": 1, "pf_spurious": 1}


# --- the budget (7.5) --------------------------------------------------------------------------------


@pytest.mark.parametrize(("pages", "limit"), [(16384, 327), (64, 64), (3200, 64), (4096, 81)])
def test_the_limit_is_a_fiftieth_of_the_slots(pages: int, limit: int) -> None:
    assert ShadowGuest(pages=pages).mmu.shadow.limit == limit


def test_the_oldest_pages_are_recycled_and_active_roots_are_not() -> None:
    """hosts.md B.6: when fewer than 5 are free, so many go that 25 are."""
    made = ShadowGuest(pages=4096)
    made.entry(ROOT, 0, PDPT << 12 | TABLE)
    made.entry(PDPT, 0, PD << 12 | TABLE)
    for number in range(100):
        made.entry(PD, number, 0x100 + number << 12 | TABLE)
        made.entry(0x100 + number, 0, 0x50 << 12 | PAGE)
    vcpu = made.vcpu(LONG, ROOT)
    made.mmu.shadow.requested = True
    made.mmu.shadow.change_limit(64)
    for number in range(57):
        assert "mmu_recycled" not in made.load(vcpu, number << 21).moved
    assert made.mmu.shadow.used == 60
    moved = made.load(vcpu, 57 << 21).moved
    assert moved["mmu_recycled"] == 21  # 4 were free
    assert made.mmu.shadow.by_gfn[ROOT][0].root_count == 1


def test_a_smaller_limit_zaps_at_once() -> None:
    made = ShadowGuest(pages=16384)
    made.entry(ROOT, 0, PDPT << 12 | TABLE)
    made.entry(PDPT, 0, PD << 12 | TABLE)
    for number in range(100):
        made.entry(PD, number, 0x100 + number << 12 | TABLE)
        made.entry(0x100 + number, 0, 0x50 << 12 | PAGE)
    vcpu = made.vcpu(LONG, ROOT)
    for number in range(100):
        made.load(vcpu, number << 21)
    made.mmu.shadow.change_limit(64)
    assert made.did().moved["mmu_recycled"] == 103 - 64


# --- large guest pages (hosts.md B.4) ----------------------------------------------------------------


def test_a_large_entry_over_small_host_pages_has_a_direct_page() -> None:
    made, vcpu = guest(flags=0)
    made.entry(PD, 1, 0x200 << 12 | PS | PAGE)
    made.load(vcpu, 0x50000)
    moved = made.load(vcpu, 0x205000).moved
    assert moved["mmu_cache_miss"] == 1
    assert moved["pages_4k"] == 8, "an aligned group of 8"
    child = made.mmu.shadow.by_gfn[PD][0].children[1]
    assert child.direct
    assert child.gfn == 0x200


def test_a_large_entry_that_becomes_dirty_gets_another_direct_page() -> None:
    made, vcpu = guest(flags=0)
    made.entry(PD, 1, 0x200 << 12 | P | W | U | PS | 0x20)
    made.load(vcpu, 0x205000)
    assert made.store(vcpu, 0x205000).moved["mmu_cache_miss"] == 1
    assert made.read(PD, 1) & 0x40
