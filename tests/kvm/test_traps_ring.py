"""The dirty ring's rules on a real KVM (docs/reference/kvm-mmu.md 4, docs/reference/hosts.md D.3 to D.6)."""

from __future__ import annotations

import errno
import mmap
import random
import threading
import time

import numpy as np
import pytest

from pykvm.errors import DirtyRingModeError, KvmError, RingOrderError, RingSizeError
from pykvm.kvm import KvmSystem, KvmVm
from pykvm.machine import DirtyRingFull, IoOut, SlotFlags
from pykvm.memory import PAGE_SIZE
from pykvm.track import RingTracker
from tests.patience import patient
from tests.rings import LEAST_RING

from .tiny import (
    DATA,
    PORT,
    ROUND_FOR_EVER,
    STORE,
    SYSTEM,
    TABLES,
    Runner,
    Tiny,
    done,
    gfns,
    ring_guest,
)

RING, ACQ_REL, WITH_BITMAP = 192, 223, 225
DIRTY, RESET = 1, 2
RING_OFFSET = 64 * PAGE_SIZE
ENTRIES = LEAST_RING
MORE = 2 * ENTRIES - 112
"""Pages to write for a ring to get full on the way, and once more."""
LIMIT = ENTRIES - 64


class RawRing:
    """The ring's memory as the kernel shares it."""

    def __init__(self, guest: Tiny, entries: int = ENTRIES) -> None:
        self._map = mmap.mmap(guest.vcpu.fileno(), entries * 16, flags=mmap.MAP_SHARED, offset=RING_OFFSET)
        words = np.frombuffer(self._map, dtype=np.uint32).reshape(entries, 4)
        self.flags, self.slot = words[:, 0], words[:, 1]
        self.offset = np.frombuffer(self._map, dtype=np.uint64).reshape(entries, 2)[:, 1]


def soft_limit(guest: Tiny) -> int:
    """Entries at which this host stops a vCPU: the size less 64, less 512 more with PML."""
    assert isinstance(guest.store(DATA, MORE), DirtyRingFull)
    return int((RawRing(guest).flags == DIRTY).sum())


# --- enabling (15.1; hosts.md D.3) ------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 16, 2048, 4095, 12288])
def test_ring_sizes_that_are_no_power_of_two_or_too_small(vm: KvmVm, size: int) -> None:
    """D.3: EINVAL, whichever of the two capabilities is used."""
    for cap in (RING, ACQ_REL):
        with pytest.raises(KvmError) as caught:
            vm.enable_cap(cap, size)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(RingSizeError) as own:
        vm.enable_dirty_ring(size // 16)
    assert own.value.errno == errno.EINVAL
    assert vm.ring_entries == 0


def test_a_ring_larger_than_the_limit(vm: KvmVm) -> None:
    """D.3 and 4.2: E2BIG above what CHECK_EXTENSION tells, which is in bytes (15.2)."""
    limit = vm.check_extension(ACQ_REL)
    assert limit == vm.check_extension(RING)
    with pytest.raises(RingSizeError) as caught:
        vm.enable_dirty_ring(limit // 16 * 2)
    assert caught.value.errno == errno.E2BIG
    vm.enable_dirty_ring(limit // 16)
    assert vm.ring_entries == limit // 16


def test_a_ring_size_beyond_32_bits_is_not_cut_off(vm: KvmVm) -> None:
    """4.2: the kernel truncates args[0] to 32 bits, so 4 GiB + 4096 would pass as 4096."""
    with pytest.raises(RingSizeError):
        vm.enable_dirty_ring(1 << 28)
    with pytest.raises(RingSizeError):
        vm.enable_dirty_ring(-256)


def test_the_ring_can_be_enabled_once(vm: KvmVm) -> None:
    """D.3: EINVAL the second time, the same size included."""
    vm.enable_dirty_ring(1024)
    for entries in (1024, 4096):
        with pytest.raises(RingOrderError, match="once"):
            vm.enable_dirty_ring(entries)
    assert vm.ring_entries == 1024


def test_the_ring_comes_before_the_first_vcpu(vm: KvmVm) -> None:
    """15.1: EINVAL after KVM_CREATE_VCPU."""
    vm.create_vcpu()
    with pytest.raises(RingOrderError, match="before the first vCPU") as caught:
        vm.enable_dirty_ring(4096)
    assert caught.value.errno == errno.EINVAL


def test_the_ring_may_come_after_slots(system: KvmSystem) -> None:
    """D.3: unlike vCPUs, memslots may exist."""
    vm = system.create_machine()
    with Tiny(vm, vcpus=0) as guest:
        vm.enable_dirty_ring(1024)
        assert guest.slot.alive


def test_x86_has_no_ring_with_bitmap(vm: KvmVm) -> None:
    """4.8: CHECK_EXTENSION 0 and EINVAL; in ring mode no bitmap exists."""
    assert vm.check_extension(WITH_BITMAP) == 0
    vm.enable_dirty_ring(1024)
    with pytest.raises(KvmError):
        vm.enable_cap(WITH_BITMAP, 0)


def test_manual_protection_is_still_accepted(vm: KvmVm) -> None:
    """D.3: it changes nothing in ring mode, and is no error."""
    vm.enable_dirty_ring(1024)
    vm.enable_manual_protect()


def test_without_rings_there_is_nothing_to_reset(vm: KvmVm) -> None:
    """D.3: RESET on a VM in bitmap mode is EINVAL."""
    for call in (vm.reset_dirty_rings, vm.collect_rings):
        with pytest.raises(DirtyRingModeError, match=r"before the first vCPU|enable them first") as caught:
            call()
        assert caught.value.errno == errno.EINVAL


# --- the mapping (15.1; hosts.md D.3) ---------------------------------------------------------------


def test_the_ring_is_not_part_of_the_vcpu_mapping(system: KvmSystem) -> None:
    """15.1: KVM_GET_VCPU_MMAP_SIZE ends long before page 64."""
    assert system.vcpu_mmap_size <= RING_OFFSET


def test_ring_mappings_that_the_kernel_refuses(system: KvmSystem) -> None:
    """D.3: not private, not executable."""
    with ring_guest(system, ENTRIES) as guest:
        fd = guest.vcpu.fileno()
        with pytest.raises(OSError, match=r"\[Errno") as private:
            mmap.mmap(fd, ENTRIES * 16, flags=mmap.MAP_PRIVATE, offset=RING_OFFSET)
        assert private.value.errno == errno.EINVAL
        with pytest.raises(OSError, match=r"\[Errno") as executable:
            mmap.mmap(fd, ENTRIES * 16, prot=mmap.PROT_READ | mmap.PROT_EXEC, offset=RING_OFFSET)
        assert executable.value.errno in (errno.EINVAL, errno.EPERM)


# --- filling up (15.7, 15.8; hosts.md D.4) ----------------------------------------------------------


@pytest.mark.parametrize("entries", [256, 512, 1024])
def test_full_rings_stop_the_vcpu_at_the_soft_limit(system: KvmSystem, entries: int) -> None:
    """D.4 and 15.8: at N - 64 entries (N - 576 with PML), or a few more."""
    with ring_guest(system, entries) as guest:
        assert isinstance(guest.store(DATA, entries + 100), DirtyRingFull)
        raw = RawRing(guest, entries)
        count = int((raw.flags == DIRTY).sum())
        assert entries - 64 <= count < entries or entries - 576 <= count < entries - 64
        assert raw.offset[:count].tolist() == list(range(DATA, DATA + count))


def test_a_full_ring_stays_full_until_the_reset(system: KvmSystem) -> None:
    """D.4: at once again, with no progress; harvesting without a reset does not help."""
    with ring_guest(system, ENTRIES) as guest:
        assert isinstance(guest.store(DATA, MORE), DirtyRingFull)
        raw = RawRing(guest)
        before = guest.vcpu.get_registers().rip, int((raw.flags == DIRTY).sum())
        for _ in range(3):
            assert isinstance(guest.vcpu.run(), DirtyRingFull)
        assert before == (guest.vcpu.get_registers().rip, int((raw.flags == DIRTY).sum()))
        raw.flags[: before[1]] = RESET
        assert isinstance(guest.vcpu.run(), DirtyRingFull)
        assert guest.vm.reset_dirty_rings() == before[1]
        guest.vcpu.ring.head += before[1]  # type: ignore[union-attr]
        assert guest.finish(on_full=lambda: guest.vm.collect_rings()) >= 1


def test_the_write_that_filled_the_ring_may_not_have_happened_yet(system: KvmSystem) -> None:
    """15.7: the last entry stands for a store that is marked and not executed.  It is reported again after
    the reset, so contents read after the collection never miss it."""
    with ring_guest(system, ENTRIES) as guest:
        count = soft_limit(guest)
        last = (DATA + count - 1) * PAGE_SIZE
        reported: list[int] = []

        def collect() -> None:
            reported.extend(gfns(guest.vm.collect_rings().pages))
            stored = guest.memory.read(last, 8) != bytes(8)
            seen.append(stored)

        seen: list[bool] = []
        collect()
        first = set(reported)
        guest.finish(on_full=collect)
        collect()
        assert DATA + count - 1 in first
        assert seen[0] or reported.count(DATA + count - 1) == 2
        assert set(reported) == set(range(DATA, DATA + MORE))


@pytest.mark.parametrize("cpl", [0, 3])
def test_every_page_is_reported_through_full_rings(system: KvmSystem, cpl: int) -> None:
    """Whatever the number of stops.  At CPL 0 few stores a run, which no batch can overflow (D.7)."""
    with ring_guest(system, ENTRIES, cpl=cpl) as guest:
        tracker = RingTracker(ENTRIES)
        tracker._rings = guest.vm
        tracker.arm(guest.vm)
        for start in range(0, 1000, 50):
            guest.load(bytes.fromhex("90"))
            exit_ = guest.store(DATA + start, 50)
            if isinstance(exit_, DirtyRingFull):
                tracker.on_ring_full(guest.vcpu)
                guest.finish(on_full=lambda: tracker.on_ring_full(guest.vcpu))
        assert gfns(tracker.collect()) == list(range(DATA, DATA + 1000))


# --- harvest and reset (15.5, 15.6; hosts.md D.5) ---------------------------------------------------


def test_reset_stops_at_the_first_entry_that_was_not_harvested(system: KvmSystem) -> None:
    """D.5 and 4.5: marked entries behind a gap stay as they are."""
    with ring_guest(system, ENTRIES) as guest:
        assert done(guest.store(DATA, 6))
        raw, reset = RawRing(guest), guest.vm.reset_dirty_rings
        assert raw.flags[:7].tolist() == [DIRTY] * 6 + [0]
        raw.flags[3] = RESET
        assert reset() == 0
        raw.flags[0] = raw.flags[1] = RESET
        assert reset() == 2
        assert raw.flags[:6].tolist() == [0, 0, DIRTY, RESET, DIRTY, DIRTY]
        raw.flags[2] = RESET
        assert reset() == 2
        assert reset() == 0


@pytest.mark.parametrize(("value", "harvested"), [(0, 0), (4, 0), (1, 0), (2, 1), (3, 1), (0xFFFFFFFE, 1)])
def test_only_bit_1_means_harvested(system: KvmSystem, value: int, harvested: int) -> None:
    """15.5 and D.5: bit 0 is ignored; an entry that user space cleared itself stalls the ring."""
    with ring_guest(system, ENTRIES) as guest:
        assert done(guest.store(DATA, 2))
        raw = RawRing(guest)
        raw.flags[0] = value
        assert guest.vm.reset_dirty_rings() == harvested
        assert raw.flags[0] == (0 if harvested else value)


def test_reset_keeps_slot_and_offset_and_counts_over_all_vcpus(system: KvmSystem) -> None:
    """15.6: the result is the number of entries of the whole VM; the rest of an entry stays."""
    with ring_guest(system, ENTRIES, vcpus=2) as guest:
        assert done(guest.store(DATA, 3))
        assert done(guest.store(DATA + 100, 4, vcpu=guest.vcpus[1]))
        raw = RawRing(guest)
        harvest = guest.vm.collect_rings()
        assert [entries.vcpu for entries in harvest.entries] == [0, 1]
        assert [len(entries.slots) for entries in harvest.entries] == [3, 4]
        assert raw.flags[:4].tolist() == [0, 0, 0, 0]
        assert raw.offset[:3].tolist() == [DATA, DATA + 1, DATA + 2]
        assert guest.vm.reset_dirty_rings() == 0


def test_pages_are_handed_out_only_after_their_reset(system: KvmSystem) -> None:
    """15.6: a write after the collection is in the next one; there is no way to have pages before."""
    with ring_guest(system, ENTRIES) as guest:
        for value in range(1, 50):
            assert done(guest.run(STORE, rdi=DATA * PAGE_SIZE, rax=value))
            assert gfns(guest.vm.collect_rings().pages) == [DATA]
            assert guest.memory.read(DATA * PAGE_SIZE, 8) == value.to_bytes(8, "little")
        assert gfns(guest.vm.collect_rings().pages) == []


def test_a_write_between_harvest_and_reset_is_covered_by_the_entry_before_it(system: KvmSystem) -> None:
    """D.5: it makes no entry of its own, hence contents are read after the reset."""
    with ring_guest(system, ENTRIES) as guest:
        assert done(guest.run(STORE, rdi=DATA * PAGE_SIZE, rax=1))
        raw = RawRing(guest)
        raw.flags[0] = RESET
        assert done(guest.run(STORE, rdi=DATA * PAGE_SIZE, rax=2))
        assert raw.flags[1] == 0
        assert guest.vm.reset_dirty_rings() == 1
        assert done(guest.run(STORE, rdi=DATA * PAGE_SIZE, rax=3))
        assert (raw.flags[1], raw.offset[1]) == (DIRTY, DATA)


def test_the_kernel_re_reads_slot_and_offset_at_the_reset(system: KvmSystem) -> None:
    """D.5: who changes them has the wrong page re-armed, and the true one is never logged again.  Hence the
    binding copies entries out and writes nothing but the flags."""
    with ring_guest(system, ENTRIES) as guest:
        assert done(guest.store(DATA, 2))
        raw = RawRing(guest)
        harvested = raw.offset[:2].copy(), raw.slot[:2].copy()
        harvest = guest.vm.collect_rings()
        assert (raw.offset[:2] == harvested[0]).all()
        assert (raw.slot[:2] == harvested[1]).all()
        harvest.entries[0].offsets[:] = 0
        assert (raw.offset[:2] == harvested[0]).all()
        assert done(guest.store(DATA, 2))
        raw.offset[2] = 5
        raw.flags[2:4] = RESET
        assert guest.vm.reset_dirty_rings() == 2
        guest.vcpu.ring.head += 2  # type: ignore[union-attr]
        assert done(guest.store(DATA, 2))
        assert gfns(guest.vm.collect_rings().pages) == [DATA + 1]


def test_entries_that_denote_no_page_are_dropped_and_counted(system: KvmSystem) -> None:
    """4.5: the kernel skips a bogus slot or offset silently, and counts it."""
    with ring_guest(system, ENTRIES) as guest:
        assert done(guest.store(DATA, 4))
        raw = RawRing(guest)
        raw.slot[0] = 77
        raw.slot[1] = 9 << 16
        raw.offset[2] = guest.pages
        harvest = guest.vm.collect_rings()
        assert gfns(harvest.pages) == [DATA + 3]
        assert harvest.stale == 3


def test_entries_come_in_program_order_and_wrap_around(system: KvmSystem) -> None:
    """4.6: per vCPU the order of the stores; positions wrap around the ring's end many times."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    with ring_guest(system, ENTRIES) as guest:
        for _ in range(60):
            count = choose.randrange(1, 64)
            start = DATA + choose.randrange(1000)
            assert done(guest.store(start, count))
            (entries,) = guest.vm.collect_rings().entries
            assert entries.offsets.tolist() == list(range(start, start + count))
            assert entries.slots.tolist() == [0] * count


def test_writes_of_vcpu_ioctls_reach_the_ring_too(system: KvmSystem) -> None:
    """4.4 and 15.12: KVM_TRANSLATE walks for real and sets A bits, which dirties the guest's tables."""
    with ring_guest(system, ENTRIES) as guest:
        guest.system.set_flags(SlotFlags.LOG_DIRTY_PAGES)
        table = TABLES * PAGE_SIZE + (DATA + 1) * 8
        entry = int.from_bytes(guest.memory.read(table, 8), "little")
        guest.memory.write(table, (entry & ~0x60).to_bytes(8, "little"))
        guest.vm.collect_rings()
        assert guest.vcpu.translate((DATA + 1) * PAGE_SIZE + 0x123) == (DATA + 1) * PAGE_SIZE + 0x123
        assert int.from_bytes(guest.memory.read(table, 8), "little") & 0x20
        assert gfns(guest.vm.collect_rings().pages, guest.system.id) == [SYSTEM + TABLES]


# --- collecting while the guest runs (15.13; hosts.md D.6) ------------------------------------------


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_no_page_is_lost_when_collecting_while_vcpus_run(system: KvmSystem, vcpus: int) -> None:
    """D.6: each vCPU writes its own pages in rounds; a page whose content changed since it was last read
    after a collection must be in the next one."""
    per = 120
    with ring_guest(system, ENTRIES, vcpus=vcpus) as guest:
        for i, vcpu in enumerate(guest.vcpus):
            base = (DATA + i * per) * PAGE_SIZE
            guest.load(ROUND_FOR_EVER, vcpu, r8=base, r9=per, rdx=PAGE_SIZE)
        stop = threading.Event()
        tracker = RingTracker(ENTRIES)
        tracker._rings = guest.vm
        tracker.arm(guest.vm)
        runners = [FullRunner(vcpu, tracker, stop) for vcpu in guest.vcpus]
        area = slice(DATA * PAGE_SIZE, (DATA + vcpus * per) * PAGE_SIZE)
        memory = guest.memory.view()[area].view(np.uint64).reshape(-1, PAGE_SIZE // 8)
        copy = memory[:, 0].copy()
        deadline = time.monotonic() + patient(1.5)
        rounds = 0
        while time.monotonic() < deadline:
            pages = tracker.collect()
            for gfn in gfns(pages):
                if gfn >= DATA:
                    copy[gfn - DATA] = memory[gfn - DATA, 0]
            rounds += 1
            time.sleep(0.002)
        stop.set()
        for runner in runners:
            runner.end()
        for gfn in gfns(tracker.collect(final=True)):
            if gfn >= DATA:
                copy[gfn - DATA] = memory[gfn - DATA, 0]
        assert rounds > 5
        assert (copy == memory[:, 0]).all()
        assert (copy != 0).all()


class FullRunner(Runner):
    """Runs a vCPU and empties its ring when that is full."""

    def __init__(self, vcpu: object, tracker: RingTracker, stop: threading.Event) -> None:
        self._tracker = tracker
        super().__init__(vcpu, self._seen)  # type: ignore[arg-type]

    def _seen(self, exit_: object) -> bool:
        if isinstance(exit_, DirtyRingFull):
            self._tracker.on_ring_full(self._vcpu)
            return False
        return True


def test_one_full_ring_does_not_stop_the_others(system: KvmSystem) -> None:
    """4.5: a vCPU in DIRTY_RING_FULL is collected alone, and entries of the others stay in their rings."""
    with ring_guest(system, ENTRIES, vcpus=2) as guest:
        first, second = guest.vcpus
        assert isinstance(guest.store(DATA, MORE, vcpu=first), DirtyRingFull)
        assert done(guest.store(DATA + MORE, 30, vcpu=second))
        harvest = guest.vm.collect_rings([first])
        assert {entries.vcpu for entries in harvest.entries} == {0}
        assert isinstance(first.run(), (IoOut, DirtyRingFull))
        assert {entries.vcpu for entries in guest.vm.collect_rings([second]).entries} == {1}


def test_a_closed_vcpu_leaves_its_pages_to_the_collector(system: KvmSystem) -> None:
    """A ring outlives its vCPU's object: what it holds was written and must be reported."""
    with ring_guest(system, ENTRIES, vcpus=2) as guest:
        assert done(guest.store(DATA, 5))
        guest.vcpus[0].close()
        assert gfns(guest.vm.collect_rings().pages) == list(range(DATA, DATA + 5))


def test_a_ring_with_more_entries_than_its_soft_limit_is_no_overflow(system: KvmSystem) -> None:
    """15.8: up to the hard limit nothing is lost, and nothing raises."""
    with ring_guest(system, ENTRIES) as guest:
        assert isinstance(guest.store(DATA, MORE), DirtyRingFull)
        raw = RawRing(guest)
        used = int((raw.flags == DIRTY).sum())
        raw.offset[used:-1] = DATA
        raw.flags[used:-1] = DIRTY
        # SAFETY of the test: entries the kernel has not pushed are taken back before its reset sees them.
        taken = guest.vcpu.ring.harvest(0)  # type: ignore[union-attr]
        assert taken is not None
        assert len(taken.slots) == ENTRIES - 1
        assert not guest.vcpu.ring.overflowed  # type: ignore[union-attr]
        raw.flags[used:-1] = 0


def test_logging_must_be_on_for_entries(system: KvmSystem) -> None:
    """Section 5: marks happen in slots with LOG_DIRTY_PAGES only, in ring mode as well."""
    vm = system.create_machine()
    vm.enable_dirty_ring(ENTRIES)
    with Tiny(vm, flags=SlotFlags.NONE) as guest:
        assert guest.store(DATA, 20) == IoOut(PORT, 1, b"\0")
        assert gfns(vm.collect_rings().pages) == []
        guest.slot.set_flags(SlotFlags.LOG_DIRTY_PAGES)
        assert done(guest.store(DATA, 20))
        assert gfns(vm.collect_rings().pages) == list(range(DATA, DATA + 20))
