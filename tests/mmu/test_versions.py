"""Where vendors and versions of KVM differ (docs/reference/hosts.md B.10 and B.11)."""

from __future__ import annotations

import pytest

from tests.mmu_rig import (
    DATA,
    DATA_PT,
    FRESH,
    PDPT,
    PT,
    SHADOW,
    SPARE,
    TABLE,
    TSS,
    Host,
    Rig,
    hosts,
)

VA = DATA << 12
EMULATED = {"pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1}
FLUSH = {"remote_tlb_flush_requests": 1}


@hosts(*SHADOW)
def test_the_io_bitmap_sets_a_of_the_tss(shadow: Host) -> None:
    """B.10: OUT at CPL 3 makes kvm_pvm read the I/O bitmap: one entry more, the first time."""
    with Rig(shadow, leaf=FRESH, entries={(PT, TSS): TSS << 12 | FRESH}, ring=4096) as rig:
        extra = [PT] if shadow.profile.reads_io_bitmap else []
        assert rig.store(VA).pushed == [DATA_PT, DATA, *extra]
        assert rig.leaf(TSS) == (TABLE if extra else FRESH)
        assert rig.store(VA).pushed == []


@hosts(*SHADOW)
def test_an_io_bitmap_beyond_the_limit_forbids_all_ports(shadow: Host) -> None:
    """B.10: base FFFFh gives #GP where RFLAGS.IOPL is ignored at CPL 3."""
    if not shadow.profile.reads_io_bitmap:
        pytest.skip("RFLAGS.IOPL decides here, the bitmap is not looked at.")
    with Rig(shadow) as rig:
        rig.memory.write((TSS << 12) + 0x66, b"\xff\xff")
        assert rig.run(b"").fault == (13, 0)


@hosts(*SHADOW)
def test_synchronising_marks_what_it_rebuilds(shadow: Host) -> None:
    """B.11, 1: before 6.4 every present writable SPTE of the table is remade: marked again, and writable."""
    with Rig(shadow, entries={(SPARE, 0): PDPT << 12 | TABLE}) as rig:
        rig.prime(DATA, DATA + 1, DATA + 2, write=True)
        rig.write_entry(DATA_PT, 0x100, 0)
        assert rig.dirty() == [DATA_PT]
        rig.enter(rig.vcpu, cr3=SPARE << 12)
        rig.run(b"")
        rebuilds = shadow.profile.sync_rebuilds_all
        assert rig.dirty() == ([DATA, DATA + 1, DATA + 2] if rebuilds else [])


@hosts(*SHADOW)
def test_zapping_a_parent_with_unsync_children(shadow: Host) -> None:
    """B.11, 3: mainline zaps them with it (mmu_shadow_zapped +2, mmu_unsync -1), kvm_pvm does not."""
    entries = {(PDPT, 1): SPARE << 12 | TABLE, (SPARE, 0): DATA_PT << 12 | TABLE}
    with Rig(shadow, entries=entries) as rig:
        rig.prime(1 << 18)
        rig.load(SPARE << 12)
        assert rig.write_entry(DATA_PT, 7, 0).moved["mmu_unsync"] == 1
        seen = rig.store((SPARE << 12) + 0x803, 0, 2)
        moved = EMULATED | FLUSH | {"mmu_flooded": 1, "mmu_shadow_zapped": 1}
        if shadow.profile.zaps_unsync_children:
            moved |= {"mmu_shadow_zapped": 2, "mmu_unsync": -1, "pages_4k": -1}
        assert seen.moved == moved


@hosts(*SHADOW)
def test_the_statistic_of_shadow_pages(host: Host) -> None:
    """B.11, 5: mmu_shadow_pages exists since 7.2."""
    with host.system.create_machine() as machine:
        assert ("mmu_shadow_pages" in machine.statistics()) == host.profile.has_shadow_pages_statistic


@hosts(*SHADOW)
def test_the_flush_at_the_first_root(shadow: Host) -> None:
    """B.11, 7: tlb_flush is one lower in 6.1."""
    with Rig(shadow) as rig:
        assert rig.run(b"").other.get("tlb_flush", 0) == shadow.profile.flushes_first_root
