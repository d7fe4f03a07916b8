"""The three trackers, on both machines: exactly what the guest wrote, no page lost, whatever the order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from pykvm.errors import (
    CapabilityError,
    DirtyRingModeError,
    LoggingDisabledError,
    RingOrderError,
    RingOverflowError,
    RingSizeError,
    UsageError,
)
from pykvm.kvm import KvmVm
from pykvm.kvm.exits import decode
from pykvm.machine import DirtyRingFull, Gfns, Halted, Registers, Slot, SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.track import TRACKERS, ManualTracker, RingTracker, Tracker, make_tracker
from pykvm.track.manual import clear_ranges
from tests.backends import on_kvm
from tests.rings import LEAST_RING

from .conftest import CODE, PAGES, Rig, store_code

MakeRig = Callable[..., Rig]
DATA = range(2, PAGES)

VARIANTS = {
    "bitmap": lambda: make_tracker("bitmap"),
    "manual": lambda: make_tracker("manual"),
    "manual in chunks": lambda: make_tracker("manual", clear_chunk=64),
    "smallest ring": lambda: make_tracker("ring", ring_entries=LEAST_RING),
    "ring of 65536": lambda: make_tracker("ring", ring_entries=65536),
}


@pytest.fixture(params=VARIANTS, ids=[name.replace(" ", "-") for name in VARIANTS])
def tracker(request: pytest.FixtureRequest) -> Tracker:
    return VARIANTS[request.param]()


def test_every_round_reports_exactly_what_was_written(rig: MakeRig, tracker: Tracker) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    machine = rig(tracker)
    tracker.arm(machine.vm)
    machine.reported()
    for _ in range(12):
        written = choose.sample(DATA, choose.randrange(0, 120))
        machine.store(written + written[:20])
        assert machine.reported() == set(written)
    assert machine.reported() == set()


def test_a_page_written_in_every_round_is_reported_in_every_round(rig: MakeRig, tracker: Tracker) -> None:
    """The re-arming works: a page that was collected is noticed again."""
    machine = rig(tracker)
    tracker.arm(machine.vm)
    for _ in range(5):
        machine.store([7, 255])
        assert machine.reported() == {7, 255}


def test_several_collections_without_writes_are_empty(rig: MakeRig, tracker: Tracker) -> None:
    machine = rig(tracker)
    tracker.arm(machine.vm)
    machine.store([9])
    assert machine.reported() == {9}
    assert machine.reported() == machine.reported(final=True) == set()


def test_writes_before_arming_and_after_disarming_are_not_reported(rig: MakeRig, tracker: Tracker) -> None:
    machine = rig(tracker)
    machine.store([3])
    tracker.arm(machine.vm)
    assert machine.reported() == set()
    machine.store([4])
    tracker.disarm()
    machine.store([5])
    tracker.arm(machine.vm)
    assert machine.reported() == set()
    machine.store([6])
    assert machine.reported() == {6}


def test_only_writable_slots_are_armed(rig: MakeRig, tracker: Tracker) -> None:
    machine = rig(tracker)
    with GuestMemory(16 * PAGE_SIZE) as rom:
        slot = machine.vm.create_slot(rom, 1 << 30, flags=SlotFlags.READONLY)
        tracker.arm(machine.vm)
        assert slot.flags == SlotFlags.READONLY
        assert machine.slot.flags == SlotFlags.LOG_DIRTY_PAGES
        tracker.disarm()
        assert machine.slot.flags == SlotFlags.NONE


def test_a_deleted_slot_is_left_out(rig: MakeRig, tracker: Tracker) -> None:
    machine = rig(tracker)
    with GuestMemory(16 * PAGE_SIZE) as other:
        slot = machine.vm.create_slot(other, 1 << 30)
        tracker.arm(machine.vm)
        machine.store([8])
        slot.delete()
        assert machine.reported() == {8}
        tracker.disarm()


def test_a_final_collection_kicks_running_vcpus_and_they_go_on(rig: MakeRig, tracker: Tracker) -> None:
    """inc byte [0] of page 0x10 and jump back, for ever: the vCPU is inside KVM_RUN during collections."""
    machine = rig(tracker, vcpus=2)
    machine.memory.write(0x9000, b"\xb8\x00\x10\x8e\xd8" + b"\xfe\x06\x00\x00" + b"\xeb\xfe")
    vcpu = machine.vcpus[1]
    registers = vcpu.get_registers()
    registers.rip = 0x9000
    vcpu.set_registers(registers)
    tracker.arm(machine.vm)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            vcpu.run()

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        # KVM logs the page when it makes it writable.  A kick between that and the store has the next entry
        # log it again, so what counts begins with the store that is seen in memory.
        seen: set[int] = set()
        for _ in range(200):
            written = machine.memory.read(0x10 * PAGE_SIZE, 1) == b"\2"
            seen |= machine.reported(final=True)
            if written:
                break
            time.sleep(0.001)  # kicked without a pause, a guest gets nowhere
        assert written
        assert 0x10 in seen
        assert machine.reported(final=True) <= {9}
    finally:
        stop.set()
        vcpu.kick()
        thread.join(10)
    assert not thread.is_alive()


def test_using_a_tracker_out_of_order_is_refused(rig: MakeRig, tracker: Tracker) -> None:
    machine = rig(tracker)
    with pytest.raises(UsageError, match="call arm"):
        tracker.collect()
    tracker.disarm()
    tracker.arm(machine.vm)
    with pytest.raises(UsageError, match="armed already"):
        tracker.arm(machine.vm)


def test_initially_set_reports_every_page_first(rig: MakeRig) -> None:
    machine = rig(ManualTracker(initially_set=True))
    machine.tracker.arm(machine.vm)
    assert machine.reported() == set(range(PAGES)) - {1}
    machine.store([77])
    assert machine.reported() == {77}


def test_manual_reports_again_what_was_not_rearmed(rig: MakeRig) -> None:
    """A dropped collection loses nothing (api.rst 4.117: GET does not clear)."""
    machine = rig(ManualTracker())
    machine.tracker.arm(machine.vm)
    machine.store([10, 20])
    assert (0, 20) in machine.tracker.collect()
    again = machine.tracker.collect()
    assert {(0, 10), (0, 20)} <= set(again)
    machine.tracker.rearm(again)
    assert not machine.tracker.collect()


def test_a_ring_stopped_by_its_limit_loses_nothing(rig: MakeRig) -> None:
    """More marks than the ring holds, taken by on_ring_full and handed out by the next collection."""
    machine = rig(RingTracker(LEAST_RING))
    machine.tracker.arm(machine.vm)
    machine.store(list(DATA) * 4)
    assert machine.reported() == set(DATA)


@on_kvm
def test_asking_for_a_full_ring_leaves_the_exit_to_its_thread(rig: MakeRig) -> None:
    """A collector asks from another thread, which may be faster than the one that came out with the exit."""
    if LEAST_RING > PAGES:
        pytest.skip(
            f"the smallest ring here has {LEAST_RING} entries, and the guest of this test {PAGES} pages"
        )
    machine = rig(RingTracker(LEAST_RING))
    machine.tracker.arm(machine.vm)
    vcpu = machine.vcpus[0]
    for first in range(
        10, PAGES - 40, 40
    ):  # other pages each time: one that is dirty may need no entry again
        machine.memory.write(CODE, store_code(range(first, first + 40)))
        vcpu.set_registers(Registers(rip=CODE))
        if isinstance(vcpu.run(), DirtyRingFull):
            break
    assert [vcpu.take_ring_full() for _ in range(3)] == [True, False, False]
    assert vcpu._page is not None
    assert decode(vcpu._page, int) == DirtyRingFull()
    machine.tracker.collect()
    assert vcpu.run() == Halted()


def test_an_overflow_raises_and_the_guest_can_go_on(rig: MakeRig) -> None:
    """docs/reference/hosts.md D.7: 250 stores in one emulated batch are more than the ring holds.

    A host that checks the limit at every exit loses nothing instead, and must report the exact set.
    """
    tracker = RingTracker(LEAST_RING)
    machine = rig(tracker)
    tracker.arm(machine.vm)
    pages = list(DATA) + list(DATA)[:50]
    machine.memory.write(CODE, store_code(pages))
    vcpu = machine.vcpus[0]
    vcpu.set_registers(Registers(rip=CODE))
    for _ in range(20):
        exit_ = vcpu.run()
        if isinstance(exit_, Halted):
            break
        assert isinstance(exit_, DirtyRingFull)
        tracker.on_ring_full(vcpu)
    assert isinstance(exit_, Halted)
    try:
        assert machine.reported() == set(DATA)
    except RingOverflowError:
        for _ in range(2):
            with pytest.raises(RingOverflowError):
                tracker.collect()
            machine.store(list(DATA))
    tracker.disarm()
    machine.store(list(DATA) * 3)


def test_stale_entries_are_dropped_and_counted(rig: MakeRig) -> None:
    tracker = RingTracker(LEAST_RING)
    machine = rig(tracker)
    with GuestMemory(64 * PAGE_SIZE) as first, GuestMemory(64 * PAGE_SIZE) as second:
        machine.slot.delete()
        low = machine.vm.create_slot(machine.memory, 0, size=64 * PAGE_SIZE, slot_id=0)
        gone = machine.vm.create_slot(first, 64 * PAGE_SIZE, slot_id=1)
        moved = machine.vm.create_slot(second, 128 * PAGE_SIZE, slot_id=2)
        tracker.arm(machine.vm)
        machine.store([3, 64, 65, 128, 4])
        gone.delete()
        moved.move(192 * PAGE_SIZE)
        pages = tracker.collect()
        assert {gfn for slot, gfn in pages if slot == low.id} - {1} == {3, 4}
        assert not len(pages.gfns(1))
        assert not len(pages.gfns(2))
        assert tracker.stale == 3
        machine.store([192])
        assert (2, 192) in tracker.collect()


def test_a_slot_made_under_an_old_id_does_not_inherit_its_entries(rig: MakeRig) -> None:
    tracker = RingTracker(LEAST_RING)
    machine = rig(tracker)
    with GuestMemory(16 * PAGE_SIZE) as first, GuestMemory(16 * PAGE_SIZE) as second:
        machine.slot.delete()
        machine.vm.create_slot(machine.memory, 0, size=64 * PAGE_SIZE, slot_id=0)
        old = machine.vm.create_slot(first, 64 * PAGE_SIZE, slot_id=1)
        tracker.arm(machine.vm)
        machine.store([66])
        old.delete()
        machine.vm.create_slot(second, 64 * PAGE_SIZE, slot_id=1, flags=SlotFlags.LOG_DIRTY_PAGES)
        assert not len(tracker.collect().gfns(1))
        assert tracker.stale == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_the_wrong_mode_is_explained(vm: KvmVm, name: str) -> None:
    with GuestMemory(1 << 20) as memory:
        slot = vm.create_slot(memory, 0)
        make_tracker(name).prepare(vm)
        if name == "ring":
            with pytest.raises(DirtyRingModeError, match="collect_rings"):
                vm.get_dirty_log(slot)
        else:
            with pytest.raises(LoggingDisabledError, match="LOG_DIRTY_PAGES"):
                vm.get_dirty_log(slot)
            with pytest.raises(DirtyRingModeError, match="no dirty rings"):
                vm.collect_rings()


def test_a_ring_too_late_or_of_a_wrong_size(vm: KvmVm) -> None:
    for entries in (0, 3, 100):
        with pytest.raises((RingSizeError, UsageError), match="power of two"):
            RingTracker(entries)
    for entries in (1, 16, 128):
        with pytest.raises(RingSizeError, match="too few"):
            RingTracker(entries).prepare(vm)
    with pytest.raises(RingSizeError, match="more than"):
        RingTracker(131072).prepare(vm)
    vm.create_vcpu()
    with pytest.raises(RingOrderError, match="before the first vCPU"):
        RingTracker(4096).prepare(vm)


def test_ring_without_prepare_is_refused(rig: MakeRig) -> None:
    machine = rig(make_tracker("bitmap"))
    with pytest.raises(UsageError, match="prepare"):
        RingTracker(LEAST_RING).arm(machine.vm)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dirty", {}),
        ("manual", {"clear_chunk": 100}),
        ("manual", {"clear_chunk": 0}),
        ("ring", {"ring_entries": 5}),
    ],
)
def test_bad_choices_are_one_sentence(name: str, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"\.$"):
        make_tracker(name, **options)


def test_the_ring_of_another_machines_vcpu_is_refused(rig: MakeRig) -> None:
    one, other = rig(RingTracker(LEAST_RING)), rig(RingTracker(LEAST_RING))
    with pytest.raises(UsageError, match="another machine"):
        one.vm.collect_rings([other.vcpus[0]])


@on_kvm
def test_a_host_without_rings_is_told(vm: KvmVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvmVm, "check_extension", lambda self, capability: 0)
    with pytest.raises(CapabilityError, match="use the bitmap"):
        RingTracker(4096).prepare(vm)


@on_kvm
def test_a_host_without_manual_protect_is_told(vm: KvmVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvmVm, "check_extension", lambda self, capability: 1)
    with pytest.raises(CapabilityError, match="INITIALLY_SET; use the bitmap tracker"):
        ManualTracker(initially_set=True).prepare(vm)


class FakeSlot:
    """What clear_ranges needs of a slot."""

    def __init__(self, gpa: int, npages: int) -> None:
        self.gpa = gpa
        self.size = npages * PAGE_SIZE


@pytest.mark.parametrize("chunk", [64, 128, 4096, 1 << 22])
@pytest.mark.parametrize("npages", [1, 63, 64, 65, 1000, 1 << 20])
def test_clear_ranges_obey_the_ioctl_and_cover_exactly(npages: int, chunk: int) -> None:
    """api.rst 4.117: first_page % 64 == 0, num_pages % 64 == 0 unless the range ends with the slot."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    np = pytest.importorskip("numpy")
    base = 0x12345
    pages = sorted({choose.randrange(npages) for _ in range(200)} | {npages - 1})
    gfns = np.array([base + page for page in pages], dtype=np.uint64)
    covered = []
    for first, count, words in clear_ranges(FakeSlot(base * PAGE_SIZE, npages), gfns, chunk):  # type: ignore[arg-type]
        assert first % 64 == 0
        assert count % 64 == 0 or first + count == npages
        assert 0 < count <= chunk
        assert first + count <= npages
        assert len(words) == (count + 63) // 64
        covered += [
            first + 64 * i + bit
            for i, word in enumerate(words.tolist())
            for bit in range(64)
            if word >> bit & 1
        ]
    assert covered == pages


def test_the_rig_itself_writes_what_it_says(rig: MakeRig) -> None:
    machine = rig(make_tracker("bitmap"))
    machine.store([5, 5, 6])
    assert machine.memory.read(5 * PAGE_SIZE, 1) == b"\3"
    assert machine.memory.read(6 * PAGE_SIZE, 1) == b"\2"
    assert store_code([]) == b"\xf4"


def test_what_a_failed_collection_had_fetched_is_reported_by_the_next(
    rig: MakeRig, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching a bitmap clears it: what the first slot told must outlive a failure at the second."""
    machine = rig(tracker)
    with GuestMemory(16 * PAGE_SIZE) as other:
        second = machine.vm.create_slot(other, 1 << 30)
        tracker.arm(machine.vm)
        machine.reported()
        machine.store([8, 20])
        fetch = machine.vm.get_dirty_log

        def fails_at_the_second(slot: Slot) -> Gfns:
            if slot is second:
                raise KeyboardInterrupt
            return fetch(slot)

        with monkeypatch.context() as patched:
            patched.setattr(machine.vm, "get_dirty_log", fails_at_the_second)
            if tracker.name != "ring":
                with pytest.raises(KeyboardInterrupt):
                    tracker.collect()
        machine.store([21])
        assert machine.reported() == {8, 20, 21}
        assert machine.reported() == set()
        tracker.disarm()


def test_pages_of_a_slot_that_moved_before_they_were_re_armed_stay_in_the_log(rig: MakeRig) -> None:
    """At its new place their gfns are other pages: clearing those would lose them."""
    machine = rig(make_tracker("manual"))
    tracker = machine.tracker
    with GuestMemory(16 * PAGE_SIZE) as other:
        second = machine.vm.create_slot(other, 64 * PAGE_SIZE + (1 << 20))
        tracker.arm(machine.vm)
        machine.slot.delete()
        second.move(0)
        other.write(0, bytes(16 * PAGE_SIZE))
        for page in (4, 5):
            other.write(CODE, store_code([page]))
            machine.vcpus[0].set_registers(Registers(rip=CODE))
            assert machine.vcpus[0].run() == Halted()
        pages = tracker.collect()
        assert {4, 5} <= set(pages.gfns(second.id).tolist())
        second.move(PAGE_SIZE)
        tracker.rearm(pages)
        assert {5, 6} <= set(tracker.collect().gfns(second.id).tolist())
        tracker.disarm()


def test_what_a_ring_held_before_arming_is_not_reported(rig: MakeRig) -> None:
    """A vCPU's thread may empty its ring once more after ``disarm``."""
    machine = rig(make_tracker("ring", ring_entries=LEAST_RING))
    tracker = machine.tracker
    tracker.arm(machine.vm)
    tracker.disarm()
    machine.slot.set_flags(SlotFlags.LOG_DIRTY_PAGES)
    machine.store([30])
    tracker.on_ring_full(machine.vcpus[0])
    machine.slot.set_flags(SlotFlags.NONE)
    tracker.arm(machine.vm)
    machine.store([31])
    assert machine.reported() == {31}
    tracker.disarm()
