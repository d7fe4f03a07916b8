"""Several ways to one page: shared tables, roles, the recursive map (docs/reference/hosts.md B.5)."""

from __future__ import annotations

import pytest

from tests.mmu_rig import DATA, PD, PDPT, PML4, SHADOW, TABLE, Host, Rig, hosts

pytestmark = hosts(*SHADOW)
VA = DATA << 12
FIXED = {"pf_taken": 1, "pf_fixed": 1}
SPURIOUS = {"pf_taken": 1, "pf_spurious": 1}
READ_ONLY = TABLE & ~2


@pytest.mark.parametrize(
    ("entry", "address"),
    [((PML4, 5), 5 << 39), ((PDPT, 5), 5 << 30)],
    ids=["another PML4 entry", "another PDPT entry"],
)
def test_an_alias_by_a_shared_lower_table(shadow: Host, entry: tuple[int, int], address: int) -> None:
    """B.5: pf_spurious +1, the shadow pages below are shared."""
    target = PDPT if entry[0] == PML4 else PD
    with Rig(shadow, leaf=TABLE, entries={entry: target << 12 | TABLE}) as rig:
        rig.prime(DATA)
        assert rig.load(address + VA).moved == SPURIOUS
        assert rig.load(address + VA).moved == {}


def test_only_missing_levels_are_made(shadow: Host) -> None:
    """B.5: an alias to a page table that was not used yet is one cache miss."""
    with Rig(shadow, leaf=TABLE, entries={(PML4, 5): PDPT << 12 | TABLE}) as rig:
        rig.prime()
        seen = rig.load((5 << 39) + VA)
        assert seen.moved == FIXED | {"mmu_cache_miss": 1, "pages_4k": 8}


@pytest.mark.parametrize(
    ("entry", "address", "levels"),
    [((PD, 0x30), 0x30 << 21, 1), ((PDPT, 5), (5 << 30) + VA, 2), ((PML4, 5), (5 << 39) + VA, 3)],
    ids=["PD", "PDPT", "PML4"],
)
def test_less_access_makes_shadow_pages_of_its_own(
    shadow: Host, entry: tuple[int, int], address: int, levels: int
) -> None:
    """B.5: an entry with W=0 to the same table: role.access differs, +1 for each level."""
    target = {PD: 0x112, PDPT: PD, PML4: PDPT}[entry[0]]
    with Rig(shadow, leaf=TABLE, entries={entry: target << 12 | READ_ONLY}) as rig:
        rig.prime(DATA)
        moved = rig.load(address).moved
        assert moved.pop("max_mmu_rmap_size") == 1
        assert moved == FIXED | {"mmu_cache_miss": levels, "pages_4k": 8}
        assert rig.store(address).fault == (14, 7)


def test_the_recursive_map_shadows_the_pml4_at_every_level(shadow: Host) -> None:
    """B.5: mmu_cache_miss +3, and a write through it is emulated."""
    with Rig(shadow, leaf=TABLE, entries={(PML4, 0x1F0): PML4 << 12 | TABLE}) as rig:
        rig.prime()
        index = 0x1F0
        itself = 0xFFFF << 48 | index << 39 | index << 30 | index << 21 | index << 12
        seen = rig.load(itself)
        assert seen.moved.get("mmu_cache_miss") == 3
        assert rig.vcpu.get_registers().rax == PDPT << 12 | TABLE
        write = rig.store(itself + 0x80, 0)
        assert write.moved.get("pf_emulate") == 1
        assert write.moved.get("mmu_pte_write") == 1
        assert rig.entry(PML4, 0x10) == 0
