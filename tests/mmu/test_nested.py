"""The TDP MMU under nested paging, in contrast (docs/reference/hosts.md B.9)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.mmu_rig import (
    CODE,
    DATA,
    DATA_PT,
    FRESH,
    GDT,
    HANDLERS,
    IDT,
    KERNEL_STACK,
    NPT,
    PAGE,
    PD,
    PDPT,
    PML4,
    PT,
    TABLE,
    TSS,
    Host,
    Rig,
    Seen,
    hosts,
)

pytestmark = hosts(*NPT, "intel-ept-nopml 6.12")
VA = DATA << 12
PATH = [PML4, PDPT, PD, PT]


@pytest.fixture
def npt(nested: Host) -> Host:
    if not nested.profile.walks_write_tables:
        pytest.skip("The row is about walks that count as writes: NPT, or EPT with A/D bits.")
    return nested


@pytest.mark.parametrize("flags", [FRESH, PAGE], ids=["A and D clear", "A and D set"])
def test_the_first_store(npt: Host, flags: int) -> None:
    """B.9: 2 100 101 102 1 112 2000: each table, the code page, and no counters of the shadow MMU."""
    with Rig(npt, upper=flags & TABLE, leaf=flags, code=flags, ring=4096) as rig:
        seen = rig.store(VA)
        assert seen.pushed == [*PATH, CODE, DATA_PT, DATA]
        assert seen.moved == {"pf_taken": 7, "pf_fixed": 7, "pages_4k": 7}


def test_after_a_harvest_every_table_on_the_path_is_dirty_again(npt: Host) -> None:
    """B.9: by any access, even by computing; pf_fast for each write-protect fault."""
    with Rig(npt, ring=4096) as rig:
        rig.store(VA)
        rig.collect()
        steps: tuple[tuple[Callable[[], Seen], list[int]], ...] = (
            (lambda: rig.run(b"\x48\xff\xc0"), PATH),
            (lambda: rig.load(VA), [*PATH, DATA_PT]),
            (lambda: rig.store(VA), [*PATH, DATA_PT, DATA]),
        )
        for run, path in steps:
            seen = run()
            assert seen.pushed == path
            count = len(path)
            assert seen.moved == {"pf_taken": count, "pf_fixed": count, "pf_fast": count}
            assert rig.collect() == path


def test_reads_map_pages_writable_and_dirty_them(npt: Host) -> None:
    """B.9: any read or fetch of a host-writable page, whatever the guest's D."""
    with Rig(npt, leaf=TABLE, ring=4096) as rig:
        rig.run(b"")
        seen = rig.load(VA)
        assert seen.pushed == [DATA_PT, DATA]
        assert rig.store(VA).pushed == []


def test_exceptions_dirty_what_delivering_them_reads(npt: Host) -> None:
    """B.9: IDT, GDT, TSS and stack."""
    with Rig(npt, entries={(DATA_PT, 0): 0}) as rig:
        rig.run(b"")
        rig.collect()
        assert rig.load(VA).fault == (14, 4)
        assert {IDT, GDT, TSS, KERNEL_STACK, HANDLERS} <= set(rig.dirty())


def test_the_guests_tables_are_pages_like_others(npt: Host) -> None:
    """B.9: no unsync, no emulation, no flooding."""
    with Rig(npt) as rig:
        rig.store(VA)
        for gfn in (DATA_PT, PD, PDPT, PML4):
            for index in range(0x1F0, 0x1F6):
                moved = rig.write_entry(gfn, index, 0).moved
                assert {name for name in moved if name.startswith("mmu")} == set()
                assert "pf_emulate" not in moved
