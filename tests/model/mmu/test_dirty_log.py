"""Collecting and arming again, of the model: kvm-mmu.md 3 and 4.5, hosts.md D.2 and D.5."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from pykvm.errors import ClearRangeError, DirtyRingModeError, KvmError, LoggingDisabledError
from pykvm.kvm import KvmSystem
from pykvm.model.mmu.dirty_bitmap import DirtyBitmap, Words
from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES, READONLY
from tests.kvm.test_traps_ring import RawRing
from tests.kvm.tiny import DATA, STORE, done, ring_guest
from tests.model.mmu.foundation import RESET, Rig
from tests.rings import LEAST_RING

PAGES = 0x4A
"""hosts.md D.2: a slot of two words, the second one of 10 bits."""
RING = 4096
ALL = (1 << 64) - 1


def rig_of(manual: int, **options: Any) -> Rig:
    """``manual`` is the capability's argument: 0, 1 (enable) or 3 (and initially set)."""
    rig = Rig(**options)
    rig.mmu.dirty_log.manual = bool(manual & 1)
    rig.mmu.dirty_log.initially_set = bool(manual & 2)
    return rig


def words(*values: int) -> Words:
    return np.array(values, dtype=np.uint64)


def masked(calls: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The re-armings among the calls: first gfn and mask."""
    return [call[2:] for call in calls if call[0] in ("write_protect_masked", "clear_dirty_masked")]


# --- logging on and off (3.2, D.1) -----------------------------------------------------------------


@pytest.mark.parametrize("manual", [0, 1, 3])
@pytest.mark.parametrize(("kind", "pml"), [("amd-shadow", False), ("intel-ept", True)])
def test_logging_begins(manual: int, kind: str, pml: bool) -> None:
    """D.2, row "enable logging": everything write-protected and empty; all ones and nothing protected with
    INITIALLY_SET.  With PML: D of 4 KiB leaves, W of large ones.  One unconditional flush."""
    rig = rig_of(manual, kind=kind)
    rig.slot(pages=PAGES, flags=0)
    slot = rig.set(pages=PAGES, flags=LOG_DIRTY_PAGES)
    assert slot is not None
    if manual == 3:
        assert rig.tables.take() == []
        assert rig.flushes == 0
        assert rig.mmu.dirty_log.get(slot).tolist() == [ALL, (1 << 10) - 1]
        return
    arming = (
        [("clear_dirty_slot", 0), ("write_protect_slot", 0, 2)] if pml else [("write_protect_slot", 0, 1)]
    )
    assert rig.tables.take() == [("split_huge", 0, 0, PAGES - 1), *arming]
    assert rig.flushes == 1
    assert rig.vcpus[0].tlb_flushes == 1
    assert rig.log(slot) == []


def test_no_eager_split_where_the_parameter_is_off() -> None:
    """3.2: eager_page_split is a module parameter."""
    rig = Rig(eager_page_split=False)
    rig.slot(flags=0)
    rig.set(pages=256, flags=LOG_DIRTY_PAGES)
    assert rig.tables.take() == [("write_protect_slot", 0, 1)]


def test_logging_of_a_readonly_slot_protects_nothing() -> None:
    """``kvm_mmu_slot_apply_flags``: nothing more to do for READONLY slots."""
    rig = Rig()
    rig.slot(flags=READONLY)
    slot = rig.set(pages=256, flags=READONLY | LOG_DIRTY_PAGES)
    assert slot is not None
    assert rig.log(slot) == []
    rig.set(pages=256, flags=READONLY)
    assert rig.tables.take() == []
    assert rig.flushes == 0


@pytest.mark.parametrize("flush", [True, False])
def test_logging_ends(flush: bool) -> None:
    """3.3: a flush only if something was collapsed or zapped; the bits are gone (D.1)."""
    rig = Rig()
    slot = rig.slot()
    rig.mark(slot, 3)
    rig.tables.flush = flush
    rig.set(pages=256)
    assert rig.tables.take() == [("recover_huge", 0)]
    assert rig.flushes == int(flush)
    with pytest.raises(LoggingDisabledError) as caught:
        rig.log(slot)
    assert caught.value.errno == errno.ENOENT
    rig.set(pages=256, flags=LOG_DIRTY_PAGES)
    assert rig.log(slot) == []


# --- GET (3.2, D.2) --------------------------------------------------------------------------------


def test_get_without_manual_takes_and_arms_word_by_word() -> None:
    """D.2, "GET twice": the second is empty; one flush for all words, none where nothing was set."""
    rig = rig_of(0)
    slot = rig.slot(gfn=0x100, pages=PAGES)
    rig.mark(slot, 0x100, 0x100 + 3, 0x100 + 65)
    assert rig.log(slot) == [0, 3, 65]
    assert masked(rig.tables.take()) == [(0x100, 0b1001), (0x140, 0b10)]
    assert rig.flushes == 1
    assert rig.log(slot) == []
    assert rig.tables.take() == []
    assert rig.flushes == 1


@pytest.mark.parametrize("manual", [1, 3])
def test_get_with_manual_only_reads(manual: int) -> None:
    """D.2: the same bits again, no protection, no flush."""
    rig = rig_of(manual)
    slot = rig.slot(pages=PAGES)
    expected = list(range(PAGES)) if manual == 3 else [3]
    rig.mark(slot, 3)
    assert rig.log(slot) == expected
    assert rig.log(slot) == expected
    assert rig.tables.take() == []
    assert rig.flushes == 0


@pytest.mark.parametrize("manual", [0, 1])
def test_a_processor_s_log_is_read_first(manual: int) -> None:
    """3.2, kvm_arch_sync_dirty_log: with PML every vCPU is kicked, and only then."""
    for pml, flushed in ((True, 1), (False, 0)):
        rig = rig_of(manual, kind="intel-ept" if pml else "amd-npt", vcpus=2)
        rig.log(rig.slot())
        assert [vcpu.pml_flushes for vcpu in rig.vcpus] == [flushed] * 2


def test_get_of_a_slot_that_does_not_log() -> None:
    """D.1: ENOENT for an absent slot and for one without logging."""
    rig = Rig()
    for slot in (None, rig.slot(flags=0)):
        with pytest.raises(LoggingDisabledError) as caught:
            rig.mmu.dirty_log.get(slot)
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(LoggingDisabledError) as caught:
            rig.mmu.dirty_log.clear(slot, 0, 0, words())
        assert caught.value.errno == errno.ENOENT


def test_ring_mode_refuses_before_it_looks_at_anything() -> None:
    """4.2 and D.3: ENXIO, whatever the arguments."""
    rig = Rig(ring_bytes=RING)
    for slot in (None, rig.slot()):
        with pytest.raises(DirtyRingModeError) as caught:
            rig.mmu.dirty_log.get(slot)
        assert caught.value.errno == errno.ENXIO
        with pytest.raises(DirtyRingModeError) as caught:
            rig.mmu.dirty_log.clear(slot, 1, 999, words())
        assert caught.value.errno == errno.ENXIO


# --- CLEAR (3.2, D.2) ------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [0, 1])
def test_clear_arms_what_was_set_and_asked(manual: int) -> None:
    """D.2: write-protects only bits that were set and asked for, and flushes only then; legal without the
    capability."""
    rig = rig_of(manual)
    slot = rig.slot(pages=PAGES)
    rig.mark(slot, 1, 2, 66)
    rig.mmu.dirty_log.clear(slot, 0, PAGES, words(0b1100, 0))
    assert masked(rig.tables.take()) == [(0, 0b100)]
    assert rig.flushes == 1
    rig.mmu.dirty_log.clear(slot, 0, PAGES, words(0b1100, 0))
    assert rig.tables.take() == []
    assert rig.flushes == 1
    rig.mmu.dirty_log.clear(slot, 64, 10, words(ALL))
    assert masked(rig.tables.take()) == [(64, 0b100)], "padding that userspace sets is ignored"
    assert rig.log(slot) == [1]


def test_clear_of_nothing_is_legal() -> None:
    """3.2: num_pages = 0, even right behind the last page."""
    rig = rig_of(1)
    slot = rig.slot(pages=128)
    for first in (0, 64, 128):
        rig.mmu.dirty_log.clear(slot, first, 0, words())
    assert rig.tables.take() == []


@pytest.mark.parametrize(
    ("npages", "first", "pages", "accepted"),
    [
        (100, 0, 100, True), (100, 0, 64, True), (100, 64, 36, True), (100, 0, 0, True),
        (100, 32, 64, False), (100, 1, 64, False), (100, 64, 64, False), (100, 0, 128, False),
        (100, 64, 32, False),
        (100, 128, 0, False), (100, 100, 0, False), (100, 0, 36, False),
        (0x4A, 64, 10, True), (0x4A, 0, 0x4A, True), (0x4A, 64, 64, False), (0x4A, 64, 128, False),
    ],
)  # fmt: skip
def test_clear_ranges(npages: int, first: int, pages: int, accepted: bool) -> None:
    """3.2, the matrix for 100 pages, and D.2 for 0x4a."""
    rig = rig_of(1)
    slot = rig.slot(pages=npages)
    rig.mark(slot, npages - 1)
    if accepted:
        rig.mmu.dirty_log.clear(slot, first, pages, words(ALL, ALL))
        return
    with pytest.raises(ClearRangeError) as caught:
        rig.mmu.dirty_log.clear(slot, first, pages, words(ALL, ALL))
    assert caught.value.errno == errno.EINVAL
    assert rig.log(slot) == [npages - 1]


def test_clear_judges_in_kvm_s_order() -> None:
    """3.2: first_page % 64 before the slot, the slot before the rest of the range."""
    rig = rig_of(1)
    with pytest.raises(ClearRangeError):
        rig.mmu.dirty_log.clear(None, 1, 64, words(0))
    with pytest.raises(LoggingDisabledError):
        rig.mmu.dirty_log.clear(None, 64, 1, words(0))


# --- INITIALLY_SET: what the first CLEAR does (3.2, re-arm) ------------------------------------------


def test_clear_of_an_initially_set_log_splits_and_protects_the_ends() -> None:
    """3.2: eager split of what the mask spans, large SPTEs at its ends lose W, then the 4 KiB ones."""
    rig = rig_of(3)
    slot = rig.slot(gfn=512 - 32, pages=1024)
    rig.mmu.dirty_log.clear(slot, 0, 64, words(0b110 | 1 << 40))
    first, last = 512 - 32 + 1, 512 - 32 + 40
    assert rig.tables.take() == [
        ("split_huge", 0, first, last),
        ("write_protect_gfn", 0, first, 2),
        ("write_protect_gfn", 0, last, 2),
        ("write_protect_masked", 0, 512 - 32, 0b110 | 1 << 40),
    ]
    rig.mmu.dirty_log.clear(slot, 64, 64, words(0b100))
    assert rig.tables.take() == [
        ("split_huge", 0, 512 + 34, 512 + 34),
        ("write_protect_gfn", 0, 512 + 34, 2),
        ("write_protect_masked", 0, 512 + 32, 0b100),
    ]


def test_the_masked_split_of_6_1_misses_the_last_gfn() -> None:
    """11.4: the end is taken for exclusive; a mask of one page splits nothing."""
    rig = rig_of(3, era="6.1")
    slot = rig.slot(pages=64)
    rig.mmu.dirty_log.clear(slot, 0, 64, words(1 << 5 | 1 << 9))
    assert rig.tables.take()[0] == ("split_huge", 0, 5, 8)


def test_with_pml_clear_clears_d() -> None:
    """3.2: D-cleared instead of W-cleared, beside the protection of large SPTEs."""
    rig = rig_of(3, kind="intel-ept")
    slot = rig.slot(pages=64)
    rig.mmu.dirty_log.clear(slot, 0, 64, words(1))
    assert rig.tables.take()[-1] == ("clear_dirty_masked", 0, 0, 1)


def test_the_capability_matters_to_later_operations_only() -> None:
    """3.4: bitmaps that exist are not filled again; GET and CLEAR follow at once."""
    rig = rig_of(0)
    slot = rig.slot(pages=PAGES)
    rig.mark(slot, 5)
    rig.mmu.dirty_log.manual = rig.mmu.dirty_log.initially_set = True
    assert rig.log(slot) == [5]
    assert rig.log(slot) == [5]
    rig.mmu.dirty_log.manual = False
    assert rig.log(slot) == [5]
    assert rig.log(slot) == []


# --- RESET (4.5, D.5) ------------------------------------------------------------------------------


def ring_rig(**options: Any) -> Rig:
    return Rig(ring_bytes=RING, **options)


def rearmed(rig: Rig) -> list[tuple[Any, ...]]:
    """Reset, and what was armed by it."""
    rig.tables.take()
    rig.mmu.dirty_log.reset_rings()
    return masked(rig.tables.take())


def test_reset_without_rings() -> None:
    """4.5: EINVAL."""
    with pytest.raises(DirtyRingModeError) as caught:
        Rig().mmu.dirty_log.reset_rings()
    assert caught.value.errno == errno.EINVAL


def test_reset_goes_on_from_where_it_stopped() -> None:
    """D.5: marking only the 4th: 0; 1 and 2: 2; then 3: 2 more.  A flush only if there was one (3.3)."""
    rig = ring_rig()
    slot = rig.slot()
    rig.mark(slot, 1, 2, 3, 4)
    rig.harvest(3)
    assert rig.mmu.dirty_log.reset_rings() == 0
    assert rig.flushes == 0
    rig.harvest(0, 1)
    assert rig.mmu.dirty_log.reset_rings() == 2
    assert rig.flushes == 1
    rig.harvest(2)
    assert rig.mmu.dirty_log.reset_rings() == 2
    assert [entry.flags for entry in rig.ring().entries[:5]] == [0] * 5
    assert [entry.offset for entry in rig.ring().entries[:4]] == [1, 2, 3, 4], "the rest of an entry stays"


@pytest.mark.parametrize(("flags", "taken"), [(0, 0), (4, 0), (1, 0), (2, 1), (3, 1), (0xFFFFFFFE, 1)])
def test_only_bit_1_counts(flags: int, taken: int) -> None:
    """D.5: any value with bit 1 set is harvested."""
    rig = ring_rig()
    rig.mark(rig.slot(), 7)
    rig.harvest(0, flags=flags)
    assert rig.mmu.dirty_log.reset_rings() == taken


def test_reset_counts_over_all_vcpus_in_index_order() -> None:
    """4.5: vCPUs in index order; the sum."""
    rig = ring_rig(vcpus=2)
    slot = rig.slot()
    rig.load(1)
    rig.mark(slot, 200)
    rig.load(0)
    rig.mark(slot, 3, 4)
    rig.harvest(vcpu=0)
    rig.harvest(vcpu=1)
    rig.tables.take()
    assert rig.mmu.dirty_log.reset_rings() == 3
    assert masked(rig.tables.take()) == [(3, 0b11), (200, 1)]
    assert rig.flushes == 1


@pytest.mark.parametrize(
    ("offsets", "batches"),
    [
        ([5], [(5, 1)]),
        ([5, 6, 7], [(5, 0b111)]),
        ([5, 68], [(5, 1 | 1 << 63)]),
        ([5, 69], [(5, 1), (69, 1)]),
        ([5, 5, 5], [(5, 1)]),
        ([68, 5], [(5, 1 | 1 << 63)]),
        ([69, 5], [(69, 1), (5, 1)]),
        ([40, 100, 39], [(39, 0b11 | 1 << 61)]),
        ([40, 103, 39], [(40, 1 | 1 << 63), (39, 1)]),
        ([10, 20, 5, 68], [(5, 1 | 1 << 5 | 1 << 15 | 1 << 63)]),
    ],
)
def test_reset_coalesces_neighbours(offsets: list[int], batches: list[tuple[int, int]]) -> None:
    """4.5: forward by up to 63; backwards as long as the mask can be shifted without loss."""
    rig = ring_rig()
    rig.mark(rig.slot(), *offsets)
    rig.harvest()
    assert rearmed(rig) == batches


def test_reset_does_not_coalesce_over_slots() -> None:
    rig = ring_rig()
    low, high = rig.slot(0), rig.slot(1, gfn=0x1000)
    rig.mark(low, 5)
    rig.mark(high, 0x1006)
    rig.mark(low, 7)
    rig.harvest()
    assert rearmed(rig) == [(5, 1), (0x1006, 1), (7, 1)]


@pytest.mark.parametrize(
    ("entry", "why"),
    [((77, 3), "no slot"), ((9 << 16, 3), "no address space"), ((0, 256), "beyond"), ((0, 1 << 63), "far")],
)
def test_reset_passes_over_what_names_no_page(entry: tuple[int, int], why: str) -> None:
    """4.5: validated and silently skipped, and counted all the same."""
    rig = ring_rig()
    slot = rig.slot()
    rig.mark(slot, 3)
    first = rig.ring().entries[0]
    first.slot, first.offset = entry
    rig.harvest()
    rig.tables.take()
    assert rig.mmu.dirty_log.reset_rings() == 1, why
    assert rig.tables.take() == []


def test_a_forward_mask_beyond_the_slot_takes_its_batch_along() -> None:
    """4.5: the check is of the highest bit, so pages of the slot in the same batch stay un-armed, too.  Only
    for offsets that userspace corrupted."""
    rig = ring_rig()
    slot = rig.slot(pages=100)
    rig.mark(slot, 60, 61)
    rig.ring().entries[1].offset = 110
    rig.harvest()
    assert rearmed(rig) == []
    rig.mark(slot, 60, 61)
    rig.ring().entries[3].offset = 160
    rig.harvest()
    assert rearmed(rig) == [(60, 1)]


def test_a_mask_that_wraps_around_arms_nothing() -> None:
    """virt/kvm/dirty_ring.c since commit 577a8d3bae05: offsets are 64-bit numbers, so 0 follows 2^64 - 1.  On
    the model only: earlier kernels reached in front of their arrays."""
    rig = ring_rig()
    rig.mark(rig.slot(), 7, 0)
    rig.ring().entries[0].offset = ALL
    rig.harvest()
    assert rearmed(rig) == []


@pytest.mark.parametrize(("wrong", "lost"), [(60, True), (70, False)])
def test_a_forward_mask_beyond_the_slot_on_kvm(system: KvmSystem, wrong: int, lost: bool) -> None:
    """The same, real: the second entry's offset is moved ``wrong`` pages behind the first one's, in a slot
    that ends after 20; within 63 pages the first page is not armed again, and its next write is lost."""
    with ring_guest(system, LEAST_RING, pages=DATA + 64 + 20) as guest:
        first = DATA + 64
        assert done(guest.store(first, 2))
        raw = RawRing(guest)
        assert raw.offset[:2].tolist() == [first, first + 1]
        raw.offset[1] = first + wrong
        raw.flags[:2] = RESET
        assert guest.vm.reset_dirty_rings() == 2
        guest.vcpu.ring.head += 2  # type: ignore[union-attr]
        assert done(guest.run(STORE, rdi=first * 4096, rax=7))
        harvest = guest.vm.collect_rings()
        assert harvest.pages.gfns(0).tolist() == ([] if lost else [first])


def test_entries_of_a_slot_that_went_or_shrank_are_ignored() -> None:
    """kvm-mmu.md 2: in ring mode pushed entries keep the old slot and offset."""
    rig = ring_rig()
    slot = rig.slot(pages=256)
    rig.mark(slot, 200)
    rig.set(pages=0)
    rig.set(pages=64, flags=LOG_DIRTY_PAGES)
    rig.harvest()
    assert rearmed(rig) == []


def test_a_page_with_a_second_unharvested_entry_is_armed_too() -> None:
    """4.7: the reset arms the gfn, not the entry."""
    rig = ring_rig()
    rig.mark(rig.slot(), 9, 9)
    rig.harvest(0)
    assert rearmed(rig) == [(9, 1)]
    assert rig.pushed() == [(0, 9)]


# --- the bitmap itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 127, 128, 200])
def test_initially_set_fills_exactly_the_pages(npages: int) -> None:
    """3.5: exactly npages bits; the padding is never set."""
    bitmap = DirtyBitmap(npages, initially_set=True)
    assert sum(int(word).bit_count() for word in bitmap.words()) == npages
    assert list(bitmap.nonzero()) == list(range(-(-npages // 64)))
    last = bitmap.nwords - 1
    assert bitmap.exchange(last) == (1 << (npages - 64 * last)) - 1
    assert bitmap.exchange(last) == 0
    assert sum(int(word).bit_count() for word in bitmap.words()) == 64 * last


def test_a_mark_in_an_initially_set_bitmap_changes_nothing() -> None:
    bitmap = DirtyBitmap(70, initially_set=True)
    bitmap.mark(65)
    assert bitmap.words().tolist() == [ALL, (1 << 6) - 1]
    assert bitmap.clear(1, 0b10) == 0b10
    assert not bitmap.is_marked(65)
    assert bitmap.is_marked(64)


def test_words_are_a_copy() -> None:
    bitmap = DirtyBitmap(64)
    bitmap.mark(3)
    taken = bitmap.words()
    taken[0] = 0
    assert bitmap.is_marked(3)


def test_errors_are_kvm_s() -> None:
    """Every refusal here is a KvmError with an errno."""
    assert all(
        issubclass(kind, KvmError) for kind in (ClearRangeError, DirtyRingModeError, LoggingDisabledError)
    )
