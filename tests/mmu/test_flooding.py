"""Write flooding of a shadowed table (docs/reference/hosts.md B.3)."""

from __future__ import annotations

import pytest

from tests.mmu_rig import DATA, DATA_PT, PD, PDPT, PT, SHADOW, SPARE, TABLE, Host, Rig, hosts

pytestmark = hosts(*SHADOW)
FIXED = {"pf_taken": 1, "pf_fixed": 1}
EMULATED = {"pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1}
FLUSH = {"remote_tlb_flush_requests": 1}
FLOODED = EMULATED | {"mmu_shadow_zapped": 1, "mmu_flooded": 1} | FLUSH
SECOND = {
    (PDPT, 1): SPARE << 12 | TABLE,
    (SPARE, 0): DATA_PT << 12 | TABLE,
    (SPARE, 1): DATA_PT << 12 | TABLE,
}
"""A directory at 1 GiB that the store's own address does not need."""
THERE = 1 << 30
NEXT = THERE + (1 << 21)
UNUSED = 0x1F0


def flooding(shadow: Host) -> Rig:
    """The directory shadowed, and mapped where it is written; D is clear, so that reads do not dirty."""
    rig = Rig(shadow, entries=SECOND, leaf=TABLE)
    rig.prime(DATA)
    rig.load(THERE)
    rig.load(SPARE << 12)
    return rig


def test_the_third_write_zaps_and_the_fourth_is_plain(shadow: Host) -> None:
    """B.3: write 3 has mmu_shadow_zapped and mmu_flooded +1, write 4 pf_fixed, from 5 on they are free."""
    with flooding(shadow) as rig:
        moved = [rig.write_entry(SPARE, UNUSED + number, 0).moved for number in range(6)]
        assert moved == [EMULATED, EMULATED, FLOODED, FIXED, {}, {}]
        assert rig.dirty() == [PT, SPARE]  # PT for the D bit of the directory's own page


def test_the_next_access_through_it_shadows_it_again(shadow: Host) -> None:
    """B.3: mmu_cache_miss +1 and pf_spurious +1: the page table and its SPTEs are still there."""
    with flooding(shadow) as rig:
        for number in range(4):
            rig.write_entry(SPARE, UNUSED + number, 0)
        # Its frame was writable, and is protected for the new shadow page.
        again = rig.load(THERE)
        assert again.moved == {"pf_taken": 1, "pf_spurious": 1, "mmu_cache_miss": 1} | FLUSH
        assert rig.write_entry(SPARE, UNUSED, 0).moved == EMULATED


def test_a_fault_elsewhere_in_the_directory_resets_the_count(shadow: Host) -> None:
    """B.3: a walk that uses the shadow page in FNAME(fetch)."""
    with flooding(shadow) as rig:
        for number in range(2):
            rig.write_entry(SPARE, UNUSED + number, 0)
        assert rig.load(NEXT).moved.get("pf_taken") == 1
        moved = [rig.write_entry(SPARE, UNUSED + number, 0).moved for number in range(3)]
        assert moved == [EMULATED, EMULATED, FLOODED]


def test_an_access_without_a_fault_does_not(shadow: Host) -> None:
    """B.3."""
    with flooding(shadow) as rig:
        for number in range(2):
            rig.write_entry(SPARE, UNUSED + number, 0)
        assert rig.load(THERE).moved == {}
        assert rig.write_entry(SPARE, UNUSED, 0).moved == FLOODED


@pytest.mark.parametrize("count", [10, 20])
def test_many_writes_in_one_run(shadow: Host, count: int) -> None:
    """B.3: exactly 3 pf_emulate and 1 pf_fixed, however many."""
    loop = b"\x48\x89\x07\x48\x83\xc7\x08\x48\xff\xc9\x75\xf4"
    with flooding(shadow) as rig:
        seen = rig.run(loop, rdi=(SPARE << 12) + 0x800, rcx=count)  # mov [rdi], rax; add rdi, 8; dec rcx; jnz
        assert seen.moved == {
            "pf_taken": 4,
            "pf_emulate": 3,
            "pf_fixed": 1,
            "mmu_pte_write": 3,
            "mmu_shadow_zapped": 1,
            "mmu_flooded": 1,
            "remote_tlb_flush_requests": 1,
        }
        assert rig.vcpu.get_registers().rcx == 0


def test_a_directory_that_translates_its_own_address_does_not_flood(shadow: Host) -> None:
    """kvm-mmu.md 10.6: a tracked write clears the counts along the path of the faulting address."""
    with Rig(shadow, leaf=TABLE) as rig:
        rig.prime(DATA)
        rig.load(PD << 12)
        moved = [rig.write_entry(PD, UNUSED + number, 0).moved for number in range(8)]
        assert moved == [EMULATED] * 8
