"""A guest's 2 MiB pages over the host's 4 KiB pages (docs/reference/hosts.md B.4)."""

from __future__ import annotations

from tests.mmu_rig import DATA, PD, SHADOW, Host, Rig, hosts

pytestmark = hosts(*SHADOW)
VA = DATA << 12
INDEX = DATA >> 9
PS = 0x80
CLEAN, DIRTY = 0x27 | PS, 0x67 | PS
FIXED = {"pf_taken": 1, "pf_fixed": 1}
FLUSH = {"remote_tlb_flush_requests": 1}


def large(shadow: Host, flags: int, *, log: bool = True, ring: int = 0) -> Rig:
    rig = Rig(shadow, entries={(PD, INDEX): VA | flags}, log=log, ring=ring)
    rig.prime()
    return rig


def test_a_direct_shadow_page_stands_below_the_entry(shadow: Host) -> None:
    """B.4: mmu_cache_miss +1; without logging 8 aligned SPTEs come at each fault."""
    with large(shadow, DIRTY, log=False) as rig:
        assert rig.load(VA + 0x3000).moved == FIXED | {"mmu_cache_miss": 1, "pages_4k": 8}
        assert rig.store(VA + 0x7000).moved == {}
        assert rig.store(VA + 0x8000).moved == FIXED | {"pages_4k": 8}


def test_with_logging_only_read_only_pages_come_along(shadow: Host) -> None:
    """B.4: +8 where D is clear and the access a read, +1 for a writable one."""
    with large(shadow, CLEAN) as rig:
        assert rig.load(VA + 0x3000).moved == FIXED | {"mmu_cache_miss": 1, "pages_4k": 8}
        assert rig.dirty() == []
    with large(shadow, DIRTY) as rig:
        assert rig.store(VA + 0x3000).moved == FIXED | {"mmu_cache_miss": 1, "pages_4k": 1}
        assert rig.dirty() == [DATA + 3]


def test_the_first_write_replaces_the_shadow_page(shadow: Host) -> None:
    """B.4: D of the entry is set, the direct page gets W access: another shadow page, and a flush; all 4 KiB
    pages that were mapped through the old one fault again."""
    with large(shadow, CLEAN, ring=4096) as rig:
        rig.load(VA)
        rig.load(VA + 0x9000)
        seen = rig.store(VA)
        assert seen.moved == FIXED | FLUSH | {"mmu_cache_miss": 1, "pages_4k": 1, "max_mmu_rmap_size": 1}
        assert seen.pushed == [PD, DATA]
        assert rig.entry(PD, INDEX) == VA | DIRTY
        assert rig.load(VA + 0x9000).moved == FIXED | {"pages_4k": 1}
        assert rig.load(VA + 0x1000).moved == FIXED | {"pages_4k": 1}


def test_a_read_of_any_page_dirties_it_where_d_is_set(shadow: Host) -> None:
    """B.4: with D=1 a read of any 4 KiB page dirties it."""
    with large(shadow, DIRTY) as rig:
        rig.load(VA + 0x5000)
        rig.load(VA + 0x123000)
        assert rig.dirty() == [DATA + 5, DATA + 0x123]
