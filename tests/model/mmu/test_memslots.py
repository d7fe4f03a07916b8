"""Memslots of the model: every row of kvm-mmu.md 2, in KVM's order of checks, and the same on a real KVM.

What a change asks of the MMU is seen by stand-ins (tests/model/mmu/foundation.py).
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from pykvm.abi import ffi
from pykvm.errors import (
    KvmError,
    SlotAbsentError,
    SlotAlignmentError,
    SlotChangeError,
    SlotError,
    SlotOverlapError,
)
from pykvm.kvm import KvmSystem, KvmVm
from pykvm.memory import PAGE_SIZE
from pykvm.model.mmu.memslots import INVALID, LOG_DIRTY_PAGES, READONLY, Memslot
from tests.kvm.tiny import DATA, Tiny
from tests.model.mmu.foundation import HOST, Rig

MAX_PAGES = (1 << 31) - 1
KERNEL_HALF = 0xFFFF_8880_0000_0000
_AREA = mmap.mmap(-1, 32 * PAGE_SIZE)


# --- the decision table ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A call of KVM_SET_USER_MEMORY_REGION against slots 0 (pages 0 to 3) and 1 (pages 8 to 11), and how it
    ends: an errno, or 0.  ``host`` counts from the address of the slot's memory, unless it is ``address``."""

    error: int
    kind: type[KvmError] | None = None
    slot: int = 2
    flags: int = 0
    gpa: int = 0x10_0000
    size: int = 4 * PAGE_SIZE
    host: int = 0
    address: int | None = None


REFUSED = errno.EINVAL
ROWS = {
    "unknown flag": Row(REFUSED, SlotError, flags=1 << 31),
    "unknown flag beside a known one": Row(REFUSED, SlotError, flags=LOG_DIRTY_PAGES | 8),
    "gpa not aligned": Row(REFUSED, SlotAlignmentError, gpa=0x10_0800),
    "size not aligned": Row(REFUSED, SlotAlignmentError, size=0x1800),
    "hva not aligned": Row(REFUSED, SlotAlignmentError, host=0x10),
    "hva of the kernel": Row(REFUSED, SlotError, address=KERNEL_HALF),
    "gpa and size wrap": Row(REFUSED, SlotError, gpa=(1 << 64) - PAGE_SIZE),
    "gpa and size end at 2^64": Row(REFUSED, SlotError, gpa=(1 << 64) - 4 * PAGE_SIZE),
    "no such address space": Row(REFUSED, SlotError, slot=7 << 16),
    "the last id": Row(0, slot=32763),
    "id of an internal slot": Row(REFUSED, SlotError, slot=32764),
    "id beyond all slots": Row(REFUSED, SlotError, slot=0xFFFF),
    "too many pages": Row(REFUSED, SlotError, size=(MAX_PAGES + 1) * PAGE_SIZE),
    "delete an absent slot": Row(REFUSED, SlotAbsentError, size=0),
    "delete": Row(0, slot=0, size=0),
    "delete, whatever the address": Row(0, slot=0, size=0, gpa=0x70_0000),
    "delete, but gpa not aligned": Row(REFUSED, SlotAlignmentError, slot=0, size=0, gpa=0x10),
    "create": Row(0),
    "create logging and read-only": Row(0, flags=LOG_DIRTY_PAGES | READONLY),
    "create over the first page of a slot": Row(errno.EEXIST, SlotOverlapError, gpa=0, size=PAGE_SIZE),
    "create over the last page of a slot": Row(errno.EEXIST, SlotOverlapError, gpa=3 * PAGE_SIZE),
    "create around a slot": Row(errno.EEXIST, SlotOverlapError, gpa=4 * PAGE_SIZE, size=16 * PAGE_SIZE),
    "create right behind a slot": Row(0, gpa=4 * PAGE_SIZE),
    "alignment before absence": Row(REFUSED, SlotAlignmentError, size=0, gpa=0x10),
    "absence before overlap": Row(REFUSED, SlotAbsentError, size=0, gpa=0),
    "other memory": Row(REFUSED, SlotChangeError, slot=0, gpa=0, host=PAGE_SIZE),
    "more pages": Row(REFUSED, SlotChangeError, slot=0, gpa=0, size=5 * PAGE_SIZE),
    "fewer pages": Row(REFUSED, SlotChangeError, slot=0, gpa=0, size=3 * PAGE_SIZE),
    "READONLY of a live slot": Row(REFUSED, SlotChangeError, slot=0, gpa=0, flags=READONLY),
    "resize before overlap": Row(REFUSED, SlotChangeError, slot=0, gpa=8 * PAGE_SIZE, size=5 * PAGE_SIZE),
    "move": Row(0, slot=0, gpa=0x20_0000),
    "move over its own pages": Row(0, slot=0, gpa=2 * PAGE_SIZE),
    "move onto another slot": Row(errno.EEXIST, SlotOverlapError, slot=0, gpa=6 * PAGE_SIZE),
    "move and log": Row(0, slot=0, gpa=0x20_0000, flags=LOG_DIRTY_PAGES),
    "flags": Row(0, slot=0, gpa=0, flags=LOG_DIRTY_PAGES),
    "identical": Row(0, slot=0, gpa=0),
    "beyond 52 bits": Row(REFUSED, SlotError, gpa=1 << 52),
    "move beyond 52 bits": Row(REFUSED, SlotError, slot=0, gpa=1 << 52),
}  # fmt: skip


def check(row: Row, call: Callable[[], object], *, exact: bool) -> None:
    """Make the call and hold its end against the row; ``exact``: the class of the error, too."""
    if not row.error:
        call()
        return
    with pytest.raises(KvmError) as caught:
        call()
    assert caught.value.errno == row.error
    assert type(caught.value) is row.kind if exact else isinstance(caught.value, SlotError)


@pytest.mark.parametrize("kind", ["pvm-shadow", "amd-shadow", "amd-npt", "intel-ept"])
@pytest.mark.parametrize("name", ROWS)
def test_each_row_on_the_model(name: str, kind: str) -> None:
    """kvm-mmu.md 2, decision table."""
    row = ROWS[name]
    rig = Rig(kind)
    rig.set(0)
    rig.set(1, gfn=8)
    address = HOST + row.host if row.address is None else row.address
    memslots = rig.mmu.memslots
    memory = memoryview(bytearray(PAGE_SIZE))
    check(
        row, lambda: memslots.set_region(row.slot, row.flags, row.gpa, row.size, address, memory), exact=True
    )


@pytest.mark.parametrize("name", ROWS)
def test_each_row_on_kvm(vm: KvmVm, name: str) -> None:
    """The same calls, real.  Read-only slots need a capability that all hosts have since Linux 3.7."""
    row = ROWS[name]
    host = int(ffi.cast("uintptr_t", ffi.from_buffer(_AREA)))
    vm.set_user_memory_region(0, 0, 0, 4 * PAGE_SIZE, host)
    vm.set_user_memory_region(1, 0, 8 * PAGE_SIZE, 4 * PAGE_SIZE, host)
    address = host + row.host if row.address is None else row.address
    check(
        row, lambda: vm.set_user_memory_region(row.slot, row.flags, row.gpa, row.size, address), exact=False
    )


def test_the_last_gfn_is_the_host_s_with_the_tdp_mmu_only() -> None:
    """hosts.md D.1: accepted in shadow mode (52-bit gfns), EINVAL with the TDP MMU."""
    beyond = 1 << 46 - 12
    Rig("amd-shadow").set(gfn=beyond)
    Rig("amd-npt-oldmmu").set(gfn=beyond)
    with pytest.raises(SlotError) as caught:
        Rig("amd-npt").set(gfn=beyond)
    assert caught.value.errno == errno.EINVAL
    Rig("amd-npt").set(gfn=beyond - 4)


def test_as_many_pages_as_a_slot_can_have() -> None:
    """kvm-mmu.md 2: 2^31-1 pages; the model's cost does not follow the size."""
    slot = Rig().set(pages=MAX_PAGES)
    assert slot is not None
    assert slot.npages == MAX_PAGES


# --- address spaces and generations ----------------------------------------------------------------


def test_address_spaces_do_not_see_each_other() -> None:
    """kvm-mmu.md 2: bits 31:16 of the id; overlap counts inside one address space only."""
    rig = Rig("amd-shadow")
    rig.set(0)
    rig.set(1 << 16, gfn=2)
    memslots = rig.mmu.memslots
    in_space_0, in_space_1 = memslots.lookup(2, 0), memslots.lookup(2, 1)
    assert in_space_0 is not None
    assert in_space_1 is not None
    assert (in_space_0.as_id, in_space_1.as_id) == (0, 1)
    assert (in_space_0.ring_id, in_space_1.ring_id) == (0, 1 << 16)
    assert memslots.lookup(5, 0) is None
    assert memslots.npages == 8
    with pytest.raises(SlotError):
        rig.set(2 << 16)
    with pytest.raises(SlotError):
        Rig("pvm-shadow").set(1 << 16)


@pytest.mark.parametrize(("kind", "spaces"), [("pvm-shadow", 1), ("amd-shadow", 2)])
def test_generations(kind: str, spaces: int) -> None:
    """kvm-mmu.md 2: create and flags one step, move and delete two, nothing for nothing; a step is the number
    of address spaces, so that spaces never share a number; the other space's stays."""
    rig = Rig(kind)
    memslots = rig.mmu.memslots
    assert memslots.generations == list(range(spaces))
    steps = []
    for change in (
        lambda: rig.set(),
        lambda: rig.set(flags=LOG_DIRTY_PAGES),
        lambda: rig.set(flags=LOG_DIRTY_PAGES),
        lambda: rig.set(gfn=100, flags=LOG_DIRTY_PAGES),
        lambda: rig.set(pages=0, gfn=100),
    ):
        before = memslots.generations[0]
        change()
        steps.append((memslots.generations[0] - before) / spaces)
    assert steps == [1, 1, 0, 2, 2]
    if spaces == 2:
        assert memslots.generations[1] == 1
        rig.set(1 << 16)
        assert memslots.generations == [12, 3]


def test_a_refused_change_publishes_nothing() -> None:
    """kvm-mmu.md 2: refusals of the arguments come before the INVALID slot."""
    rig = Rig()
    rig.set()
    before = list(rig.mmu.memslots.generations)
    for change in ({"flags": READONLY}, {"pages": 5}, {"host": HOST + PAGE_SIZE}):
        with pytest.raises(SlotError):
            rig.set(**change)  # type: ignore[arg-type]
    assert rig.mmu.memslots.generations == before
    assert rig.tables.take() == []


# --- lookup ----------------------------------------------------------------------------------------


def test_lookup_at_every_border() -> None:
    rig = Rig()
    rig.set(5, gfn=16, pages=4)
    rig.set(3, gfn=20, pages=1)
    rig.set(9, gfn=64, pages=2)
    found = {gfn: rig.mmu.memslots.lookup(gfn) for gfn in (0, 15, 16, 19, 20, 21, 63, 64, 65, 66)}
    assert {gfn: slot.id for gfn, slot in found.items() if slot} == {16: 5, 19: 5, 20: 3, 64: 9, 65: 9}
    assert [slot.id for slot in rig.mmu.memslots.all()] == [3, 5, 9]


def test_aliases_are_slots_of_their_own() -> None:
    """hosts.md D.1: slots on the same hva; only the one written through gets the bit."""
    rig = Rig()
    low, high = rig.slot(0, gfn=0, pages=4), rig.slot(1, gfn=64, pages=4)
    rig.mark(high, 65)
    assert (rig.log(low), rig.log(high)) == ([], [1])


# --- effects ---------------------------------------------------------------------------------------


def tracked(rig: Rig, slot: Memslot, gfn: int) -> int:
    return rig.mmu.page_track.count(slot, gfn)


@dataclass
class Effect:
    """What a change does: kvm-mmu.md 2, table of effects."""

    change: str
    zaps: bool
    steps: int
    bits: str
    """What becomes of unread bits: kept, lost, or none were there."""
    metadata: str
    asked: list[tuple[object, ...]] = field(default_factory=list)


EFFECTS = (
    Effect("delete", zaps=True, steps=2, bits="freed", metadata="freed", asked=[("zap_all_fast",)]),
    Effect("move", zaps=True, steps=2, bits="kept", metadata="new", asked=[("zap_all_fast",)]),
    Effect("log on", zaps=False, steps=1, bits="new", metadata="kept",
           asked=[("split_huge", 0, 0, 255), ("write_protect_slot", 0, 1)]),
    Effect("log off", zaps=False, steps=1, bits="freed", metadata="kept", asked=[("recover_huge", 0)]),
    Effect("create logging", zaps=False, steps=1, bits="new", metadata="new"),
    Effect("create", zaps=False, steps=1, bits="none", metadata="new"),
    Effect("nothing", zaps=False, steps=0, bits="kept", metadata="kept"),
)  # fmt: skip


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.change)
def test_each_effect(effect: Effect) -> None:
    """kvm-mmu.md 2, table of effects: a slot of 256 pages, a mark on page 7, a track count on page 9."""
    rig = Rig()
    rig.set(1, gfn=0x1000)
    slot: Memslot | None = None
    if not effect.change.startswith("create"):
        slot = rig.slot(flags=0 if effect.change == "log on" else LOG_DIRTY_PAGES)
        rig.mark(slot, 7)
        rig.mmu.page_track.add(slot, 9)
    rig.tables.take()
    old_rmap = slot.rmap if slot else None
    before = rig.mmu.memslots.generations[0]
    match effect.change:
        case "delete":
            rig.set(pages=0)
        case "move":
            rig.set(gfn=512, pages=256, flags=LOG_DIRTY_PAGES)
        case "log on" | "create logging" | "nothing":
            slot = rig.set(pages=256, flags=LOG_DIRTY_PAGES)
        case "log off" | "create":
            slot = rig.set(pages=256)
    assert rig.mmu.memslots.generations[0] - before == 2 * effect.steps
    assert rig.tables.take() == effect.asked
    after = rig.mmu.memslots.slot(0)
    if effect.change == "delete":
        assert after is None
        return
    assert after is not None
    assert not after.flags & INVALID
    bits = {"kept": [7], "new": [], "freed": None, "none": None}[effect.bits]
    assert bits == (rig.log(after) if after.dirty_bitmap is not None else None)
    if effect.metadata == "kept":
        assert after.rmap is old_rmap
        assert tracked(rig, after, 9) == 1
        assert after.lpage_disallowed(9, 2)
    else:
        assert after.rmap is not None
        assert after.rmap is not old_rmap
        assert after.gfn_write_track == {}
        assert after.disallow_lpage == {}


def test_the_slot_is_invalid_while_it_is_zapped() -> None:
    """kvm-mmu.md 2: DELETE and MOVE publish the slot as INVALID first, so that faults on it retry."""
    for change in ({"pages": 0}, {"gfn": 64}):
        rig = Rig()
        rig.set()
        seen: list[tuple[bool, bool]] = []
        memslots = rig.mmu.memslots

        def look(seen: list[tuple[bool, bool]] = seen, memslots: object = memslots) -> None:
            found = memslots.lookup(1)  # type: ignore[attr-defined]
            seen.append((bool(found and found.flags & INVALID), memslots.visible(1) is None))  # type: ignore[attr-defined]

        rig.tables.zap_all_fast = look  # type: ignore[method-assign]
        rig.set(**change)  # type: ignore[arg-type]
        assert seen == [(True, True)]


def test_a_move_keeps_stale_bits_by_index() -> None:
    """kvm-mmu.md 2: the bits keep their slot-relative index, and denote other addresses then."""
    rig = Rig()
    slot = rig.slot(gfn=0)
    rig.mark(slot, 3, 200)
    rig.set(gfn=0x4000, pages=256, flags=LOG_DIRTY_PAGES)
    assert rig.log(slot) == [3, 200]
    rig.mark(slot, 0x4000 + 5)
    assert rig.log(slot) == [5]


def test_a_move_may_change_logging_on_the_way() -> None:
    """``kvm_prepare_memory_region``: a moved slot that begins to log gets a bitmap, without protecting
    anything (its mappings are gone); one that stops loses it."""
    rig = Rig()
    slot = rig.slot(flags=0)
    rig.set(gfn=512, pages=256, flags=LOG_DIRTY_PAGES)
    assert slot.dirty_bitmap is not None
    assert rig.tables.take() == [("zap_all_fast",)]
    assert rig.flushes == 0
    rig.set(gfn=0, pages=256)
    assert slot.dirty_bitmap is None
    assert rig.tables.take() == [("zap_all_fast",)]


def test_a_move_that_is_refused_late_has_zapped_everything() -> None:
    """virt/kvm/kvm_main.c, kvm_set_memslot: the INVALID slot is published before the architecture is asked;
    its refusal publishes the old one again."""
    rig = Rig()
    slot = rig.slot()
    rig.mark(slot, 7)
    before = rig.mmu.memslots.generations[0]
    with pytest.raises(SlotError):
        rig.set(gfn=1 << 40, pages=256, flags=LOG_DIRTY_PAGES)
    assert rig.tables.take() == [("zap_all_fast",)]
    assert rig.mmu.memslots.generations[0] - before == 2 * 2
    assert rig.mmu.memslots.visible(7) is slot
    assert (slot.base_gfn, slot.flags) == (0, LOG_DIRTY_PAGES)
    assert rig.log(slot) == [7]


def test_a_move_that_is_refused_late_has_zapped_everything_on_kvm(system: KvmSystem) -> None:
    """The same, real: the slot stays, its mappings do not."""
    with Tiny(system.create_machine()) as guest:
        guest.store(DATA, 4)
        mapped = guest.vm.statistics().value("pages_4k")
        guest.vm.get_dirty_log(guest.slot)
        guest.store(DATA + 2)
        with pytest.raises(SlotError) as caught:
            guest.slot.move(1 << 52)
        assert caught.value.errno == errno.EINVAL
        assert mapped >= 4
        assert guest.vm.statistics().value("pages_4k") == 0
        assert guest.vm.get_dirty_log(guest.slot).tolist() == [DATA + 2]
        guest.store(DATA + 3)
        assert guest.vm.get_dirty_log(guest.slot).tolist() == [DATA + 3]


def test_a_create_that_is_refused_has_zapped_nothing() -> None:
    rig = Rig()
    with pytest.raises(SlotError):
        rig.set(gfn=1 << 40)
    assert rig.tables.take() == []
    assert rig.mmu.memslots.generations[0] == 0
    assert rig.mmu.memslots.lookup(1 << 40) is None


@pytest.mark.parametrize(("era", "refused"), [("6.1", False), ("6.12", True), ("7.2", True)])
def test_a_slot_may_not_move_under_an_external_tracker(era: str, refused: bool) -> None:
    """kvm-mmu.md 2: MOVE is EINVAL since 6.12 if an external page-track user exists, but an overlap is said
    first; the user is told that its counts are gone either way."""
    rig = Rig("amd-shadow", era)
    slot = rig.slot()
    rig.slot(1, gfn=0x1000)

    class Node:
        def __init__(self) -> None:
            self.removed: list[tuple[int, int]] = []

        def track_write(self, gpa: int, new: bytes) -> None: ...

        def track_remove_region(self, gfn: int, pages: int) -> None:
            self.removed.append((gfn, pages))

    node = Node()
    rig.mmu.page_track.register(node)
    with pytest.raises(SlotOverlapError):
        rig.set(gfn=0x1000, pages=256, flags=LOG_DIRTY_PAGES)
    assert node.removed == []
    if refused:
        with pytest.raises(SlotChangeError) as caught:
            rig.set(gfn=0x2000, pages=256, flags=LOG_DIRTY_PAGES)
        assert caught.value.errno == errno.EINVAL
    else:
        rig.set(gfn=0x2000, pages=256, flags=LOG_DIRTY_PAGES)
    assert slot.base_gfn == (0 if refused else 0x2000)
    assert node.removed == [(0, 256)]
    rig.mmu.page_track.unregister(node)
    rig.set(gfn=0x3000, pages=256, flags=LOG_DIRTY_PAGES)
    assert slot.base_gfn == 0x3000


def test_every_change_voids_the_remembered_mmio_address() -> None:
    """kvm-mmu.md 2: any update invalidates the cached MMIO address of every vCPU."""
    rig = Rig(vcpus=2)
    for change in ({}, {"flags": LOG_DIRTY_PAGES}, {"gfn": 64, "flags": LOG_DIRTY_PAGES}, {"pages": 0}):
        before = [vcpu.mmio_forgotten for vcpu in rig.vcpus]
        rig.set(**change)  # type: ignore[arg-type]
        assert all(now.mmio_forgotten > then for now, then in zip(rig.vcpus, before, strict=True))
    before = [vcpu.mmio_forgotten for vcpu in rig.vcpus]
    rig.set()
    rig.set()
    assert all(now.mmio_forgotten == then + 1 for now, then in zip(rig.vcpus, before, strict=True))


# --- large pages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "pages", "host", "allowed"),
    [
        (0, 1024, 0, [0, 1]),
        (512, 1024, 512, [1, 2]),
        (256, 1024, 256, [1]),
        (0, 1000, 0, [0]),
        (0, 511, 0, []),
        (0, 1024, 1, []),
        (0, 1024, 512, [0, 1]),
        (100, 2048, 100, [1, 2, 3]),
    ],
)
def test_the_shape_of_a_slot_forbids_large_pages(
    base: int, pages: int, host: int, allowed: list[int]
) -> None:
    """kvm-mmu.md 2, ``disallow_lpage`` seed: the ends that are not aligned, or all where gpa and hva are not
    congruent; ``host`` is the page number of the memory."""
    rig = Rig()
    slot = rig.set(gfn=base, pages=pages, host=HOST + host * PAGE_SIZE)
    assert slot is not None
    covered = range(base >> 9, (base + pages - 1 >> 9) + 1)
    assert [unit for unit in covered if not slot.lpage_disallowed(unit << 9, 2)] == allowed


def test_a_gib_needs_its_own_congruence() -> None:
    rig = Rig()
    gib = 1 << 18
    same, other = rig.set(pages=gib), rig.set(1, gfn=gib, pages=gib, host=HOST + (512 << 12))
    assert same is not None
    assert other is not None
    assert not same.lpage_disallowed(5, 3)
    assert other.lpage_disallowed(gib + 5, 3)
    assert not other.lpage_disallowed(gib + 5, 2)
    same.change_lpage(700, 1)
    assert same.lpage_disallowed(5, 3)
    assert not same.lpage_disallowed(5, 2)
    assert same.lpage_disallowed(1000, 2)
    same.change_lpage(700, -1)
    assert not same.lpage_disallowed(5, 3)


# --- what a slot costs -----------------------------------------------------------------------------


def test_metadata_of_64_gib_as_measured() -> None:
    """hosts.md G: rmap 134.76 MB, counts 33.65 MB, lpage_info 0.14 MB; bitmaps 4.21 MB."""
    rig = Rig()
    pages = 64 << 18
    slot = rig.slot(pages=pages)
    cost = slot.metadata_bytes(rmap=True, write_track=True, ring=False)
    assert cost == {
        "rmap": 8 * (pages + pages // 512 + 64),
        "lpage_info": 4 * (pages // 512 + 64),
        "gfn_write_track": 2 * pages,
        "dirty_bitmap": 2 * pages // 8,
    }
    assert round((sum(cost.values()) - cost["dirty_bitmap"]) / pages, 2) == 10.02
    assert slot.metadata_bytes(rmap=True, write_track=True, ring=True)["dirty_bitmap"] == 0
    assert slot.metadata_bytes(rmap=False, write_track=False, ring=False)["rmap"] == 0


def test_metadata_of_a_slot_that_is_not_aligned() -> None:
    """``__kvm_mmu_slot_lpages``: every large page that the slot touches has an entry, partial or not."""
    slot = Rig().slot(gfn=511, pages=514)
    cost = slot.metadata_bytes(rmap=True, write_track=True, ring=False)
    assert cost["lpage_info"] == 4 * (3 + 1)
    assert cost["rmap"] == 8 * (514 + 3 + 1)
    assert cost["dirty_bitmap"] == 2 * 8 * 9


def test_the_model_s_cost_follows_what_is_used() -> None:
    """A slot of a TiB costs nothing before somebody marks, tracks or maps in it."""
    rig = Rig()
    slot = rig.slot(pages=1 << 28)
    rig.mark(slot, 5, (1 << 28) - 1)
    assert slot.dirty_bitmap is not None
    assert list(slot.dirty_bitmap.nonzero()) == [0, (1 << 22) - 1]
    assert slot.dirty_bitmap.nwords == 1 << 22
