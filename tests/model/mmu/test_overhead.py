"""What KVM's metadata costs: the model's figures against the sheets, and against this host's kernel."""

from __future__ import annotations

import pytest

from pykvm.errors import UsageError
from pykvm.kvm import KvmSystem
from pykvm.machine import SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.model.mmu.overhead import Overhead, overhead
from pykvm.probe import detect, read_evidence
from pykvm.probe.evidence import vmalloc_areas
from pykvm.profiles import WriteTrackAllocation, profile

GIB = 1 << 30
ALWAYS, SHADOW_ROOT, EXTERNAL = WriteTrackAllocation


def bytes_at(result: Overhead, moment: str, array: str) -> int:
    (found,) = [each for each in result.moments if each.name == moment]
    return found.arrays[array]


def test_a_39_bit_address_space_has_256_mib_of_counts() -> None:
    """kvm-mmu.md 9, and the reason for the policy of Linux 6.9: 2 bytes a page."""
    result = overhead(profile("amd-npt", "6.1"), ALWAYS, 1 << 39)
    assert bytes_at(result, "slots", "gfn_write_track") == 256 << 20
    assert bytes_at(overhead(profile("amd-npt", "6.12"), EXTERNAL, 1 << 39), "slots", "gfn_write_track") == 0


@pytest.mark.parametrize(
    ("policy", "moments"),
    [
        (ALWAYS, {"slots", "first shadow root", "first external user", "logging"}),
        (SHADOW_ROOT, {"first shadow root"}),
        (EXTERNAL, {"first shadow root", "first external user"}),
    ],
)
@pytest.mark.parametrize("kind", ["amd-npt", "intel-ept", "intel-ept-noad"])
def test_when_counts_exist_under_two_dimensional_paging(
    policy: WriteTrackAllocation, moments: set[str], kind: str
) -> None:
    """kvm-mmu.md 9, allocation points; rmaps come with the first shadow root only (section 2)."""
    result = overhead(profile(kind), policy, GIB)
    counts = {each.name for each in result.moments if each.arrays["gfn_write_track"]}
    assert counts == moments
    assert {each.arrays["gfn_write_track"] for each in result.moments if each.name in moments} == {
        2 * GIB // 4096
    }
    assert {each.name for each in result.moments if each.arrays["rmap"]} == {"first shadow root"}


@pytest.mark.parametrize("policy", WriteTrackAllocation)
@pytest.mark.parametrize("kind", ["pvm-shadow", "amd-shadow", "intel-shadow"])
def test_shadow_paging_always_has_everything(policy: WriteTrackAllocation, kind: str) -> None:
    """hosts.md G, first row: rmap, counts and lpage_info with the slot: 10.04 bytes a page, being 134.76 MB
    and 33.65 MB and 0.14 MB with vmalloc's pointers to the pages of the arrays."""
    result = overhead(profile(kind), policy, 64 * GIB)
    pages = 64 * GIB // PAGE_SIZE
    for each in result.moments:
        assert each.arrays["rmap"] == 8 * (pages + pages // 512 + 64)
        assert each.arrays["gfn_write_track"] == 2 * pages
        assert each.arrays["lpage_info"] == 4 * (pages // 512 + 64)
    assert round(result.moments[0].total / pages, 2) == 10.04
    assert round(result.moments[0].total / 1e6, 1) == 168.5


def test_the_tdp_mmu_costs_a_hundredth_of_a_byte_a_page() -> None:
    """hosts.md G, 7.2:1: lpage_info only, 0.009 B a page; logging adds 0.25 B a page."""
    result = overhead(profile("amd-npt", "7.2"), EXTERNAL, 64 * GIB)
    pages = 64 * GIB // PAGE_SIZE
    totals = {each.name: each.total / pages for each in result.moments}
    assert round(totals["slots"], 3) == 0.008
    assert round(totals["logging"] - totals["slots"], 2) == 0.25
    assert round((totals["logging"] - totals["slots"]) * pages / 1e6, 1) == 4.2


def test_rings_replace_bitmaps() -> None:
    """hosts.md G: nothing for the slot; 16 bytes an entry for each vCPU."""
    result = overhead(profile("amd-npt"), EXTERNAL, GIB, vcpus=3, ring=4096)
    assert {each.arrays["dirty_ring"] for each in result.moments} == {3 * 65536}
    assert bytes_at(result, "logging", "dirty_bitmap") == 0


def test_more_memory_than_a_slot_takes_several() -> None:
    """kvm-mmu.md 2: 2^31-1 pages a slot."""
    result = overhead(profile("amd-shadow"), EXTERNAL, 20 << 40)
    assert result.slots == 3
    pages = (20 << 40) // PAGE_SIZE
    assert bytes_at(result, "slots", "gfn_write_track") == 2 * pages
    with pytest.raises(UsageError):
        overhead(profile("amd-shadow"), EXTERNAL, 1000)


# --- this host -------------------------------------------------------------------------------------

PAGES = 0x53_0000
"""An odd size, so that nobody else's slots have areas of the same sizes."""
ARRAYS = {
    "memslot_rmap_alloc": [8 * PAGES],
    "kvm_page_track": [2 * PAGES],
    "kvm_arch_prepare_memory_region": [4 * PAGES // 512],
    "kvm_set_memslot": [2 * PAGES // 8],
}
"""By the function that allocates: sizes of the arrays with an entry a page, and of the counts of 2 MiB."""


def area(size: int) -> int:
    """An array as /proc/vmallocinfo has it: whole pages and a guard page."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE + PAGE_SIZE


def areas() -> dict[str, dict[int, int]]:
    found = {caller: vmalloc_areas(caller) for caller in ARRAYS}
    if None in found.values():
        pytest.skip("/proc/vmallocinfo is root's to read")
    return {caller: sizes for caller, sizes in found.items() if sizes is not None}


def test_the_kernel_allocates_what_the_model_says(system: KvmSystem) -> None:
    """hosts.md G on this host: the arrays of a slot by their sizes, with and without logging.

    Areas are counted by size, since other VMs come and go meanwhile; arrays of less than a page are left out.
    """
    host = detect(system, read_evidence(), system.check_extension).profile
    result = overhead(host, host.write_track_allocation, PAGES * PAGE_SIZE)
    with system.create_machine() as vm, GuestMemory(PAGES * PAGE_SIZE) as memory:
        before = areas()
        slot = vm.create_slot(memory, 0)
        created = areas()
        slot.set_flags(SlotFlags.LOG_DIRTY_PAGES)
        logging = areas()
    after = areas()

    def grew(caller: str, size: int, old: dict[str, dict[int, int]], new: dict[str, dict[int, int]]) -> bool:
        return new[caller].get(area(size), 0) > old[caller].get(area(size), 0)

    for caller, name in (("memslot_rmap_alloc", "rmap"), ("kvm_page_track", "gfn_write_track")):
        (size,) = ARRAYS[caller]
        assert grew(caller, size, before, created) == (bytes_at(result, "slots", name) > 0), name
        assert not grew(caller, size, created, after)
        if bytes_at(result, "slots", name):
            pointers = 8 * -(-size // PAGE_SIZE)
            assert grew(caller, pointers, before, created), "vmalloc's pointers to the pages"
    (size,) = ARRAYS["kvm_arch_prepare_memory_region"]
    assert grew("kvm_arch_prepare_memory_region", size, before, created)
    (size,) = ARRAYS["kvm_set_memslot"]
    assert not grew("kvm_set_memslot", size, before, created)
    assert grew("kvm_set_memslot", size, created, logging)
    assert bytes_at(result, "logging", "dirty_bitmap") == size
