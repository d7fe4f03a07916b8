"""What a guest's writes to its own tables do: unsync, synchronising, interception, retry
(docs/reference/kvm-mmu.md 10.5 to 10.7, 7.4, 14.3 D to G)."""

from __future__ import annotations

import pytest

from pykvm.model.mmu.memslots import INVALID
from pykvm.model.mmu.vcpu import ControlChange, StuckGuestError, VcpuMmu
from pykvm.x86.bits import Cr4
from tests.model.mmu.shadow_guest import (
    FETCH,
    LONG,
    PAGE,
    STORE,
    TABLE,
    A,
    D,
    P,
    ShadowGuest,
    U,
    W,
)

ROOT, PDPT, PD, PT = 0x10, 0x11, 0x12, 0x13
CLEAN = P | W | U


def guest(flags: int = PAGE, **options: object) -> tuple[ShadowGuest, VcpuMmu]:
    made = ShadowGuest(**options)  # type: ignore[arg-type]
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, flags)
    return made, made.vcpu(LONG, ROOT)


# --- kvm-mmu.md 14.3, D to G -------------------------------------------------------------------------


def fresh() -> tuple[ShadowGuest, VcpuMmu]:
    """14.3: 4-level tables at 10h to 13h, A and D clear but for the tables' own pages."""
    made = ShadowGuest()
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, CLEAN)
    for table, below in ((ROOT, PDPT), (PDPT, PD), (PD, PT)):
        made.entry(table, 0, below << 12 | CLEAN)
    for table in (ROOT, PDPT, PD, PT):
        made.entry(PT, table, table << 12 | PAGE)
    return made, made.vcpu(LONG, ROOT)


def test_d_store_on_cold_tables() -> None:
    made, vcpu = fresh()
    assert made.enter(vcpu).moved["mmu_cache_miss"] == 1
    code = made.access(vcpu, 0x1000, FETCH)
    assert code.pushed == [ROOT, PDPT, PD, PT]
    store = made.store(vcpu, 0x5000)
    assert store.pushed == [PT, 5]
    for name, value in {"pf_taken": 2, "pf_fixed": 2, "mmu_cache_miss": 3, "pages_4k": 2}.items():
        assert code.moved.get(name, 0) + store.moved.get(name, 0) == value
    assert "pf_fast" not in code.moved | store.moved


def test_e_store_to_its_own_page_table() -> None:
    made, vcpu = fresh()
    made.access(vcpu, 0x1000, FETCH)
    made.store(vcpu, 0x5000)
    found = made.store(vcpu, PT << 12)
    assert found.pushed == [PT]
    assert found.moved == {"pf_taken": 1, "pf_fixed": 1, "mmu_unsync": 1, "pages_4k": 1}


def start_f() -> tuple[ShadowGuest, VcpuMmu]:
    made, vcpu = fresh()
    made.access(vcpu, 0x1000, FETCH)
    made.store(vcpu, 0x5000)
    return made, vcpu


def test_f_mov_to_its_own_page_directory() -> None:
    made, vcpu = start_f()
    fault = made.store(vcpu, PD << 12)
    assert fault.pushed == []
    assert fault.moved == {"pf_taken": 1, "pf_emulate": 1, "pages_4k": 1}, "a read-only SPTE of gfn 12h"
    assert fault.emulate is not None
    assert not vcpu.retry(fault.emulate, 0x1000, page_table_opcode=True)
    vcpu.decoded()
    written = made.emulated_store(vcpu, PD << 12, (PT << 12 | TABLE).to_bytes(8, "little"))
    assert written.pushed == [PD]
    assert written.moved == {
        "insn_emulation": 1,
        "mmu_pte_write": 1,
        "mmu_pde_zapped": 1,
        "remote_tlb_flush_requests": 1,
    }
    # The table below survives in the hash: the next access only links it again.
    assert "mmu_cache_miss" not in made.load(vcpu, 0x5000).moved


def test_g_add_to_its_own_page_directory_is_retried_once_and_then_emulated() -> None:
    made, vcpu = start_f()
    first = made.store(vcpu, PD << 12, rip=0x1000)
    assert first.emulate is not None
    assert vcpu.retry(first.emulate, 0x1000, page_table_opcode=False)
    assert made.did().moved == {"mmu_shadow_zapped": 1, "remote_tlb_flush_requests": 1}
    refetch = made.access(vcpu, 0x1000, FETCH)
    assert refetch.moved == {"pf_taken": 1, "pf_fixed": 1, "mmu_cache_miss": 1} or refetch.moved == {
        "pf_taken": 1,
        "pf_spurious": 1,
        "mmu_cache_miss": 1,
    }
    second = made.store(vcpu, PD << 12, rip=0x1000)
    assert second.emulate is not None
    assert not second.emulate.allow_retry
    assert not vcpu.retry(second.emulate, 0x1000, page_table_opcode=False)


def test_another_address_lets_the_retry_begin_again() -> None:
    made, vcpu = start_f()
    first = made.store(vcpu, PD << 12, rip=0x1000)
    assert first.emulate is not None
    assert vcpu.retry(first.emulate, 0x1000, page_table_opcode=False)
    made.access(vcpu, 0x1000, FETCH)
    other = made.store(vcpu, PDPT << 12, rip=0x1000)
    assert other.emulate is not None
    assert other.emulate.allow_retry


def test_in_6_1_the_guest_is_resumed_even_if_nothing_was_zapped() -> None:
    made, vcpu = guest(era="6.1")
    made.mmu.page_track.add_gfn(0x50)
    fault = made.store(vcpu, 0x50000)
    fault = fault if fault.emulate is not None else made.store(vcpu, 0x50000)
    assert fault.emulate is not None
    assert vcpu.retry(fault.emulate, 0x1000, page_table_opcode=False)
    assert not vcpu.retry(fault.emulate, 0x1000, page_table_opcode=False)
    later, other = guest(era="6.12")
    later.mmu.page_track.add_gfn(0x50)
    fault = later.store(other, 0x50000)
    assert fault.emulate is not None
    assert not other.retry(fault.emulate, 0x1000, page_table_opcode=False), "no shadow page of it to zap"


def test_a_failed_emulation_unprotects_once() -> None:
    made, vcpu = guest()
    made.entry(ROOT, 1, 0x31 << 12 | TABLE)
    made.entry(0x31, 0, 0x30 << 12 | TABLE)
    made.entry(0x30, 0, PT << 12 | TABLE)
    made.load(vcpu, 1 << 39 | 0x50000)
    fault = made.store(vcpu, 0x30000)
    assert fault.emulate is not None
    assert not fault.emulate.write_pf_to_sp
    assert vcpu.emulation_failed(fault.emulate, 0x1000)
    assert made.did().moved["mmu_shadow_zapped"] == 1
    assert not vcpu.emulation_failed(None, 0x1000)
    assert made.did().moved == {"insn_emulation_fail": 1}


def test_a_write_to_a_table_of_its_own_translation_is_no_reason_to_retry() -> None:
    """EMULTYPE_WRITE_PF_TO_SP: unprotecting it could never make progress."""
    made, vcpu = start_f()
    fault = made.store(vcpu, PD << 12)
    assert fault.emulate is not None
    assert fault.emulate.write_pf_to_sp
    assert not vcpu.emulation_failed(fault.emulate, 0x1000)
    assert made.did().moved == {"insn_emulation_fail": 1}


# --- unsync (10.5) -----------------------------------------------------------------------------------


def test_writes_to_an_unsync_table_cost_nothing_and_stay_unseen() -> None:
    made, vcpu = guest()
    made.store(vcpu, 0x50000)
    assert made.store(vcpu, PT << 12).moved["mmu_unsync"] == 1
    made.entry(PT, 0x50, 0x60 << 12 | PAGE)
    assert made.store(vcpu, PT << 12).moved == {}
    assert vcpu.translate(0x50000, STORE) == 0x50000, "the stale translation is still in use"


@pytest.mark.parametrize(
    ("change", "counter"),
    [
        (ControlChange.MOV_CR3, "tlb_flush"),
        (ControlChange.OTHER, "tlb_flush"),
        (ControlChange.HOST, "tlb_flush"),
    ],
)
def test_what_synchronises(change: ControlChange, counter: str) -> None:
    made, vcpu = guest()
    made.store(vcpu, 0x50000)
    made.store(vcpu, PT << 12)
    made.entry(PT, 0x50, 0x60 << 12 | PAGE)
    control = vcpu.control
    if change is ControlChange.OTHER:
        control = control._replace(cr4=control.cr4 ^ int(Cr4.PGE))
    if change is ControlChange.HOST:
        vcpu.set_control(control._replace(cr0=control.cr0 & ~0x10000), change)
    vcpu.set_control(control, change)
    entered = made.enter(vcpu).moved
    assert entered["mmu_unsync"] == -1
    assert entered["pages_4k"] == -1, "the entry names another gfn"
    assert counter in entered
    made.store(vcpu, 0x50000)
    assert vcpu.translate(0x50000, STORE) == 0x60000


def test_setting_the_same_registers_synchronises_nothing() -> None:
    """hosts.md B.1."""
    made, vcpu = guest()
    made.store(vcpu, PT << 12)
    vcpu.set_control(vcpu.control, ControlChange.HOST)
    assert made.enter(vcpu).moved == {}


def test_a_synchronised_table_is_protected_again() -> None:
    made, vcpu = guest()
    made.store(vcpu, PT << 12)
    vcpu.set_control(vcpu.control, ControlChange.MOV_CR3)
    assert made.enter(vcpu).moved["mmu_unsync"] == -1
    assert made.store(vcpu, PT << 12).moved == {"pf_taken": 1, "pf_fixed": 1, "mmu_unsync": 1}


def test_a_sync_rebuilds_what_changed_and_in_6_1_all() -> None:
    for era, marked in (("6.12", []), ("6.1", [0x50, 0x51])):
        made, vcpu = guest(era=era)
        made.store(vcpu, 0x50000)
        made.store(vcpu, 0x51000)
        made.store(vcpu, PT << 12)
        made.entry(PT, 0x80, 0)
        vcpu.set_control(vcpu.control, ControlChange.MOV_CR3)
        assert [gfn for gfn in made.enter(vcpu).pushed if gfn >= 0x50] == marked


def test_invlpg_synchronises_one_entry() -> None:
    made, vcpu = guest()
    made.store(vcpu, 0x50000)
    made.store(vcpu, 0x51000)
    made.store(vcpu, PT << 12)
    made.entry(PT, 0x50, 0x60 << 12 | PAGE)
    made.entry(PT, 0x51, 0x61 << 12 | PAGE)
    vcpu.invlpg(0x50000)
    assert made.did().moved == {"invlpg": 1, "pages_4k": -1, "remote_tlb_flush_requests": 1}
    made.store(vcpu, 0x50000)
    assert vcpu.translate(0x50000, STORE) == 0x60000
    assert vcpu.translate(0x51000, STORE) == 0x51000


def test_invlpg_refetches_in_6_1() -> None:
    made, vcpu = guest(era="6.1", flags=PAGE, pages=4096)
    made.mmu.memslots.set_region(0, 0, 0, 4096 * 4096, made.slot.userspace_addr)
    made.store(vcpu, 0x50000)
    made.store(vcpu, PT << 12)
    made.entry(PT, 0x50, 0x60 << 12 | PAGE)
    vcpu.invlpg(0x50000)
    assert "pages_4k" not in made.did().moved
    assert made.store(vcpu, 0x50000).moved == {}
    assert vcpu.translate(0x50000, STORE) == 0x60000


def test_a_table_used_higher_up_cannot_stay_unsync() -> None:
    """10.3: same gfn, other role; the wanted level is above 1, so the unsync page goes."""
    made, vcpu = guest()
    made.store(vcpu, PT << 12)
    made.entry(PDPT, 1, PT << 12 | TABLE)
    made.entry(0x40, 0, 0x50 << 12 | PAGE)
    found = made.load(vcpu, 1 << 30 | 0x40 << 21)
    assert found.moved["mmu_unsync"] == -1
    assert found.moved["mmu_shadow_zapped"] == 1


def test_a_prefetch_never_makes_a_table_unsync() -> None:
    made, vcpu = guest(flags=PAGE, pages=4096)
    made.mmu.memslots.set_region(0, 0, 0, 4096 * 4096, made.slot.userspace_addr)
    found = made.load(vcpu, 0x14000)
    assert found.moved["pages_4k"] == 8, "gfns 10h to 17h, the tables among them"
    assert "mmu_unsync" not in found.moved
    page = made.mmu.shadow.by_gfn[PT][0]
    assert not page.spt[PT] & 2, "read-only: it is a page table"
    assert page.spt[0x15] & 2


# --- interception of upper tables (10.6, hosts.md B.2) -----------------------------------------------


def shadowed() -> tuple[ShadowGuest, VcpuMmu]:
    made, vcpu = guest()
    made.load(vcpu, 0x50000)
    return made, vcpu


@pytest.mark.parametrize(
    ("offset", "size", "zapped"),
    [
        (0, 1, False),
        (8, 1, False),
        (1, 1, True),
        (7, 1, True),
        (0, 2, True),
        (4, 2, True),
        (0, 4, False),
        (4, 4, False),
        (2, 4, False),
        (6, 4, False),
        (0, 8, False),
        (4, 8, True),
        (0, 16, True),
        (0, 32, True),
    ],
)
def test_which_sizes_and_offsets_zap_at_once(offset: int, size: int, zapped: bool) -> None:
    made, vcpu = shadowed()
    moved = made.emulated_store(vcpu, (PD << 12) + 0x100 + offset, bytes(size)).moved
    assert moved.get("mmu_flooded", 0) == moved.get("mmu_shadow_zapped", 0) == zapped
    assert moved["mmu_pte_write"] == 1


@pytest.mark.parametrize(("size", "value", "counts"), [(8, 1, 1), (8, 0, 0), (4, 1, 1), (1, 1, 0)], ids=str)
def test_pde_zapped_needs_a_whole_entry_that_is_not_zero(size: int, value: int, counts: int) -> None:
    made, vcpu = shadowed()
    moved = made.emulated_store(vcpu, (PD << 12) + 0x100, value.to_bytes(size, "little")).moved
    assert moved.get("mmu_pde_zapped", 0) == counts


def test_a_straddling_4_byte_write_misses_the_second_entry() -> None:
    """hosts.md B.2: KVM looks at the entry of the first byte only."""
    made, vcpu = shadowed()
    made.entry(PD, 1, PT << 12 | TABLE)
    made.load(vcpu, 0x200000 | 0x50000)
    made.emulated_store(vcpu, (PD << 12) + 6, bytes(4))
    page = made.mmu.shadow.by_gfn[PD][0]
    assert 0 not in page.children
    assert 1 in page.children


def test_the_third_write_floods_unless_a_fault_walks_through() -> None:
    made, vcpu = shadowed()
    write = (0x77 << 12 | TABLE).to_bytes(8, "little")

    def store() -> int:
        return made.emulated_store(vcpu, (PD << 12) + 0x800, write).moved.get("mmu_flooded", 0)

    assert [store(), store()] == [0, 0]
    made.load(vcpu, 0x60000)
    assert [store(), store(), store()] == [0, 0, 1]
    assert made.mmu.page_track.count(made.slot, PD) == 0


def test_a_leaf_table_is_never_flooded() -> None:
    made, vcpu = shadowed()
    for _ in range(5):
        moved = made.emulated_store(vcpu, (PT << 12) + 0x50 * 8, bytes(8)).moved
        assert "mmu_flooded" not in moved
        assert "mmu_pde_zapped" not in moved


def test_writes_anywhere_count_while_any_table_is_shadowed() -> None:
    made, vcpu = shadowed()
    assert made.emulated_store(vcpu, 0x90000, bytes(8)).moved == {"mmu_pte_write": 1}
    bare = ShadowGuest()
    assert bare.emulated_store(bare.vcpu(LONG, ROOT), 0x90000, bytes(8)).moved == {}


def test_a_write_that_a_write_std_makes_leaves_the_shadow_stale() -> None:
    made, vcpu = shadowed()
    assert vcpu.emulator_write(PD << 12, bytes(8), tracked=False)
    assert made.did().moved == {}
    assert made.load(vcpu, 0x50000).moved == {}


# --- CR0.WP = 0 (10.8) -------------------------------------------------------------------------------


def test_a_supervisor_write_with_wp_clear_maps_for_the_supervisor_only() -> None:
    made = ShadowGuest()
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, P | U | A | D)
    vcpu = made.vcpu(LONG._replace(cr0=LONG.cr0 & ~0x10000), ROOT)
    supervisor = 1
    assert made.access(vcpu, 0x50000, supervisor).moved["pf_fixed"] == 1
    spte = made.mmu.shadow.by_gfn[PT][0].spt[0x50]
    assert (spte & W, spte & U) == (W, 0)
    again = made.load(vcpu, 0x50000)
    assert (again.moved["pf_taken"], again.moved["pf_fixed"]) == (1, 1)
    spte = made.mmu.shadow.by_gfn[PT][0].spt[0x50]
    assert (spte & W, spte & U) == (0, U)


# --- the walk (13.3) ---------------------------------------------------------------------------------


def test_a_walk_that_faults_sets_no_a_flag() -> None:
    made, vcpu = fresh()
    made.entry(PT, 0x50, 0)
    found = made.load(vcpu, 0x50000)
    assert found.pushed == []
    assert found.fault is not None
    assert found.moved == {"pf_taken": 1, "pf_guest": 1}
    assert made.read(ROOT, 0) == PDPT << 12 | CLEAN


def test_tables_in_a_readonly_slot_keep_their_flags() -> None:
    made = ShadowGuest(flags=2)
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, CLEAN)
    vcpu = made.vcpu(LONG, ROOT)
    assert made.load(vcpu, 0x50000).pushed == []
    assert made.read(PT, 0x50) == 0x50 << 12 | CLEAN


def test_a_table_without_a_slot_is_not_present() -> None:
    made, vcpu = guest()
    made.entry(PD, 1, 0x40000 << 12 | TABLE)
    found = made.load(vcpu, 0x200000)
    assert found.fault is not None
    assert not found.fault.error & 1


def test_an_access_that_faults_for_ever_is_reported() -> None:
    """A slot that stays invalid: KVM waits for its change to end, which never happens here."""
    made, vcpu = guest()
    made.enter(vcpu)
    slot = made.mmu.memslots.set_region(1, 0, 0x8000 << 12, 4096, 0, memoryview(bytearray(4096)))
    assert slot is not None
    slot.flags |= INVALID
    made.entry(PT, 0x50, 0x8000 << 12 | PAGE)
    with pytest.raises(StuckGuestError):
        vcpu.translate(0x50000, STORE)
