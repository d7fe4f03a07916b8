"""The dirty ring of the model: limits, pushes, the soft limit, overflow (kvm-mmu.md 4, hosts.md D)."""

from __future__ import annotations

import errno

import pytest

from pykvm.errors import RingOrderError, RingSizeError
from pykvm.model.mmu.dirty_ring import DIRTY, RESET, DirtyRing
from tests.model.mmu.foundation import Rig

# --- limits (4.2, D.3) -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["amd-shadow", "amd-npt", "intel-ept-nopml", "intel-ept", "pvm-shadow"])
@pytest.mark.parametrize(
    ("size", "error"),
    [
        (0, errno.EINVAL), (16, errno.EINVAL), (2048, errno.EINVAL), (4095, errno.EINVAL),
        (12288, errno.EINVAL), (2 << 20, errno.E2BIG), (3 << 20, errno.EINVAL), (4 << 20, errno.E2BIG),
    ],
)  # fmt: skip
def test_sizes_that_are_refused_everywhere(kind: str, size: int, error: int) -> None:
    """D.3: no power of two or less than 4096 bytes EINVAL, more than 1 MiB E2BIG; in this order."""
    rig = Rig(kind, vcpus=0)
    with pytest.raises(RingSizeError) as caught:
        rig.mmu.enable_dirty_ring(size)
    assert caught.value.errno == error


@pytest.mark.parametrize(
    ("kind", "least"), [("amd-npt", 4096), ("intel-ept-noad", 4096), ("intel-ept", 16384)]
)
def test_the_least_ring(kind: str, least: int) -> None:
    """4.2: 64 entries in reserve, and 512 for PML's buffer: 576 * 16 bytes do not fit into 8192."""
    rig = Rig(kind, vcpus=0)
    with pytest.raises(RingSizeError) as caught:
        rig.mmu.enable_dirty_ring(least // 2)
    assert caught.value.errno == errno.EINVAL
    rig.mmu.enable_dirty_ring(least)
    assert rig.mmu.ring_entries == least // 16
    assert Rig(kind, ring_bytes=1 << 20).ring().size == 65536


def test_rings_come_once_and_first() -> None:
    """4.2: size errors are said before "already set" and "a vCPU exists"; slots do not matter."""
    rig = Rig(vcpus=0)
    rig.slot()
    rig.mmu.enable_dirty_ring(4096)
    with pytest.raises(RingOrderError) as caught:
        rig.mmu.enable_dirty_ring(4096)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(RingSizeError):
        rig.mmu.enable_dirty_ring(100)
    late = Rig()
    with pytest.raises(RingOrderError) as caught:
        late.mmu.enable_dirty_ring(4096)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(RingSizeError) as size:
        late.mmu.enable_dirty_ring(2 << 20)
    assert size.value.errno == errno.E2BIG


# --- pushes (4.3) ----------------------------------------------------------------------------------


def test_every_mark_makes_an_entry() -> None:
    """4.3 and D.5: no deduplication; slot is (as_id << 16) | id, offset counts within the slot."""
    rig = Rig("amd-shadow", ring_bytes=4096)
    low, high = rig.slot(3, gfn=0x100), rig.slot(1 << 16 | 5, gfn=0x100)
    rig.mark(low, 0x107, 0x107)
    rig.mark(high, 0x109)
    assert rig.pushed() == [(3, 7), (3, 7), (1 << 16 | 5, 9)]
    assert low.dirty_bitmap is None, "in ring mode no bitmap exists on x86"


def test_a_mark_goes_to_the_vcpu_that_is_loaded() -> None:
    """kvm-mmu.md 5: whichever vCPU this thread has loaded, by any of its ioctls."""
    rig = Rig(ring_bytes=4096, vcpus=3)
    slot = rig.slot()
    rig.load(2)
    rig.mark(slot, 1)
    rig.load(0)
    rig.mark(slot, 2)
    assert [rig.pushed(number) for number in range(3)] == [[(0, 2)], [], [(0, 1)]]


def test_slots_that_do_not_log_push_nothing() -> None:
    rig = Rig(ring_bytes=4096)
    slot = rig.slot(flags=0)
    rig.mark(slot, 1)
    assert rig.pushed() == []
    rig.set(pages=256, flags=1)
    rig.mark(slot, 1)
    assert rig.pushed() == [(0, 1)]


@pytest.mark.parametrize(
    ("kind", "era", "ring", "bitmap"),
    [("amd-shadow", "6.1", False, None), ("amd-shadow", "6.12", False, [3]), ("amd-npt", "7.2", False, [3]),
     ("amd-shadow", "6.1", True, None), ("amd-shadow", "6.12", True, None)],
)  # fmt: skip
def test_marks_without_a_vcpu(kind: str, era: str, ring: bool, bitmap: list[int] | None) -> None:
    """3.2: [6.1] drops them in both modes; later the bitmap has them, and a ring of x86 loses them (4.7)."""
    rig = Rig(kind, era, ring_bytes=4096 if ring else 0)
    slot = rig.slot()
    rig.load(None)
    rig.mark(slot, 3)
    if bitmap is None:
        assert rig.mmu.dirty_log.lost == 1
        assert rig.pushed() == [] if ring else rig.log(slot) == []
    else:
        assert rig.log(slot) == bitmap
        assert rig.mmu.dirty_log.lost == 0


# --- the soft limit (4.2, 4.4, D.4) ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "reserved", "limit"),
    [
        (256, 64, 192),
        (512, 64, 448),
        (1024, 64, 960),
        (4096, 64, 4032),
        (1024, 576, 448),
        (65536, 576, 64960),
    ],
)
def test_the_soft_limit(size: int, reserved: int, limit: int) -> None:
    """D.4: entries minus 64, and with PML minus 576."""
    ring = DirtyRing(size, reserved)
    assert ring.soft_limit == limit
    for offset in range(limit - 1):
        ring.push(0, offset)
    assert not ring.soft_full
    ring.push(0, limit)
    assert ring.soft_full
    assert ring.used == limit


def test_profiles_decide_the_reserve() -> None:
    assert Rig("intel-ept", ring_bytes=16384).ring().soft_limit == 1024 - 576
    assert Rig("intel-ept-nopml", ring_bytes=16384).ring().soft_limit == 1024 - 64


def test_only_a_reset_makes_room() -> None:
    """D.4: harvested but not reset does not help."""
    rig = Rig(ring_bytes=4096)
    slot = rig.slot()
    rig.mark(slot, *range(192))
    rig.harvest()
    assert rig.ring().soft_full
    assert rig.mmu.dirty_log.reset_rings() == 192
    assert not rig.ring().soft_full
    assert rig.ring().used == 0


def test_positions_wrap_around() -> None:
    """4.3: free-running indices; the entry is the index modulo the size."""
    rig = Rig(ring_bytes=4096)
    slot = rig.slot(pages=1000)
    for begin in range(0, 1000, 100):
        rig.mark(slot, *range(begin, begin + 100))
        assert [offset for _, offset in rig.pushed()] == list(range(begin, begin + 100))
        rig.harvest()
        assert rig.mmu.dirty_log.reset_rings() == 100
    ring = rig.ring()
    assert (ring.dirty_index, ring.reset_index, ring.size) == (1000, 1000, 256)
    assert ring.overwritten == 0


# --- overflow (D.7) --------------------------------------------------------------------------------


def test_300_pages_in_a_batch_lose_44() -> None:
    """D.7, the smallest reproducer: 256 entries, 300 pages: all entries dirty, the oldest 44 pages gone;
    RESET returns 256, and what is pushed then appears where userspace does not look."""
    rig = Rig("pvm-shadow", ring_bytes=4096)
    slot = rig.slot(pages=2000)
    rig.mark(slot, *range(1000, 1300))
    ring = rig.ring()
    assert ring.overwritten == 44
    assert all(entry.flags == DIRTY for entry in ring.entries)
    logged = {entry.offset for entry in ring.entries}
    assert set(range(1000, 1300)) - logged == set(range(1000, 1044))
    for entry in ring.entries:
        entry.flags = RESET
    assert rig.mmu.dirty_log.reset_rings() == 256
    assert ring.used == 44, "the kernel's indices stay apart for good"
    rig.mark(slot, 5, 6, 7)
    head = ring.reset_index & ring.size - 1
    assert ring.entries[head].flags == 0, "nothing at userspace's head"
    assert sum(entry.flags == DIRTY for entry in ring.entries) == 3, "but entries elsewhere"


def test_a_desynchronised_ring_ends_in_a_livelock() -> None:
    """D.7, the 1000-page case: full for ever, and nothing to harvest at the head."""
    rig = Rig("pvm-shadow", ring_bytes=4096)
    slot = rig.slot(pages=2000)
    rig.mark(slot, *range(1000))
    ring = rig.ring()
    assert ring.overwritten == 1000 - 256
    for entry in ring.entries:
        entry.flags = RESET
    assert rig.mmu.dirty_log.reset_rings() == 256
    assert ring.soft_full
    assert rig.mmu.dirty_log.reset_rings() == 0
    assert ring.entries[ring.reset_index & ring.size - 1].flags == 0


def test_253_to_256_entries_are_safe() -> None:
    """D.7: beyond the soft limit, but within the ring, nothing is lost."""
    rig = Rig("pvm-shadow", ring_bytes=4096)
    slot = rig.slot(pages=300)
    rig.mark(slot, *range(256))
    assert rig.ring().overwritten == 0
    assert len(rig.pushed()) == 256
    rig.harvest()
    assert rig.mmu.dirty_log.reset_rings() == 256
