"""Large host pages, and the fast page fault (docs/reference/hosts.md F)."""

from __future__ import annotations

import numpy as np
import pytest

from pykvm.machine import SlotFlags
from tests.mmu.huge import HugePages, why_not
from tests.mmu_rig import DATA, NPT, PAGES_64M, PD, SHADOW, TABLE, Host, Rig, hosts

VA = DATA << 12
INDEX = DATA >> 9
LARGE = 0xE7
"""P, R/W, U/S, A, D and PS."""
FIXED = {"pf_taken": 1, "pf_fixed": 1}
FLUSH = {"remote_tlb_flush_requests": 1}
LOG, OFF = SlotFlags.LOG_DIRTY_PAGES, SlotFlags.NONE
REGIONS = 5


def large(
    host: Host, *, skew: int = 0, guest_large: bool = True, log: bool = False, ring: int = 0, manual: int = 0
) -> Rig:
    """64 MiB in huge pages of the host; five 2 MiB entries of the guest from DATA on."""
    if host.kvm and (reason := why_not()):
        pytest.skip(reason)
    memory = HugePages(PAGES_64M << 12, skew=skew)
    if host.kvm and memory.huge_bytes < memory.size * 3 // 4:
        pytest.skip("The host had no huge pages to give.")
    entries = {(PD, INDEX + i): (VA + (i << 21)) | LARGE for i in range(REGIONS)} if guest_large else {}
    rig = Rig(host, memory=memory, entries=entries, log=log, ring=ring, manual=manual, leaf=TABLE)
    rig.run(b"")
    return rig


def touch(rig: Rig) -> dict[str, int]:
    """Read a page in each of the five."""
    before = rig.counters()
    for region in range(REGIONS):
        rig.load(VA + (region << 21) + 0x3000)
    after = rig.counters()
    return {name: after[name] - before[name] for name in ("pages_2m", "pages_4k", "mmu_cache_miss")}


@hosts(*SHADOW)
def test_a_2_mib_entry_over_a_2_mib_page(shadow: Host) -> None:
    """F: pages_2m +1 for each, no shadow page below."""
    with large(shadow) as rig:
        assert touch(rig) == {"pages_2m": REGIONS, "pages_4k": 0, "mmu_cache_miss": 0}


@hosts(*SHADOW)
def test_4_kib_entries_always_make_4_kib_sptes(shadow: Host) -> None:
    """F: on shadow paging, whatever the host has."""
    with large(shadow, guest_large=False) as rig:
        moved = touch(rig)
        assert moved["pages_2m"] == 0
        assert moved["mmu_cache_miss"] == REGIONS


@hosts(*SHADOW)
def test_a_misaligned_host_address(shadow: Host) -> None:
    """F: hva and gpa not congruent: 4 KiB."""
    with large(shadow, skew=0x1000) as rig:
        assert touch(rig)["pages_2m"] == 0


@hosts(*SHADOW)
def test_the_first_write_after_enabling_logging(shadow: Host) -> None:
    """F: no eager split; pages_2m -1, mmu_cache_miss +1, pages_4k +1; of the 2 flushes one is of enabling."""
    with large(shadow) as rig:
        touch(rig)
        assert rig.measured(lambda: rig.slot.set_flags(LOG)) == FLUSH
        seen = rig.store(VA + 0x3000)
        moved = {"pages_2m": -1, "mmu_cache_miss": 1, "pages_4k": 1}
        assert seen.moved == FIXED | FLUSH | moved
        assert rig.dirty() == [DATA + 3]


@hosts(*SHADOW)
def test_disabling_logging_drops_the_small_pages(shadow: Host) -> None:
    """F: pages_4k fall (zap collapsible), and the next access makes 2 MiB again."""
    with large(shadow) as rig:
        touch(rig)
        rig.slot.set_flags(LOG)
        rig.store(VA)
        rig.store(VA + 0x5000)
        moved = rig.measured(lambda: rig.slot.set_flags(OFF))
        assert moved == {"pages_4k": -2} | FLUSH
        assert rig.load(VA).moved == FIXED | {"pages_2m": 1, "remote_tlb_flush_requests": 1}


@hosts(*SHADOW)
def test_a_slot_that_logs_from_the_start(shadow: Host) -> None:
    """F: 4 KiB from the start, in a ring VM, too."""
    for ring in (0, 4096):
        with large(shadow, log=True, ring=ring) as rig:
            assert touch(rig)["pages_2m"] == 0


@hosts(*NPT)
@pytest.mark.parametrize("manual", [0, 1])
def test_nested_paging_splits_eagerly(nested: Host, manual: int) -> None:
    """F: at once when logging is enabled: for 5 pages, pages_2m -5 and pages_4k +2560."""
    with large(nested, manual=manual, guest_large=False) as rig:
        touch(rig)
        count = rig.counters()["pages_2m"]
        assert count >= REGIONS
        moved = rig.measured(lambda: rig.slot.set_flags(LOG))
        assert moved["pages_2m"] == -count
        assert moved["pages_4k"] == 512 * count


@hosts(*NPT)
def test_nested_paging_splits_what_is_cleared(nested: Host) -> None:
    """F: with manual 3 at CLEAR of the range."""
    with large(nested, manual=3, guest_large=False) as rig:
        touch(rig)
        assert "pages_2m" not in rig.measured(lambda: rig.slot.set_flags(LOG))
        words = np.full(8 * REGIONS, 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
        moved = rig.measured(lambda: rig.machine.clear_dirty_log(rig.slot, DATA, 512 * REGIONS, words))
        assert moved["pages_2m"] == -REGIONS
        assert moved["pages_4k"] == 512 * REGIONS


@hosts(*NPT)
def test_nested_paging_maps_large_whatever_the_guest_has(nested: Host) -> None:
    """F: 2 MiB although the guest's entries are of 4 KiB."""
    with large(nested, guest_large=False) as rig:
        assert touch(rig)["pages_2m"] >= REGIONS


@hosts(*NPT)
def test_nested_paging_recovers_large_pages(nested: Host) -> None:
    """B.11, 8: disabling logging: in place where KVM does so [7.2], else they are zapped and fault again."""
    with large(nested, guest_large=False) as rig:
        touch(rig)
        rig.slot.set_flags(LOG)
        rig.store(VA)
        moved = rig.measured(lambda: rig.slot.set_flags(OFF))
        if nested.profile.tdp_recovers_in_place:
            assert moved["pages_2m"] >= REGIONS
        else:
            assert moved.get("pages_2m", 0) == 0
            assert moved["pages_4k"] < 0
        assert rig.load(VA).fault is None
        assert rig.counters()["pages_2m"] >= 1


@hosts(*NPT)
def test_pf_fast_is_for_direct_mmus(host: Host) -> None:
    """F: with nested paging every write-protect fault of the log; never for shadowed tables."""
    with Rig(host, pages=0x2200) as rig:
        rig.store(VA)
        rig.dirty()
        seen = rig.store(VA)
        fast = seen.moved.get("pf_fast", 0)
        direct = host.profile.tdp and not host.profile.pml
        assert fast == (seen.moved["pf_taken"] if direct else 0)
