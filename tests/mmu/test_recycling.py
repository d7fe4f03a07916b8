"""Long rmap chains and the budget of shadow pages (docs/reference/hosts.md B.6)."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from pykvm.errors import KvmError
from tests.mmu_rig import DATA, PD, PDPT, SHADOW, SPARE, TABLE, Host, Rig, hosts

pytestmark = hosts(*SHADOW)
FIXED = {"pf_taken": 1, "pf_fixed": 1}
READ_PAGES = b"\x48\x8b\x07\x48\x01\xd7\x48\xff\xc9\x75\xf5"
"""again: mov rax, [rdi]; add rdi, rdx; dec rcx; jnz again"""
WINDOW, TABLES = 0x30 << 21, 4
ONE = DATA + 9
TABLES_AT = 0x1000


def aliased(shadow: Host, flags: int) -> Rig:
    """2048 pages at WINDOW that are all the same frame."""
    rig = Rig(shadow, entries={(PD, 0x30 + i): SPARE + i << 12 | TABLE for i in range(TABLES)}, leaf=TABLE)
    rig.memory.write(SPARE << 12, np.full(TABLES * 512, ONE << 12 | flags, dtype=np.uint64).tobytes())
    rig.prime()
    return rig


def test_the_1002nd_alias_recycles_them_all(shadow: Host) -> None:
    """B.6: count before adding > 1000: all SPTEs of the page are zapped, with a flush; max_mmu_rmap_size
    saturates at 1001; the access faults again; no mmu_recycled."""
    with aliased(shadow, 0x07) as rig:
        seen = rig.run(READ_PAGES, rdi=WINDOW, rdx=0x1000, rcx=1001)
        assert seen.moved == {
            "mmu_cache_miss": 2,
            "pages_4k": 1001,
            "pf_taken": 1001,
            "pf_fixed": 1001,
            "max_mmu_rmap_size": 1000,
        }
        seen = rig.run(READ_PAGES, rdi=WINDOW + 1001 * 0x1000, rdx=0x1000, rcx=1)
        # Added, all 1002 zapped, and added again by the second fault of the same access.  That one brings
        # along the only neighbour in its group of 8 whose A is set: the one before.
        assert seen.moved == {
            "pages_4k": -999,
            "pf_taken": 2,
            "pf_fixed": 2,
            "max_mmu_rmap_size": 1,
            "remote_tlb_flush_requests": 1,
        }
        assert rig.counters()["max_mmu_rmap_size"] == 1001


def test_refaults_prefetch(shadow: Host) -> None:
    """B.6: A is set already: 2000 aliases that are read again are 252 faults."""
    with aliased(shadow, 0x07) as rig:
        first = rig.run(READ_PAGES, rdi=WINDOW, rdx=0x1000, rcx=2000).moved
        assert first["pf_taken"] == 2001
        assert first["max_mmu_rmap_size"] == 1001
        assert rig.run(READ_PAGES, rdi=WINDOW, rdx=0x1000, rcx=2000).moved["pf_taken"] == 252


def far_tables(shadow: Host, count: int) -> Rig:
    """``count`` page tables at 1 GiB under a directory of their own, each with one page."""
    rig = Rig(shadow, leaf=TABLE, entries={(PDPT, 1): SPARE << 12 | TABLE})
    tables = np.array([TABLES_AT + i << 12 | TABLE for i in range(count)], dtype=np.uint64)
    rig.memory.write(SPARE << 12, tables.tobytes())
    for index in range(count):
        rig.put(TABLES_AT + index, 0, DATA + index << 12 | TABLE)
    rig.prime()
    return rig


def read_far(rig: Rig, tables: int, first: int = 0) -> dict[str, int]:
    """Read one page of each of ``tables`` page tables."""
    return rig.run(READ_PAGES, rdi=(1 << 30) + (first << 21), rdx=1 << 21, rcx=tables).moved


def test_a_limit_of_64_shadow_pages_with_256_page_tables(shadow: Host) -> None:
    """B.6: exactly 231, then 294 recycled: 25 are made free when fewer than 5 are, so 21 at a time."""
    with far_tables(shadow, 256) as rig:
        rig.machine.set_nr_mmu_pages(64)
        assert [read_far(rig, 256).get("mmu_recycled", 0) for _ in range(2)] == [231, 294]


def test_a_limit_of_64_with_the_code_under_the_same_directory(shadow: Host) -> None:
    """As B.6 with one table less to make again after each batch: 231, then 273."""
    with Rig(shadow, leaf=TABLE) as rig:
        for index in range(32, 256):
            rig.put(PD, index, TABLES_AT + index << 12 | TABLE)
            rig.put(TABLES_AT + index, 0, (DATA + index) << 12 | TABLE)
        rig.prime()
        rig.machine.set_nr_mmu_pages(64)
        recycled = [rig.run(READ_PAGES, rdi=0, rdx=1 << 21, rcx=256).moved["mmu_recycled"] for _ in range(2)]
        assert recycled == [231, 273]


def test_fewer_than_64_are_refused(shadow: Host) -> None:
    """B.6: KVM_SET_NR_MMU_PAGES(63) is EINVAL."""
    with Rig(shadow) as rig, pytest.raises(KvmError) as caught:
        rig.machine.set_nr_mmu_pages(63)
    assert caught.value.errno == errno.EINVAL


def test_64_mib_have_327_shadow_pages(shadow: Host) -> None:
    """B.6: the default limit is a 50th of the slots' pages: fewer than 5 left at a fault is what recycles."""
    with far_tables(shadow, 512) as rig:
        # Root, PDPT, PD, PT are in use, and the second PD will be; a fault with 323 of 327 in use has 4 left.
        free = 327 - 5 - 4
        moved = read_far(rig, free)
        assert "mmu_recycled" not in moved
        assert moved["mmu_cache_miss"] == free + 1
        assert read_far(rig, 1, free)["mmu_recycled"] == 21
