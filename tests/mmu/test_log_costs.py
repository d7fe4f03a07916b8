"""What the dirty log's own calls cost the MMU (docs/reference/hosts.md D.1, D.2, D.4 and D.5).

What they accept and return is held by tests/kvm; these are the statistics and faults that go with it.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest

from pykvm.errors import LoggingDisabledError, SlotError
from pykvm.machine import DirtyRingFull, SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from tests.mmu_rig import DATA, DATA_PT, NPT, PAGE, SHADOW, TABLE, Host, Rig, hosts
from tests.rings import LEAST_RING

on_shadow = hosts(*SHADOW)
VA = DATA << 12
FIXED = {"pf_taken": 1, "pf_fixed": 1}
FLUSH = {"remote_tlb_flush_requests": 1}
LOG, OFF = SlotFlags.LOG_DIRTY_PAGES, SlotFlags.NONE
PAGES = 0x2400
STORES = b"\x48\x89\x0f\x48\x01\xd7\x48\xff\xc9\x75\xf5"
"""again: mov [rdi], rcx; add rdi, rdx; dec rcx; jnz again"""


def clear(rig: Rig, first: int, pages: int) -> None:
    words = np.full(-(-pages // 64), 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    rig.machine.clear_dirty_log(rig.slot, first, pages, words)


# --- D.1, slots ----------------------------------------------------------------------------------------


@on_shadow
def test_enabling_protects_everything_with_a_flush(shadow: Host) -> None:
    """D.1, toggle on: flush +1, the bitmap empty; reads do not fault, the first write of each page does."""
    with Rig(shadow, pages=PAGES, log=False) as rig:
        rig.prime(DATA, DATA + 1, write=True)
        assert rig.measured(lambda: rig.slot.set_flags(LOG)) == FLUSH
        assert rig.dirty() == []
        assert rig.load(VA).moved == {}
        assert rig.store(VA).moved == FIXED
        assert rig.store(VA).moved == {}
        assert rig.dirty() == [DATA]


@on_shadow
def test_disabling_leaves_pages_protected_until_they_are_written(shadow: Host) -> None:
    """D.1, off: one more fault; the bitmap is gone, and on again it starts empty."""
    with Rig(shadow, pages=PAGES) as rig:
        rig.prime(DATA, DATA + 1, write=True)
        assert rig.measured(lambda: rig.slot.set_flags(OFF)) == {}
        with pytest.raises(LoggingDisabledError):
            rig.dirty()
        # Without logging, the rest of an aligned 8 comes along (kvm-mmu.md 7.3).
        assert rig.store(VA).moved == FIXED | {"pages_4k": 6}
        assert rig.store(VA + 0x1000).moved == FIXED
        assert rig.measured(lambda: rig.slot.set_flags(LOG)) == FLUSH
        assert rig.dirty() == []


@on_shadow
def test_the_same_flags_again_do_nothing(shadow: Host) -> None:
    """D.1: returns 0."""
    with Rig(shadow, pages=PAGES) as rig:
        rig.prime(DATA, write=True)
        rig.store(VA)
        assert rig.measured(lambda: rig.slot.set_flags(LOG)) == {}
        assert rig.dirty() == [DATA]


@on_shadow
@pytest.mark.parametrize("change", ["move", "delete"])
def test_a_slot_that_moves_or_goes_zaps_all(shadow: Host, change: str) -> None:
    """D.1: all shadow pages of all slots; the next run has an obsolete root, which counts once more."""
    with Rig(shadow, pages=PAGES, leaf=TABLE) as rig:
        memory = GuestMemory(PAGE_SIZE)
        slot = rig.machine.create_slot(memory, 0x8000 << 12)
        rig.prime(DATA)
        in_use = rig.counters()["pages_4k"]
        moved = rig.measured(slot.delete if change == "delete" else lambda: slot.move(0x9000 << 12))
        # Root, PDPT, PD, and the page tables of the code and of the data.
        assert moved["mmu_shadow_zapped"] == 5
        assert moved["pages_4k"] == -in_use
        again = rig.run(b"").moved
        assert again["mmu_shadow_zapped"] == 1
        assert again["mmu_cache_miss"] == 4
        memory.close()


@on_shadow
def test_creating_a_slot_zaps_nothing(shadow: Host) -> None:
    """D.1 and kvm-mmu.md 2."""
    with Rig(shadow, pages=PAGES) as rig:
        rig.prime(DATA)
        memory = GuestMemory(PAGE_SIZE)
        assert rig.measured(lambda: rig.machine.create_slot(memory, 0x8000 << 12)) == {}
        assert rig.load(VA).moved == {}


@on_shadow
def test_of_two_slots_on_one_memory_only_the_one_written_through_is_marked(shadow: Host) -> None:
    """D.1, aliased slots."""
    alias = 0x2400
    with Rig(shadow, pages=PAGES, entries={(DATA_PT, 5): alias << 12 | 0x67}) as rig:
        second = rig.machine.create_slot(rig.memory, alias << 12, size=PAGE_SIZE, memory_offset=VA, flags=LOG)
        rig.prime()
        rig.store(VA + 0x5000, 0x42)
        assert rig.value(DATA) == 0x42
        assert rig.dirty() == []
        assert rig.dirty(second) == [alias]


# --- D.2, GET and CLEAR --------------------------------------------------------------------------------


@on_shadow
def test_get_protects_and_flushes_if_it_found_something(shadow: Host) -> None:
    """D.2, manual=0: the second GET is empty; the next write faults."""
    with Rig(shadow, pages=PAGES) as rig:
        rig.prime(DATA, write=True)
        rig.store(VA)
        assert rig.measured(lambda: rig.dirty()) == FLUSH
        assert rig.measured(lambda: rig.dirty()) == {}
        assert rig.store(VA).moved == FIXED


@on_shadow
def test_with_manual_protection_get_costs_nothing(shadow: Host) -> None:
    """D.2, manual=1: the same bits again, no protection, no flush; a write afterwards does not fault."""
    with Rig(shadow, pages=PAGES, manual=1) as rig:
        rig.store(VA)
        for _ in range(2):
            assert rig.measured(lambda: rig.dirty()) == {}
            assert DATA in rig.dirty()
        assert rig.store(VA).moved == {}


@on_shadow
@pytest.mark.parametrize("manual", [0, 1, 3])
def test_clear_protects_what_was_set_and_asked_for(shadow: Host, manual: int) -> None:
    """D.2: one flush, and only if some bit was set; CLEAR works without manual protection, too."""
    with Rig(shadow, pages=PAGES, manual=manual) as rig:
        rig.store(VA)
        rig.store(VA + 0x40000)
        clear(rig, 0, PAGES) if manual == 3 else None
        rig.run(b"")
        if manual == 3:
            rig.store(VA)
            rig.store(VA + 0x40000)
        assert rig.measured(lambda: clear(rig, DATA, 64)) == FLUSH
        assert rig.measured(lambda: clear(rig, DATA, 64)) == {}
        assert rig.store(VA + 0x40000).moved == {}
        assert rig.store(VA).moved == FIXED
        assert {DATA, DATA + 0x40} <= set(rig.dirty())


@on_shadow
def test_initially_set_protects_nothing(shadow: Host) -> None:
    """D.2, manual=3: all ones, no protection; writes before the first CLEAR cost nothing."""
    with Rig(shadow, pages=PAGES, manual=3, log=False) as rig:
        rig.store(VA)
        assert rig.measured(lambda: rig.slot.set_flags(LOG)) == {}
        assert rig.dirty() == list(range(PAGES))
        assert rig.store(VA).moved == {}
        assert rig.measured(lambda: clear(rig, 0, PAGES)) == FLUSH
        assert rig.store(VA).moved == FIXED
        assert rig.dirty() == [DATA]


# --- D.4, the soft limit -------------------------------------------------------------------------------


@on_shadow
@pytest.mark.parametrize("entries", [LEAST_RING, 2 * LEAST_RING, 4 * LEAST_RING])
def test_the_ring_is_full_at_64_entries_below_its_size(shadow: Host, entries: int) -> None:
    """D.4: exactly; running again without a harvest makes no progress; the reset counts the entries."""
    with Rig(shadow, ring=entries) as rig:
        rig.prime()
        seen = rig.run(STORES, rdi=VA, rdx=0x1000, rcx=entries)
        assert isinstance(seen.exit, DirtyRingFull)
        assert seen.pushed == [DATA + i for i in range(entries - 64)]
        for _ in range(3):
            again = rig.resume()
            assert isinstance(again.exit, DirtyRingFull)
            assert again.moved == {}
            assert again.pushed == []
        assert len(rig.collect()) == entries - 64
        assert rig.collect() == []
        rest = rig.resume()
        # The write of the last entry had not happened: it faults again (kvm-mmu.md 4.4).
        assert rest.pushed == [DATA + i for i in range(entries - 65, entries)]


@on_shadow
def test_a_fault_with_two_pushes_may_go_one_beyond(shadow: Host) -> None:
    """D.4: +1 if the last fault pushed 2: here each store pushes its table and its page."""
    with Rig(shadow, leaf=TABLE, ring=LEAST_RING) as rig:
        rig.run(b"")
        seen = rig.run(STORES, rdi=VA, rdx=0x1000, rcx=LEAST_RING)
        assert isinstance(seen.exit, DirtyRingFull)
        assert len(seen.pushed) == LEAST_RING - 64
        assert seen.pushed[:4] == [DATA_PT, DATA, DATA_PT, DATA + 1]
    with Rig(shadow, leaf=TABLE, entries={(DATA_PT, 0): VA | PAGE}, ring=LEAST_RING) as rig:
        rig.run(b"")
        seen = rig.run(STORES, rdi=VA, rdx=0x1000, rcx=LEAST_RING)
        assert isinstance(seen.exit, DirtyRingFull)
        assert seen.pushed[:3] == [DATA, DATA_PT, DATA + 1]
        assert len(seen.pushed) == LEAST_RING - 64 + 1


# --- D.5 -----------------------------------------------------------------------------------------------


@on_shadow
def test_native_writes_push_once_before_the_reset(shadow: Host) -> None:
    """D.5: a page that is writable pushes nothing; changes of A and D push the table each time."""
    with Rig(shadow, leaf=TABLE, ring=4096) as rig:
        rig.prime()
        assert rig.store(VA).pushed == [DATA_PT, DATA]
        assert rig.store(VA).pushed == []
        assert rig.store(VA + 0x1000).pushed == [DATA_PT, DATA + 1]


@on_shadow
def test_a_write_between_harvest_and_reset_is_not_logged_again(shadow: Host) -> None:
    """D.5: after the reset it is."""
    with Rig(shadow, ring=4096) as rig:
        rig.prime()
        assert rig.store(VA).pushed == [DATA]
        assert rig.collect() == [DATA]
        assert rig.store(VA).pushed == [DATA]


@on_shadow
def test_emulated_writes_push_every_time(host: Host) -> None:
    """D.5: no deduplication where KVM emulates the store."""
    if not host.profile.emulates_all_but_user:
        pytest.skip("CPL 0 runs natively here.")
    with Rig(host, ring=4096, cpl=0) as rig:
        rig.prime()
        assert rig.store(VA).pushed == [DATA]
        assert rig.store(VA).pushed == [DATA]


@hosts(*SHADOW, *NPT)
@pytest.mark.parametrize("logs", [LOG, OFF], ids=["logging", "not logging"])
def test_a_slot_beyond_the_hosts_addresses(host: Host, logs: SlotFlags) -> None:
    """D.1: a gpa above the host's MAXPHYADDR is taken with shadow paging, and refused by the TDP MMU."""
    memory = GuestMemory(PAGE_SIZE)
    with host.system.create_machine() as machine:
        if host.profile.tdp_mmu:
            with pytest.raises(SlotError) as caught:
                machine.create_slot(memory, (1 << 52) - PAGE_SIZE, flags=logs)
            assert caught.value.errno == errno.EINVAL
        else:
            assert machine.create_slot(memory, (1 << 52) - PAGE_SIZE, flags=logs).alive
    memory.close()
