"""A guest that writes its own upper page tables: they are write-tracked (docs/reference/hosts.md B.2)."""

from __future__ import annotations

import pytest

from tests.mmu_rig import (
    DATA,
    DATA_PT,
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
VA = DATA << 12
FIXED = {"pf_taken": 1, "pf_fixed": 1}
EMULATED = {"pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1}
FLUSH = {"remote_tlb_flush_requests": 1}
INDEX = DATA >> 9
UNUSED = 0x1F0


@pytest.mark.parametrize(
    ("gfn", "name"), [(PD, "PD"), (PDPT, "PDPT"), (PML4, "PML4")], ids=["PD", "PDPT", "PML4"]
)
def test_a_write_is_emulated_and_dirties_the_table(shadow: Host, gfn: int, name: str) -> None:
    """B.2: pf_taken +1, pf_emulate +1, mmu_pte_write +1; zero gives no mmu_pde_zapped, another value does."""
    with Rig(shadow) as rig:
        rig.prime(DATA)
        rig.load(gfn << 12)
        assert rig.write_entry(gfn, UNUSED, 0).moved == EMULATED
        assert rig.dirty() == [gfn]
        seen = rig.write_entry(gfn, UNUSED, SPARE << 12 | TABLE)
        assert seen.moved == EMULATED | {"mmu_pde_zapped": 1}
        assert rig.dirty() == [gfn]
        assert rig.entry(gfn, UNUSED) == SPARE << 12 | TABLE


def test_the_first_access_maps_the_table_read_only_and_emulates(shadow: Host) -> None:
    """B.2: one fault for both."""
    with Rig(shadow) as rig:
        rig.prime(DATA)
        assert rig.write_entry(PD, UNUSED, 0).moved == EMULATED | {"pages_4k": 1}


def test_the_new_mapping_is_visible_at_once_and_siblings_stay(shadow: Host) -> None:
    """B.2: the written entry's SPTE is zapped, with a flush; nothing else is."""
    with Rig(shadow, entries={(SPARE, 0): (DATA + 7) << 12 | TABLE}) as rig:
        rig.memory.write((DATA + 7) << 12, b"\x77")
        rig.prime(DATA, DATA + 0x200)
        rig.load(PD << 12)
        seen = rig.write_entry(PD, INDEX, SPARE << 12 | TABLE)
        assert seen.moved == EMULATED | FLUSH | {"mmu_pde_zapped": 1}
        assert rig.load(VA).moved == FIXED | {"mmu_cache_miss": 1, "pages_4k": 1}
        assert rig.vcpu.get_registers().rax == 0x77
        assert rig.load(VA + (0x200 << 12)).moved == {}


def test_a_flush_is_due_only_where_an_entry_was_present(shadow: Host) -> None:
    """B.2: writing zero over a linked entry flushes but counts no mmu_pde_zapped."""
    with Rig(shadow) as rig:
        rig.prime(DATA)
        rig.load(PD << 12)
        assert rig.write_entry(PD, INDEX, 0).moved == EMULATED | FLUSH
        assert rig.write_entry(PD, INDEX, 0).moved == EMULATED
        assert rig.write_entry(PD, INDEX, DATA_PT << 12 | TABLE).moved == EMULATED | {"mmu_pde_zapped": 1}


def test_an_entry_whose_table_is_shadowed_already_is_only_linked(shadow: Host) -> None:
    """B.2: pf_spurious +1, no cache miss."""
    with Rig(shadow, leaf=TABLE) as rig:
        rig.prime(DATA)
        rig.load(PD << 12)
        rig.write_entry(PD, INDEX, DATA_PT << 12 | TABLE)
        assert rig.load(VA).moved == {"pf_taken": 1, "pf_spurious": 1}
        assert rig.load(VA).moved == {}


_SECOND = {(PDPT, 1): SPARE << 12 | TABLE, (SPARE, 0): DATA_PT << 12 | TABLE}


def _target(rig: Rig) -> int:
    """A directory that the instruction's own address does not need, shadowed and mapped."""
    rig.prime(DATA)
    rig.load(1 << 30)
    rig.load(SPARE << 12)
    rig.collect()
    return (SPARE << 12) + 0x200


# --- the size and offset matrix --------------------------------------------------------------------


def _as_8_bytes(size: int, offset: int) -> bool:
    """Whether the row says that the write hits entries and zaps no shadow page."""
    return (size == 1 and offset % 8 == 0) or size == 4 or (size == 8 and offset % 8 == 0)


@pytest.mark.parametrize(
    ("size", "offset"),
    [(size, offset) for size in (1, 2, 4, 8) for offset in (*range(9), 12) if not (size == 8 and offset > 8)],
    ids=lambda value: str(value),
)
def test_size_and_offset_of_the_write(shadow: Host, size: int, offset: int) -> None:
    """B.2, size/offset matrix of 8-byte entries, into an entry that is not linked, with 1 in its byte 0.

    1 byte at an entry: normal.  4 bytes anywhere: as 8 at the entry below.  Else the shadow page is zapped at
    once, mmu_shadow_zapped and mmu_flooded +1.  mmu_pde_zapped where 4 or 8 bytes leave the entry not zero.
    """
    with Rig(shadow, entries=_SECOND) as rig:
        _target(rig)
        seen = rig.store((SPARE << 12) + UNUSED * 8 + offset, 0x0101010101010101, size)
        expected = EMULATED
        if not _as_8_bytes(size, offset):
            expected = expected | {"mmu_shadow_zapped": 1, "mmu_flooded": 1} | FLUSH
        elif size >= 4:
            expected = expected | {"mmu_pde_zapped": 1}
        assert seen.moved == expected
        assert rig.dirty() == [SPARE]


def test_a_4_byte_write_across_two_entries_leaves_the_second_alone(shadow: Host) -> None:
    """B.2: KVM's quirk: the second entry of a straddling 4-byte write is not zapped."""
    entries = {
        (PDPT, 1): SPARE << 12 | TABLE,
        (SPARE, 0): DATA_PT << 12 | TABLE,
        (SPARE, 1): DATA_PT << 12 | TABLE,
    }
    with Rig(shadow, entries=entries) as rig:
        rig.prime(DATA)
        rig.load(1 << 30)
        rig.load((1 << 30) + (1 << 21))
        rig.load(SPARE << 12)
        seen = rig.store((SPARE << 12) + 6, 0, 4)
        assert seen.moved == EMULATED | FLUSH | {"mmu_pde_zapped": 1}
        assert rig.entry(SPARE, 1) == DATA_PT << 12 & ~0xFFFF
        # The second entry is not present any more, and still translates: its SPTE was left alone.
        assert rig.load((1 << 30) + (1 << 21)).moved == {}
        assert rig.load(1 << 30).fault is None


# --- the class of the instruction ------------------------------------------------------------------


EMULATES = {
    "mov": "488907",
    "mov immediate": "48c70700000000",
    "mov moffs": "48a3{at}",
    "xchg": "488707",
    "cmpxchg that succeeds": "480fb10f",
    "lock cmpxchg that fails": "48ffc0 f0480fb10f",
    "cmpxchg8b": "0fc70f",
    "or": "480907",
    "and": "482107",
    "bts": "480fba2f00",
    "btc": "480fba3f00",
}
"""Instructions with the emulator's PageTable flag; rax, rbx, rcx and rdx are zero."""
UNPROTECTS = {
    "movups": "0f1107",
    "movnti": "480fc307",
    "push": "488d670850",
    "stos": "48ab",
    "movs": "48a5",
    "add": "480107",
    "inc": "48ff07",
    "xadd": "480fc107",
    "btr": "480fba3700",
    "fxsave": "0fae07",
    "cmpxchg16b": "480fc70f",
    "vmovups": "c5f81107",
}


@pytest.mark.parametrize("name", EMULATES)
def test_instructions_that_are_emulated(shadow: Host, name: str) -> None:
    """B.2: mov, xchg, cmpxchg, cmpxchg8b, or/and with memory, bts, btc."""
    with Rig(shadow, entries=_SECOND) as rig:
        at = _target(rig)
        code = bytes.fromhex(EMULATES[name].replace("{at}", at.to_bytes(8, "little").hex()))
        seen = rig.run(code, rdi=at)
        expected = EMULATED
        if name in ("bts", "btc"):
            expected = expected | {"mmu_pde_zapped": 1}
        assert seen.moved == expected
        assert seen.other["insn_emulation"] == 1 + shadow.profile.emulates_all_but_user
        assert rig.dirty() == [SPARE]


@pytest.mark.parametrize("name", UNPROTECTS)
def test_instructions_after_which_the_table_is_not_tracked_any_more(shadow: Host, name: str) -> None:
    """B.2: all others: mmu_shadow_zapped +1, pf_emulate +1, pf_fixed +1 on retry, no mmu_pte_write."""
    with Rig(shadow, entries=_SECOND) as rig:
        at = _target(rig)
        if name == "vmovups" and not (shadow.kvm and shadow.profile.emulates_all_but_user):
            pytest.skip("AVX needs XCR0 in the guest, except under kvm_pvm (hosts.md C.1).")
        seen = rig.run(bytes.fromhex(UNPROTECTS[name]), rdi=at, rsi=VA)
        assert seen.moved == {"mmu_shadow_zapped": 1, "pf_taken": 2, "pf_emulate": 1, "pf_fixed": 1} | FLUSH
        assert rig.store(at).moved == {}
        assert rig.dirty() == [SPARE]


def test_a_table_that_is_used_at_two_levels_stays_tracked(shadow: Host) -> None:
    """B.2, dual role: as a directory and as a page table; the SPTEs of both are handled."""
    entries = {
        (PDPT, 1): SPARE << 12 | TABLE,
        (PD, 0x30): SPARE << 12 | TABLE,
        (SPARE, 0): DATA_PT << 12 | PAGE,
    }
    with Rig(shadow, entries=entries) as rig:
        rig.prime(DATA)
        rig.load(1 << 30)
        rig.load(0x30 << 21)
        rig.load(SPARE << 12)
        before = rig.run(b"")
        assert before.moved == {}
        seen = rig.write_entry(SPARE, 0, DATA_PT << 12 | PAGE)
        assert seen.moved == EMULATED | FLUSH | {"mmu_pde_zapped": 1, "pages_4k": -1}
        assert rig.load(0x30 << 21).moved == FIXED | {"pages_4k": 1}
        assert rig.load(1 << 30).moved == _again(shadow)


def test_rebuilding_a_writable_entry(shadow: Host) -> None:
    """Up to 6.12 the SPTE loses D over that, so the fault is not spurious and asks for a flush."""
    with Rig(shadow, entries=_SECOND) as rig:
        rig.prime()
        rig.load(1 << 30)
        rig.write_entry(SPARE, 0, DATA_PT << 12 | TABLE)
        assert rig.load(1 << 30).moved == _again(shadow)
        rig.write_entry(SPARE, 0, DATA_PT << 12 | TABLE)
        # Now it has no D to lose.
        assert rig.load(1 << 30).moved == {"pf_taken": 1, "pf_spurious": 1}


def _again(shadow: Host) -> dict[str, int]:
    """A read fault of a page that is mapped writable already."""
    if shadow.profile.flushes_on_ad_clear:
        return FIXED | FLUSH
    return {"pf_taken": 1, "pf_spurious": 1}


def test_clearing_a_in_a_directory_entry(shadow: Host) -> None:
    """B.2: the next walk sets it again, and the directory is dirty."""
    with Rig(shadow, leaf=TABLE, ring=4096) as rig:
        rig.prime(DATA)
        rig.load(PD << 12)
        rig.write_entry(PD, INDEX, DATA_PT << 12 | 7)
        assert rig.load(VA).pushed == [PD]
        assert rig.entry(PD, INDEX) == DATA_PT << 12 | TABLE


def test_clearing_a_and_d_in_a_leaf_entry(shadow: Host) -> None:
    """B.2: not seen until the next walk: a read through the stale SPTE leaves A clear, a fault sets both."""
    with Rig(shadow) as rig:
        rig.prime(DATA, write=True)
        rig.write_entry(DATA_PT, 0, VA | 7)
        rig.load(VA)
        assert rig.leaf(DATA) == 7
        assert rig.store(VA).moved == FIXED
        assert rig.leaf(DATA) == PAGE
