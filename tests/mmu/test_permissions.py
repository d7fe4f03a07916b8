"""Permissions and A/D of a leaf entry, access by access (docs/reference/hosts.md B.8)."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from pykvm.x86.cpuid import CpuidEntry
from tests.mmu_rig import (
    DATA,
    DATA_PT,
    DONE,
    FETCH,
    FRESH,
    KERNEL_STACK,
    PAGE,
    PDPT,
    SHADOW,
    TABLE,
    Host,
    Rig,
    hosts,
)

pytestmark = hosts(*SHADOW)
VA = DATA << 12
FIXED = {"pf_taken": 1, "pf_fixed": 1}
GUEST = {"pf_taken": 1, "pf_guest": 1}
NX = 1 << 63


class Row(NamedTuple):
    """What a read and then a write of the page do: the error code or None, the flags that the entry has
    afterwards, and what is dirty."""

    read: int | None
    after_read: int
    read_dirty: tuple[int, ...]
    write: int | None
    after_write: int
    write_dirty: tuple[int, ...]


BOTH = (DATA_PT, DATA)
ROWS = {
    0x05: Row(None, 0x25, (DATA_PT,), 7, 0x25, ()),
    0x07: Row(None, 0x27, (DATA_PT,), None, 0x67, BOTH),
    0x03: Row(5, 0x03, (), 7, 0x03, ()),
    0x01: Row(5, 0x01, (), 7, 0x01, ()),
    0x25: Row(None, 0x25, (), 7, 0x25, ()),
    0x65: Row(None, 0x65, (), 7, 0x65, ()),
    0x27: Row(None, 0x27, (), None, 0x67, BOTH),
    0x47: Row(None, 0x67, BOTH, None, 0x67, (DATA,)),
    0x67: Row(None, 0x67, (DATA,), None, 0x67, (DATA,)),
    NX | 0x07: Row(None, NX | 0x27, (DATA_PT,), None, NX | 0x67, BOTH),
    0x107: Row(None, 0x127, (DATA_PT,), None, 0x167, BOTH),
    0x17: Row(None, 0x37, (DATA_PT,), None, 0x77, BOTH),
    0x0F: Row(None, 0x2F, (DATA_PT,), None, 0x6F, BOTH),
}
"""By the flags of the entry: the table of B.8."""


def one(shadow: Host, flags: int) -> Rig:
    """DATA mapped with ``flags``; another page of the table has been read, so that its shadow page exists."""
    rig = Rig(shadow, entries={(DATA_PT, 0): VA | flags})
    rig.prime(DATA + 0x100)
    return rig


def _expected(error: int | None, dirty: tuple[int, ...]) -> tuple[tuple[int, int] | None, list[int]]:
    """The exception, and what is dirty: with one, also the stack of CPL 0 that it is delivered on."""
    return (None, list(dirty)) if error is None else ((14, error), [KERNEL_STACK, *dirty])


@pytest.mark.parametrize("flags", ROWS, ids=lambda flags: f"{flags:x}")
def test_flags_of_the_entry(shadow: Host, flags: int) -> None:
    """B.8, a read and then a write."""
    row = ROWS[flags]
    with one(shadow, flags) as rig:
        for seen, error, after, dirty in (
            (rig.load(VA), row.read, row.after_read, row.read_dirty),
            (None, row.write, row.after_write, row.write_dirty),
        ):
            made = seen or rig.store(VA)
            assert (made.fault, rig.dirty()) == _expected(error, dirty)
            assert rig.entry(DATA_PT, 0) == VA | after
            assert made.moved.get("pf_guest", 0) == (error is not None)
            assert made.moved.get("pf_fixed", 0) >= (error is None)
            if error is None:
                assert made.moved in (FIXED, FIXED | {"pages_4k": 1})


@pytest.mark.parametrize("flags", [0x27, 0x67], ids=["27", "67"])
def test_a_write_first(shadow: Host, flags: int) -> None:
    """B.8: the column of writes without the read before."""
    with one(shadow, flags) as rig:
        assert rig.store(VA).moved == FIXED | {"pages_4k": 1}
        assert rig.dirty() == (list(BOTH) if flags == 0x27 else [DATA])


def test_fetching_from_a_page_that_must_not_be_executed(shadow: Host) -> None:
    """B.8: NX: #PF with error code 15h."""
    with one(shadow, NX | FRESH) as rig:
        rig.memory.write(VA, DONE)
        seen = rig.run(FETCH, rdi=VA)
        assert seen.fault == (14, 0x15)
        assert rig.entry(DATA_PT, 0) == VA | NX | FRESH


def test_fetching_from_a_page_sets_a(shadow: Host) -> None:
    """B.8 and B.0: as a read."""
    with one(shadow, FRESH) as rig:
        rig.memory.write(VA, DONE)
        assert rig.run(FETCH, rdi=VA).moved == FIXED | {"pages_4k": 1}
        assert rig.dirty() == [DATA_PT]


def test_a_reserved_bit(shadow: Host) -> None:
    """B.8: bit 51 beyond MAXPHYADDR: error code Dh, pf_guest."""
    bits = {entry.function: entry.eax & 0xFF for entry in _cpuid(shadow)}.get(0x80000008, 36)
    if bits > 51:
        pytest.skip("The guest's physical addresses have 52 bits here.")
    with one(shadow, 1 << 51 | PAGE) as rig:
        seen = rig.load(VA)
        assert seen.fault == (14, 0xD)
        assert seen.moved["pf_guest"] == 1


def _cpuid(host: Host) -> list[CpuidEntry]:
    with host.system.create_machine() as machine:
        return list(machine.supported_cpuid)


def test_a_1_gib_entry(shadow: Host) -> None:
    """B.8: reserved without pdpe1gb; with it, two direct shadow pages."""
    has = any(entry.function == 0x80000001 and entry.edx >> 26 & 1 for entry in _cpuid(shadow))
    with Rig(shadow, entries={(PDPT, 1): 0 | TABLE | 0x80}) as rig:
        rig.prime()
        seen = rig.load((1 << 30) + VA)
        if has:
            assert seen.fault is None
            assert seen.moved == FIXED | {"mmu_cache_miss": 2, "pages_4k": 8}
        else:
            assert seen.fault == (14, 0xD)
            assert seen.moved["pf_guest"] == 1
