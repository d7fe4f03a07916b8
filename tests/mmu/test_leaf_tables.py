"""A guest that writes its own leaf page tables: unsync shadow pages (docs/reference/hosts.md B.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pykvm.machine import SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from tests.mmu_rig import (
    DATA,
    DATA_PT,
    FRESH,
    INVLPG,
    LOAD_CR3,
    NOP,
    PAGE,
    PD,
    PDPT,
    PML4,
    SHADOW,
    SPARE,
    TABLE,
    Host,
    Rig,
    hosts,
)

pytestmark = hosts(*SHADOW)
VA, OTHER, NEW = DATA << 12, DATA + 1, DATA + 2
FIXED = {"pf_taken": 1, "pf_fixed": 1}
OLD_VALUE, NEW_VALUE = 0x0101, 0x0202


def unsynced(rig: Rig, flags: int = PAGE) -> None:
    """Map DATA, then let the guest point its entry at NEW: present to other frame."""
    rig.memory.write(VA, OLD_VALUE.to_bytes(8, "little"))
    rig.memory.write(NEW << 12, NEW_VALUE.to_bytes(8, "little"))
    rig.prime(DATA)
    seen = rig.write_entry(DATA_PT, 0, NEW << 12 | flags)
    assert seen.moved.get("mmu_unsync") == 1, seen.moved


def shown(rig: Rig) -> int:
    """What the guest reads where DATA was mapped."""
    rig.load(VA)
    value: int = rig.vcpu.get_registers().rax
    return value


def test_the_first_write_unsyncs_and_is_not_emulated(shadow: Host) -> None:
    """B.1: a fault, mmu_unsync +1, the page becomes writable; no mmu_pte_write.  Then no exits."""
    with Rig(shadow) as rig:
        rig.prime(DATA)
        first = rig.write_entry(DATA_PT, 5, 0)
        assert first.moved == FIXED | {"mmu_unsync": 1, "pages_4k": 1}
        assert rig.dirty() == [DATA_PT]
        assert rig.write_entry(DATA_PT, 6, 0).moved == FIXED
        assert rig.write_entry(DATA_PT, 7, 0).moved == {}


def test_a_table_shadowed_with_two_roles_unsyncs_twice(shadow: Host) -> None:
    """B.1: one for each shadow page of the gfn."""
    read_only = {(PD, 0x30): DATA_PT << 12 | TABLE & ~2}
    with Rig(shadow, entries=read_only) as rig:
        rig.prime(DATA)
        rig.load(0x30 << 21)
        seen = rig.write_entry(DATA_PT, 5, 0)
        assert seen.moved == FIXED | {"mmu_unsync": 2, "pages_4k": 1}


def test_an_entry_that_becomes_present_is_seen_at_once(shadow: Host) -> None:
    """B.1: the fault walks the guest's tables."""
    with Rig(shadow, entries={(DATA_PT, 0): 0}) as rig:
        rig.prime(OTHER)
        assert rig.load(VA).fault == (14, 4)
        rig.write_entry(DATA_PT, 0, NEW << 12 | PAGE)
        rig.memory.write(NEW << 12, NEW_VALUE.to_bytes(8, "little"))
        assert shown(rig) == NEW_VALUE


def test_an_entry_that_changes_its_frame_goes_on_as_it_was(shadow: Host) -> None:
    """B.1: the stale mapping keeps being used, until something synchronises."""
    with Rig(shadow) as rig:
        unsynced(rig)
        for _ in range(3):
            assert shown(rig) == OLD_VALUE


def test_a_write_through_a_read_only_stale_entry_walks_again(shadow: Host) -> None:
    """B.1: its D was clear, so the store faults, and goes to the new frame."""
    with Rig(shadow, entries={(DATA_PT, 0): VA | TABLE}) as rig:
        unsynced(rig, TABLE)
        assert shown(rig) == OLD_VALUE
        rig.store(VA, 0x77)
        assert (rig.value(DATA), rig.value(NEW)) == (OLD_VALUE, 0x77)
        assert rig.entry(DATA_PT, 0) == NEW << 12 | PAGE


def test_a_write_through_a_writable_stale_entry_goes_to_the_old_frame(shadow: Host) -> None:
    """B.1: no fault, so no walk."""
    with Rig(shadow, log=False) as rig:
        unsynced(rig)
        assert rig.store(VA, 0x77).moved == {}
        assert (rig.value(DATA), rig.value(NEW)) == (0x77, NEW_VALUE)


def test_a_write_after_the_log_was_fetched_walks_again(shadow: Host) -> None:
    """B.1: fetching the log protected the stale mapping, so the store faults, and goes to the new frame."""
    with Rig(shadow) as rig:
        unsynced(rig)
        # The SPTE of another frame is dropped first, with a flush (kvm-mmu.md 10.3).
        assert rig.store(VA, 0x77).moved == FIXED | {"remote_tlb_flush_requests": 1}
        assert (rig.value(DATA), rig.value(NEW)) == (OLD_VALUE, 0x77)


def test_a_fault_on_a_sibling_does_not_synchronise(shadow: Host) -> None:
    """B.1: other entries of the same table go their own way."""
    with Rig(shadow) as rig:
        unsynced(rig)
        rig.load(VA + 0x9000)
        assert shown(rig) == OLD_VALUE


def test_entering_again_with_equal_registers_does_not_synchronise(shadow: Host) -> None:
    """B.1: SET_REGS, SET_SREGS with equal values, re-entry."""
    with Rig(shadow) as rig:
        unsynced(rig)
        rig.vcpu.set_special_registers(rig.vcpu.get_special_registers())
        assert shown(rig) == OLD_VALUE


def test_a_fault_through_another_directory_entry_synchronises(shadow: Host) -> None:
    """B.1: the lookup of the unsync shadow page synchronises it; it stays unsync."""
    with Rig(shadow, entries={(PD, 0x30): DATA_PT << 12 | TABLE}) as rig:
        unsynced(rig)
        seen = rig.load((0x30 << 21) + 0x9000)
        assert "mmu_unsync" not in seen.moved
        assert shown(rig) == NEW_VALUE


def test_writing_the_same_directory_entry_again_synchronises(shadow: Host) -> None:
    """B.1: the write to the tracked table unlinks the shadow page, and linking it again looks it up."""
    with Rig(shadow) as rig:
        unsynced(rig)
        rig.write_entry(PD, DATA >> 9, DATA_PT << 12 | TABLE)
        assert shown(rig) == NEW_VALUE


def test_flooding_the_directory_synchronises(shadow: Host) -> None:
    """B.1 and B.3: the third write zaps the directory's shadow page.

    It is a directory that does not translate the address that it is written at: that one would not flood.
    """
    second = {(PDPT, 1): SPARE << 12 | TABLE, (SPARE, 0): DATA_PT << 12 | TABLE}
    with Rig(shadow, entries=second) as rig:
        rig.memory.write(VA, OLD_VALUE.to_bytes(8, "little"))
        rig.memory.write(NEW << 12, NEW_VALUE.to_bytes(8, "little"))
        rig.prime(1 << 18)
        rig.write_entry(DATA_PT, 0, NEW << 12 | PAGE)
        rig.load(1 << 30)
        assert rig.vcpu.get_registers().rax == OLD_VALUE
        zapped = [rig.write_entry(SPARE, index, 0).moved.get("mmu_shadow_zapped", 0) for index in range(5, 8)]
        assert zapped[:2] == [0, 0]
        # The directory, and where KVM zaps unsync descendants with it the page table (B.11, 3).
        assert zapped[2] == 1 + shadow.profile.zaps_unsync_children
        rig.load(1 << 30)
        assert rig.vcpu.get_registers().rax == NEW_VALUE


def _other_cr3(rig: Rig) -> None:
    special = rig.vcpu.get_special_registers()
    special.cr3 = (SPARE + 1) << 12
    rig.vcpu.set_special_registers(special)
    special.cr3 = PML4 << 12
    rig.vcpu.set_special_registers(special)


def _toggle(register: str, bit: int) -> Callable[[Rig], None]:
    def toggle(rig: Rig) -> None:
        special = rig.vcpu.get_special_registers()
        for _ in range(2):
            setattr(special, register, getattr(special, register) ^ bit)
            rig.vcpu.set_special_registers(special)

    return toggle


def _second_vcpu(rig: Rig) -> None:
    # The rig's one code page serves both: the second one runs the snippet that is there, an OUT.
    second: Any = rig.machine.create_vcpu()
    second.set_cpuid(rig.machine.supported_cpuid)
    rig.enter(second)
    first, rig.vcpu = rig.vcpu, second
    rig.run(b"")
    rig.vcpu = first


def _delete_a_slot(rig: Rig) -> None:
    memory = GuestMemory(PAGE_SIZE)
    rig.machine.create_slot(memory, 0x8000 << 12).delete()
    memory.close()


SYNCHRONISE: dict[str, Callable[[Rig], object]] = {
    "SET_SREGS with another CR3 and back": _other_cr3,
    "CR4.PGE toggled": _toggle("cr4", 1 << 7),
    "CR0.WP toggled": _toggle("cr0", 1 << 16),
    "a second vCPU that loads the root": _second_vcpu,
    "a slot deleted": _delete_a_slot,
}


@pytest.mark.parametrize("how", SYNCHRONISE)
def test_what_userspace_does_to_synchronise(shadow: Host, how: str) -> None:
    """B.1, resync from userspace; with another CR3 mmu_unsync goes down at the next run."""
    with Rig(shadow, entries={(SPARE + 1, 0): PDPT << 12 | TABLE}) as rig:
        unsynced(rig)
        SYNCHRONISE[how](rig)
        if how.startswith("SET_SREGS"):
            assert rig.run(b"").moved.get("mmu_unsync") == -1
        assert shown(rig) == NEW_VALUE


def test_another_value_of_cr3_from_the_guest(shadow: Host) -> None:
    """B.1: MOV to CR3 at CPL 0; kvm_pvm does it at the next entry, others at once (B.11, 4)."""
    with Rig(shadow) as rig:
        unsynced(rig)
        moved = rig.at_cpl0(LOAD_CR3, rax=PML4 << 12).moved
        moved.pop("pages_4k", None)
        assert moved.get("mmu_unsync", 0) == (0 if shadow.profile.lazy_cr3_sync else -1)
        assert shown(rig) == NEW_VALUE


def test_invlpg_drops_only_its_entry(shadow: Host) -> None:
    """B.1: pages_4k -1, then a fault; before 6.4 it fetches the entry anew, and nothing faults."""
    with Rig(shadow, leaf=TABLE) as rig:
        rig.prime(OTHER)
        unsynced(rig, TABLE)
        rig.write_entry(DATA_PT, 1, NEW << 12 | TABLE)
        rig.at_cpl0(NOP)
        seen = rig.at_cpl0(INVLPG, rdi=VA)
        assert seen.moved.get("invlpg") == 1
        refetched = shadow.profile.invlpg_refetches
        assert seen.moved.get("pages_4k", 0) == (0 if refetched else -1)
        again = rig.load(VA)
        # NEW is mapped one to one already: the reads before prefetched it, as its A is set (kvm-mmu.md 7.3).
        assert again.moved == ({} if refetched else FIXED | {"pages_4k": 1, "max_mmu_rmap_size": 1})
        assert rig.vcpu.get_registers().rax == NEW_VALUE
        assert rig.load(OTHER << 12).moved == {}
        assert rig.vcpu.get_registers().rax == 0


@pytest.mark.parametrize("first", [DATA, DATA + 80], ids=["present", "absent"])
def test_invlpg_before_6_4_dirties_what_it_fetches_anew(shadow: Host, first: int) -> None:
    """Where D is set the entry is mapped writable at once, and its page marked though nobody wrote it; later
    kernels drop the SPTE or leave it absent.  Measured on 6.1."""
    with Rig(shadow) as rig:
        rig.prime(first, DATA + 16, write=True)
        rig.write_entry(DATA_PT, 0, DATA + 40 << 12 | PAGE)
        rig.at_cpl0(NOP)
        rig.dirty()
        seen = rig.at_cpl0(INVLPG, rdi=VA)
        gone = -1 if first == DATA else 0
        refetched = shadow.profile.invlpg_refetches
        assert seen.moved.get("pages_4k", 0) == gone + refetched
        assert rig.dirty() == ([DATA + 40] if refetched else [])


def test_dropping_the_old_page_from_the_host_makes_the_next_access_walk(shadow: Host) -> None:
    """B.1: MADV_DONTNEED and the like; the SPTE goes, with a flush."""
    with Rig(shadow) as rig:
        unsynced(rig)
        moved = rig.measured(lambda: rig.memory.discard(VA, PAGE_SIZE))
        assert moved == {"pages_4k": -1, "remote_tlb_flush_requests": 1}
        assert shown(rig) == NEW_VALUE


def _toggle_logging(rig: Rig) -> None:
    rig.slot.set_flags(SlotFlags.NONE)
    rig.slot.set_flags(SlotFlags.LOG_DIRTY_PAGES)


def _create_a_slot(rig: Rig) -> None:
    rig.machine.create_slot(GuestMemory(PAGE_SIZE), 0x8000 << 12)


def _shrink(rig: Rig) -> None:
    rig.machine.set_nr_mmu_pages(64)


DO_NOT: dict[str, Callable[[Rig], object]] = {
    "GET_DIRTY_LOG": lambda rig: rig.collect(),
    "logging off and on": _toggle_logging,
    "a slot created": _create_a_slot,
    "SET_NR_MMU_PAGES(64)": _shrink,
    "INT3 to CPL 0": lambda rig: rig.run(b"\xcc"),
    "KVM_TRANSLATE": lambda rig: rig.vcpu.translate(VA),
}


@pytest.mark.parametrize("how", DO_NOT)
def test_what_does_not_synchronise(shadow: Host, how: str) -> None:
    """B.1, NOT resync."""
    with Rig(shadow) as rig:
        unsynced(rig)
        DO_NOT[how](rig)
        assert shown(rig) == OLD_VALUE


def test_translate_answers_from_the_guests_tables(shadow: Host) -> None:
    """B.1: KVM_TRANSLATE sees the new entry, sets its A bit and dirties the table."""
    with Rig(shadow) as rig:
        unsynced(rig, FRESH)
        rig.collect()
        assert rig.vcpu.translate(VA + 0x123) == (NEW << 12) + 0x123
        assert rig.entry(DATA_PT, 0) == NEW << 12 | FRESH | 0x20
        assert rig.dirty() == [DATA_PT]


def test_what_the_host_stores_into_a_table_is_invisible(shadow: Host) -> None:
    """B.1: while the table is in sync not even another CR3 shows it; an entry that was absent is seen."""
    with Rig(shadow, entries={(SPARE + 1, 0): PDPT << 12 | TABLE, (DATA_PT, 9): 0}) as rig:
        rig.memory.write(VA, OLD_VALUE.to_bytes(8, "little"))
        rig.memory.write(NEW << 12, NEW_VALUE.to_bytes(8, "little"))
        rig.prime(DATA)
        rig.put(DATA_PT, 0, NEW << 12 | PAGE)
        rig.put(DATA_PT, 9, NEW << 12 | PAGE)
        _other_cr3(rig)
        assert shown(rig) == OLD_VALUE
        assert rig.load(VA + 0x9000).fault is None
        assert rig.vcpu.get_registers().rax == NEW_VALUE


def test_a_table_that_maps_itself(shadow: Host) -> None:
    """B.1: an ordinary unsync: mmu_unsync +1, the table is dirty."""
    with Rig(shadow, entries={(DATA_PT, 0): DATA_PT << 12 | PAGE}) as rig:
        rig.prime(OTHER)
        seen = rig.store(VA + 5 * 8, 0)
        assert seen.moved == FIXED | {"mmu_unsync": 1, "pages_4k": 1}
        assert rig.dirty() == [DATA_PT]
