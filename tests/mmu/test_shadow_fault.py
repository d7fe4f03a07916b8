"""Anatomy of a shadow page fault (docs/reference/hosts.md B.0)."""

from __future__ import annotations

import pytest

from tests.mmu_rig import (
    CODE,
    DATA,
    DATA_PT,
    FRESH,
    PAGE,
    PD,
    PDPT,
    PML4,
    PT,
    SHADOW,
    TABLE,
    Host,
    Rig,
    hosts,
)

pytestmark = hosts(*SHADOW)
VA = DATA << 12
FIXED = {"pf_taken": 1, "pf_fixed": 1}
FIRST = {"mmu_cache_miss": 5, "pages_4k": 2, "pf_taken": 2, "pf_fixed": 2}
"""Two faults, the code's and the data's: root, PDPT, PD and two page tables; two pages."""


def test_the_first_store_pushes_tables_top_down_and_then_the_page(shadow: Host) -> None:
    """B.0: ring 2 100 101 102 | 101 112 2000; the code page is not dirty, since its D is clear."""
    with Rig(shadow, upper=FRESH, leaf=FRESH, code=FRESH, ring=4096) as rig:
        seen = rig.store(VA)
        assert seen.pushed == [PML4, PDPT, PD, PT, PD, DATA_PT, DATA]
        assert seen.moved == FIRST
        assert rig.leaf(CODE) == FRESH | 0x20
        assert rig.leaf(DATA) == FRESH | 0x60
        assert rig.entry(PD, 0) & 0xFFF == rig.entry(PD, 0x10) & 0xFFF == FRESH | 0x20
        assert rig.entry(PD, 1) & 0xFFF == FRESH


def test_the_same_into_the_bitmap(shadow: Host) -> None:
    """B.0: each page once."""
    with Rig(shadow, upper=FRESH, leaf=FRESH, code=FRESH) as rig:
        assert rig.store(VA).moved == FIRST
        assert rig.dirty() == [PML4, PDPT, PD, PT, DATA_PT, DATA]


def test_with_a_and_d_set_only_the_page_is_dirty(shadow: Host) -> None:
    """B.0: one mark per table entry that changed, and none did."""
    with Rig(shadow, ring=4096) as rig:
        seen = rig.store(VA)
        assert seen.pushed == [DATA]
        assert seen.moved == FIRST


def test_a_read_then_a_write_are_two_faults_and_dirty_the_table_twice(shadow: Host) -> None:
    """B.0: the read sets A and maps read-only (protect_clean_gpte), the write sets D."""
    with Rig(shadow, leaf=FRESH, ring=4096) as rig:
        rig.prime()
        read = rig.load(VA)
        assert read.pushed == [DATA_PT]
        assert read.moved == {"mmu_cache_miss": 1, "pages_4k": 1} | FIXED
        write = rig.store(VA)
        assert write.pushed == [DATA_PT, DATA]
        assert write.moved == FIXED


@pytest.mark.parametrize(
    ("flags", "dirty"), [(0x47, [DATA_PT, DATA]), (PAGE, [DATA]), (TABLE, []), (FRESH, [DATA_PT])]
)
def test_a_read_dirties_the_page_where_d_is_set_already(shadow: Host, flags: int, dirty: list[int]) -> None:
    """B.0: the fault of a read makes a writable SPTE of it, and make_spte marks."""
    with Rig(shadow, entries={(DATA_PT, 0): VA | flags}, ring=4096) as rig:
        rig.prime()
        seen = rig.load(VA)
        assert seen.pushed == dirty
        assert seen.moved == {"mmu_cache_miss": 1, "pages_4k": 1} | FIXED


def test_a_fetch_dirties_the_page_where_d_is_set_already(shadow: Host) -> None:
    """B.0 applies to instruction fetches, too."""
    with Rig(shadow, code=PAGE, ring=4096) as rig:
        assert rig.run(b"").pushed == [CODE]


def test_pages_that_are_mapped_cost_nothing_until_they_are_collected(shadow: Host) -> None:
    """B.0: no exits and no marks; after GET_DIRTY_LOG the first write of each is one fault."""
    with Rig(shadow) as rig:
        rig.prime(DATA, DATA + 1, write=True)
        for gfn in (DATA, DATA + 1):
            assert rig.store(gfn << 12).moved == FIXED
            assert rig.store(gfn << 12).moved == {}
            assert rig.load(gfn << 12).moved == {}
        assert rig.dirty() == [DATA, DATA + 1]
        assert rig.load(VA).moved == {}
        assert rig.dirty() == []


@pytest.mark.parametrize("ring", [0, 4096], ids=["bitmap", "ring"])
def test_collecting_asks_for_a_flush_where_something_was_protected(shadow: Host, ring: int) -> None:
    """B.0: remote_tlb_flush_requests +1 for each GET or RESET that found a page, then tlb_flush +1."""
    with Rig(shadow, ring=ring) as rig:
        rig.prime(DATA, write=True)
        assert rig.run(b"").other.get("tlb_flush") == 1
        assert rig.run(b"").other.get("tlb_flush") is None
        assert rig.measured(rig.collect) == {}
        assert rig.run(b"").other.get("tlb_flush") is None
        rig.store(VA)
        assert rig.measured(rig.collect) == {"remote_tlb_flush_requests": 1}
        assert rig.run(b"").other.get("tlb_flush") == 1


def test_each_new_shadow_page_is_a_cache_miss(shadow: Host) -> None:
    """B.0: four for root to page table, one for another page table; pages_4k for each page."""
    with Rig(shadow) as rig:
        assert rig.run(b"").moved == {"mmu_cache_miss": 4, "pages_4k": 1} | FIXED
        assert rig.load(VA).moved == {"mmu_cache_miss": 1, "pages_4k": 1} | FIXED
        assert rig.load(VA + 0x1000).moved == {"pages_4k": 1} | FIXED


def test_a_walk_that_fails_sets_no_a_bit_at_any_level(shadow: Host) -> None:
    """B.0 and E: only the entries of a whole walk are updated; the exception writes the stack of CPL 0."""
    for flags, error in ((0, 4), (0x03, 5), (0x05, None)):
        with Rig(
            shadow, upper=FRESH, leaf=FRESH, code=FRESH, entries={(DATA_PT, 0): flags and VA | flags}
        ) as rig:
            seen = rig.load(VA) if error is not None else rig.store(VA)
            assert seen.fault == (14, 7 if error is None else error)
            assert seen.moved.get("pf_guest") == 1
            assert rig.entry(PD, 0x10) & 0xFFF == FRESH
            assert rig.leaf(DATA) == flags
            assert DATA_PT not in rig.dirty()
