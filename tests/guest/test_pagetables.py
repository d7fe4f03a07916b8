"""Page tables of every mode, walked by a little walker written from SDM vol. 3, chapter 4."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import UsageError
from pykvm.guest.boot import Arena
from pykvm.guest.pagetables import USER, PageTables, PagingMode
from pykvm.memory import GuestMemory
from pykvm.x86.bits import Pte

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
P, PS = 1, 1 << 7


def walk(memory: GuestMemory, mode: PagingMode, cr3: int, linear: int) -> tuple[int, int, int] | None:
    """(physical address, leaf entry, page size) or None where an entry is not present."""

    def entry(table: int, index: int, size: int) -> int:
        return int.from_bytes(memory.read(table + index * size, size), "little")

    mask = 0x000FFFFFFFFFF000
    if mode is PagingMode.LEGACY32:
        pde = entry(cr3, linear >> 22 & 0x3FF, 4)  # figure 4-2
        if not pde & P:
            return None
        if pde & PS:
            return (pde & 0xFFC00000) + (linear & 0x3FFFFF), pde, 4 * MIB
        pte = entry(pde & 0xFFFFF000, linear >> 12 & 0x3FF, 4)
        return ((pte & 0xFFFFF000) + (linear & 0xFFF), pte, 4 * KIB) if pte & P else None
    table = cr3
    if mode is PagingMode.PAE:
        pdpte = entry(cr3, linear >> 30 & 3, 8)
        assert pdpte & 0x1E6 == 0, "reserved bits of a PDPTE must be 0 (table 4-8)"
        if not pdpte & P:
            return None
        table = pdpte & mask
        shifts = [21, 12]
    else:
        shifts = [39, 30, 21, 12] if mode is PagingMode.LONG4 else [48, 39, 30, 21, 12]
    for shift in shifts:
        value = entry(table, linear >> shift & 0x1FF, 8)
        if not value & P:
            return None
        if shift == 12 or (value & PS and shift in {21, 30}):
            size = 1 << shift
            return (value & mask & -size) + (linear & size - 1), value, size
        assert not value & PS, "reserved in a PML4E and PML5E"
        table = value & mask
    raise AssertionError("the last level is a leaf")


def tables(mode: PagingMode, memory: GuestMemory) -> PageTables:
    return PageTables(mode, memory, Arena(0x100000, memory.size).take)


@pytest.fixture
def memory():
    with GuestMemory(8 * MIB) as made:
        yield made


SIZES = {
    PagingMode.LEGACY32: (4 * KIB, 4 * MIB),
    PagingMode.PAE: (4 * KIB, 2 * MIB),
    PagingMode.LONG4: (4 * KIB, 2 * MIB, GIB),
    PagingMode.LONG5: (4 * KIB, 2 * MIB, GIB),
}
CASES = [(mode, size) for mode, sizes in SIZES.items() for size in sizes]
HIGH = {
    PagingMode.LEGACY32: 0xC0000000,
    PagingMode.PAE: 0xC0000000,
    PagingMode.LONG4: 0xFFFF900000000000,
    PagingMode.LONG5: 0xFF10000000000000,
}


@pytest.mark.parametrize(("mode", "size"), CASES)
def test_mapped_addresses_translate_and_their_neighbours_do_not(mode, size, memory):
    page_tables = tables(mode, memory)
    linear = HIGH[mode] & -size
    physical = 0x40000000
    page_tables.map(linear, physical, 3 * size, page_size=size)
    for offset in (0, 1, size - 1, size, 3 * size - 1):
        found = walk(memory, mode, page_tables.cr3, linear + offset)
        assert found is not None
        assert found[0] == physical + offset
        assert found[2] == size
    assert walk(memory, mode, page_tables.cr3, linear - 1) is None
    assert walk(memory, mode, page_tables.cr3, linear + 3 * size) is None


@pytest.mark.parametrize(("mode", "size"), CASES)
@pytest.mark.parametrize("flags", [Pte.P, Pte.P | Pte.RW, USER, Pte.P | Pte.US | Pte.PCD | Pte.PWT | Pte.G])
def test_leaf_flags_are_the_chosen_ones(mode, size, flags, memory):
    page_tables = tables(mode, memory)
    page_tables.map(0, 0, size, page_size=size, flags=flags)
    found = walk(memory, mode, page_tables.cr3, 0)
    assert found is not None
    assert found[1] & 0xFFF == flags | (PS if size > 4 * KIB else 0)


def test_no_execute_reaches_the_entry(memory):
    page_tables = tables(PagingMode.LONG4, memory)
    page_tables.map(0x1000, 0x2000, 0x1000, flags=USER | Pte.NX)
    found = walk(memory, PagingMode.LONG4, page_tables.cr3, 0x1000)
    assert found is not None
    assert found[1] >> 63 == 1


def test_table_flags_apply_to_new_tables_only(memory):
    page_tables = tables(PagingMode.LONG4, memory)
    page_tables.map(0, 0, 0x1000, table_flags=Pte.P | Pte.RW)
    page_tables.map(0x1000, 0, 0x1000, table_flags=Pte.P | Pte.US)
    top = int.from_bytes(memory.read(page_tables.cr3, 8), "little")
    assert top & 0xFFF == Pte.P | Pte.RW


def test_range_over_several_tables_uses_each_once(memory):
    page_tables = tables(PagingMode.LONG4, memory)
    page_tables.map(GIB - 4 * KIB, 0, 8 * KIB)  # the last page of one PD, the first of the next
    assert len(page_tables.tables) == 1 + 1 + 2 + 2
    assert page_tables.tables[0] << 12 == page_tables.cr3
    assert len(set(page_tables.tables)) == 6
    for offset in (0, 0x1000):
        assert walk(memory, PagingMode.LONG4, page_tables.cr3, GIB - 4 * KIB + offset)[0] == offset


def test_one_tebibyte_with_2m_pages_takes_1027_tables(memory):
    page_tables = tables(PagingMode.LONG4, memory)
    page_tables.map(0, 0, 1 << 40, page_size=2 * MIB)
    assert len(page_tables.tables) == 1 + 2 + 1024
    assert walk(memory, PagingMode.LONG4, page_tables.cr3, (1 << 40) - 1)[0] == (1 << 40) - 1


def test_fresh_tables_are_zero_even_in_dirty_memory(memory):
    memory.write(0x100000, b"\xff" * 0x10000)
    page_tables = tables(PagingMode.LONG4, memory)
    page_tables.map(0, 0, 0x1000)
    assert walk(memory, PagingMode.LONG4, page_tables.cr3, 0x1000) is None


@pytest.mark.parametrize(("mode", "size"), CASES)
def test_entry_address_is_where_the_walk_ends(mode, size, memory):
    page_tables = tables(mode, memory)
    linear = HIGH[mode] & -size
    page_tables.map(linear, 0, size, page_size=size)
    at = page_tables.entry_address(linear, size)
    memory.write(at, bytes(4))
    assert walk(memory, mode, page_tables.cr3, linear) is None
    with pytest.raises(UsageError):
        tables(mode, memory).entry_address(linear, 4 * KIB)


LONG4, LEGACY, PAE, LONG5 = PagingMode.LONG4, PagingMode.LEGACY32, PagingMode.PAE, PagingMode.LONG5


@pytest.mark.parametrize(
    ("mode", "linear", "physical", "size", "page_size"),
    [
        (LONG4, 1, 0, 4096, 4096),
        (LONG4, 0, 1, 4096, 4096),
        (LONG4, 0, 0, 1, 4096),
        (LONG4, 0, 0, 0, 4096),
        (LONG4, 0, 0, -4096, 4096),
        (LONG4, -4096, 0, 4096, 4096),
        (LONG4, 0, -4096, 4096, 4096),
        (LONG4, 4096, 0, 2 * MIB, 2 * MIB),
        (LONG4, 0, 0, 4 * MIB, 4 * MIB),
        (LEGACY, 0, 0, 2 * MIB, 2 * MIB),
        (PAE, 0, 0, GIB, GIB),
        (LEGACY, 1 << 32, 0, 4096, 4096),
        (LEGACY, 0, 1 << 32, 4096, 4096),
        (PAE, 0xFFFFF000, 0, 8192, 4096),
        (LONG4, 1 << 47, 0, 4096, 4096),
        (LONG4, (1 << 47) - 4096, 0, 8192, 4096),
        (LONG4, (1 << 64) - 4096, 0, 8192, 4096),
        (LONG5, 1 << 56, 0, 4096, 4096),
        (LONG4, 0, 1 << 52, 4096, 4096),
    ],
)
def test_bad_mappings_are_refused(mode, linear, physical, size, page_size, memory):
    with pytest.raises(UsageError):
        tables(mode, memory).map(linear, physical, size, page_size=page_size)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 4096, 4096), (0, 4096, 4096)),
        ((0, 2 * MIB, 2 * MIB), (4096, 4096, 4096)),
        ((4096, 4096, 4096), (0, 2 * MIB, 2 * MIB)),
        ((0, 8192, 4096), (4096, 8192, 4096)),
    ],
)
def test_mapping_twice_is_refused(first, second, memory):
    page_tables = tables(PagingMode.LONG4, memory)
    linear, size, page_size = first
    page_tables.map(linear, 0, size, page_size=page_size)
    linear, size, page_size = second
    with pytest.raises(UsageError, match="already mapped"):
        page_tables.map(linear, 0, size, page_size=page_size)


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(list(PagingMode)),
    pages=st.dictionaries(st.integers(0, 0xFFFFF), st.integers(0, 0xFFFFF), min_size=1, max_size=12),
)
def test_any_set_of_pages_translates(mode, pages):
    with GuestMemory(1 * MIB) as memory:
        page_tables = PageTables(mode, memory, Arena(0, memory.size).take)
        for linear, physical in pages.items():
            page_tables.map(linear << 12, physical << 12, 4096)
        for linear, physical in pages.items():
            found = walk(memory, mode, page_tables.cr3, linear << 12)
            assert found is not None
            assert found[0] == physical << 12


def test_kvm_translates_as_the_tables_say(vm):
    """KVM's own walker (KVM_TRANSLATE, api.rst 4.15) on 4 KiB and 2 MiB pages in long mode."""
    from pykvm.guest.boot import BootMode, boot_state

    with GuestMemory(8 * MIB) as memory:
        vm.create_slot(memory, 0)
        page_tables = tables(PagingMode.LONG4, memory)
        page_tables.map(0x7000_0000_0000, 0x3000, 0x2000)
        page_tables.map(0x40000000, 2 * MIB, 4 * MIB, page_size=2 * MIB)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(vm.supported_cpuid)
        boot_state(BootMode.LONG, entry=0, stack=0, cr3=page_tables.cr3).apply(vcpu)
        for linear in (0x7000_0000_0000, 0x7000_0000_1FFF, 0x40000000, 0x403FFFFF):
            expected = walk(memory, PagingMode.LONG4, page_tables.cr3, linear)
            assert expected is not None
            assert vcpu.translate(linear) == expected[0]
        for linear in (0x7000_0000_2000, 0x40400000, 0):
            assert vcpu.translate(linear) is None
