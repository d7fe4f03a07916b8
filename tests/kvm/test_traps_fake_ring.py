"""Ring overflow against a kernel played in plain memory: every interleaving that a test can think of.

The producer and the reset are those of virt/kvm/dirty_ring.c as docs/reference/kvm-mmu.md 4.3 to 4.5 tells
them; the user side is the real one, entry by entry.  Each push is a page of its own, so that what was lost
is known exactly.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.abi import lib
from pykvm.errors import RingOverflowError
from pykvm.kvm import rings
from pykvm.kvm.rings import ENTRY_SIZE, VcpuRing, VmRings
from pykvm.machine.protocols import RingHarvest, SlotFrames

SIZE = 256
SOFT_LIMIT = SIZE - 64
RING_AT = 64 * 4096
DIRTY, RESET = 1, 2


class Kernel:
    """One vCPU's side of the ring: two free-running indices that nobody else sees."""

    def __init__(self, memory: mmap.mmap) -> None:
        words = np.frombuffer(memory, dtype=np.uint32, offset=RING_AT).reshape(SIZE, 4)
        self.flags, self.slot = words[:, 0], words[:, 1]
        self.offset = np.frombuffer(memory, dtype=np.uint64, offset=RING_AT).reshape(SIZE, 2)[:, 1]
        self.dirty_index = self.reset_index = 0
        self.most_used = 0

    @property
    def used(self) -> int:
        return self.dirty_index - self.reset_index

    def push(self) -> None:
        """kvm_dirty_ring_push: a plain store of flags over whatever is there."""
        i = self.dirty_index % SIZE
        self.slot[i], self.offset[i], self.flags[i] = 0, self.dirty_index, DIRTY
        self.dirty_index += 1
        self.most_used = max(self.most_used, self.used)

    def reset(self, between: Callable[[], None]) -> int:
        """kvm_dirty_ring_reset."""
        count = 0
        while self.flags[self.reset_index % SIZE] & RESET:
            self.flags[self.reset_index % SIZE] = 0
            self.reset_index += 1
            count += 1
            between()
        return count


class FakeVm(VmRings):
    """The real ring code with one vCPU whose kernel is played, and pushes wherever the schedule says."""

    def __init__(self, schedule: Iterator[int]) -> None:
        super().__init__(os.open("/dev/null", os.O_RDWR))
        fd = os.memfd_create("ring")
        os.ftruncate(fd, RING_AT + SIZE * ENTRY_SIZE)
        self.memory = mmap.mmap(fd, RING_AT + SIZE * ENTRY_SIZE)
        self.kernel = Kernel(self.memory)
        self.vcpu = SimpleNamespace(id=0, ring=VcpuRing(fd, SIZE), running=False, full=False)
        os.close(fd)
        self.vcpu.take_ring_full = self.take_ring_full
        self.ring_entries = SIZE
        self.schedule = schedule
        frames = SlotFrames(0, 1 << 40)
        self._slots = {0: SimpleNamespace(id=0, frames=frames)}  # type: ignore[dict-item]
        self.reported: set[int] = set()

    def _ring_vcpus(self) -> list[Any]:
        return [self.vcpu]

    def take_ring_full(self) -> bool:
        full, self.vcpu.full = self.vcpu.full, False
        return bool(full)

    def between(self) -> None:
        """The guest gets a turn, if it is in the guest at all."""
        if self.vcpu.running:
            for _ in range(next(self.schedule, 0)):
                self.kernel.push()

    def reset_dirty_rings(self) -> int:
        self.between()
        count = self.kernel.reset(self.between)
        self._unreset = max(self._unreset - count, 0)
        return count

    def collect(self, running: bool) -> None:
        self.vcpu.running = running
        harvest: RingHarvest = self.collect_rings()
        for entries in harvest.entries:
            assert entries.slots.tolist() == [0] * len(entries.slots)
            # Pages only after their reset: a later write of the guest is noticed again.
            assert all(int(push) < self.kernel.reset_index for push in entries.offsets)
            self.reported.update(entries.offsets.tolist())

    def run(self, pushes: int) -> None:
        """A batch in the guest that looks at the soft limit at its start and end only."""
        if self.kernel.used < SOFT_LIMIT:
            for _ in range(pushes):
                self.kernel.push()
        self.vcpu.full = self.kernel.used >= SOFT_LIMIT


def interleave(patch: pytest.MonkeyPatch, vm: FakeVm) -> None:
    """Have the harvest take one entry at a time and let the guest push in between."""

    class Library:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def pykvm_ring_harvest(
            self, ring: Any, size: int, head: int, limit: int, slots: Any, offsets: Any
        ) -> int:
            n = 0
            while n < limit:
                vm.between()
                if not lib.pykvm_ring_harvest(ring, size, head + n & 0xFFFFFFFF, 1, slots + n, offsets + n):
                    break
                n += 1
            return n

        def pykvm_ring_find_dirty(self, ring: Any, size: int) -> int:
            vm.between()
            found = int(lib.pykvm_ring_find_dirty(ring, size))
            vm.between()
            return found

    patch.setattr(rings, "lib", Library())


def drain(vm: FakeVm) -> None:
    """Collect until nothing comes any more."""
    for _ in range(3):
        vm.collect(running=False)


turns = st.dictionaries(st.integers(0, 450), st.integers(1, 300), max_size=6).map(
    lambda when: [when.get(turn, 0) for turn in range(451)]
)
pushes = st.one_of(st.integers(0, 320), st.integers(150, 260))
steps = st.lists(st.tuples(pushes, st.booleans(), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(turns=turns, steps=steps)
def test_no_interleaving_loses_a_page_silently(turns: list[int], steps: list[tuple[int, bool, bool]]) -> None:
    """docs/reference/hosts.md D.7: every overflow that loses an entry raises at the latest in the next
    collection; below ``entries`` used nothing raises; after the error the guest still gets out of
    DIRTY_RING_FULL and the error keeps coming."""
    with pytest.MonkeyPatch.context() as patch:
        vm = FakeVm(iter(turns))
        interleave(patch, vm)
        overflow = False
        try:
            for pushes, running, slot_change in steps:
                vm.run(pushes)
                if slot_change:
                    vm.vcpu.running = running
                    with vm._slot_change():
                        pass
                vm.collect(running)
            drain(vm)
        except RingOverflowError:
            overflow = True
        if not overflow:
            assert vm.reported == set(range(vm.kernel.dirty_index))
            assert vm.kernel.used == 0, "a reported page was not re-armed"
            return
        assert vm.kernel.most_used >= SIZE, "a false alarm"
        check_the_guest_goes_on(vm)


def check_the_guest_goes_on(vm: FakeVm) -> None:
    """Every time it is stopped and collected, the ring gets emptier, and never too empty."""
    before = vm.kernel.dirty_index
    for _ in range(40):
        vm.run(50)
        stops = vm.kernel.used // 64 + 3
        while vm.vcpu.full:
            stops -= 1
            assert stops, "the vCPU stays in DIRTY_RING_FULL for ever"
            with pytest.raises(RingOverflowError):
                vm.collect(running=False)
            assert vm.kernel.used >= 0
            vm.run(0)
    with pytest.raises(RingOverflowError):
        vm.collect(running=False)
    assert vm.kernel.dirty_index >= before + 40 * 50 - 40 * 50 // 2


@pytest.mark.parametrize("pushes", [1, 191, 192, 220, 255])
def test_up_to_one_entry_less_than_the_ring_nothing_raises(pushes: int) -> None:
    """The soft limit is soft (docs/reference/kvm-mmu.md 4.4): more entries than it are no overflow."""
    vm = FakeVm(iter(()))
    for _ in range(20):
        vm.kernel.push()
        vm.collect(running=False)
        for _ in range(pushes):
            vm.kernel.push()
        vm.collect(running=False)
    assert vm.reported == set(range(vm.kernel.dirty_index))


@pytest.mark.parametrize("pushes", [256, 257, 300, 511, 512, 513, 1000, 1024, 5000])
def test_a_ring_that_was_filled_up_raises(pushes: int) -> None:
    """Sign 1: every entry is dirty at once.  Already at exactly 256, which looks no different."""
    vm = FakeVm(iter(()))
    for _ in range(10):
        vm.kernel.push()
    vm.collect(running=False)
    vm.vcpu.running = True
    for _ in range(pushes):
        vm.kernel.push()
    vm.vcpu.running, vm.vcpu.full = False, True
    for _ in range(5):
        with pytest.raises(RingOverflowError, match="vCPU 0"):
            vm.collect(running=False)
    assert vm.kernel.used >= 0
    check_the_guest_goes_on(vm)


def test_an_overwritten_taken_entry_makes_the_reset_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sign 2: 200 entries are taken, then 100 more pushed before the reset: 44 taken ones are dirty anew.

    Nothing is lost yet, but they cannot be reset, so their pages stay writable and unlogged.
    """
    vm = FakeVm(iter([0] * 201 + [100]))
    interleave(monkeypatch, vm)
    for _ in range(200):
        vm.kernel.push()
    with pytest.raises(RingOverflowError):
        vm.collect(running=True)
    assert vm.reported == set()
    with pytest.raises(RingOverflowError):
        vm.collect(running=False)
    assert vm.vcpu.ring.head % SIZE == vm.kernel.reset_index % SIZE
    check_the_guest_goes_on(vm)


def test_entries_away_from_the_head_raise() -> None:
    """Sign 3: the kernel's index ran ahead of ours, so that new entries appear elsewhere in the ring."""
    vm = FakeVm(iter(()))
    vm.kernel.dirty_index += 5
    vm.kernel.push()
    with pytest.raises(RingOverflowError):
        vm.collect(running=False)
    check_the_guest_goes_on(vm)


def test_a_push_between_the_empty_harvest_and_the_search_is_no_overflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check for sign 3 races with the guest: an entry at the head that just came is in its place."""
    vm = FakeVm(iter([0, 3, 0]))
    interleave(monkeypatch, vm)
    vm.collect(running=True)
    drain(vm)
    assert vm.reported == {0, 1, 2}


def test_an_overflowed_ring_raises_whichever_vcpus_are_asked_for() -> None:
    vm = FakeVm(iter(()))
    for _ in range(300):
        vm.kernel.push()
    with pytest.raises(RingOverflowError):
        vm.collect_rings()
    with pytest.raises(RingOverflowError):
        vm.collect_rings([])


def test_a_reset_cut_short_by_a_signal_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Linux 7.2 on a pending signal ends the ioctl early (docs/reference/kvm-mmu.md 4.5)."""
    vm = FakeVm(iter(()))
    answers = iter([7, 0, 0, 50, 1])

    def partial() -> int:
        limit = next(answers, SIZE)
        count = 0
        while count < limit and vm.kernel.flags[vm.kernel.reset_index % SIZE] & RESET:
            vm.kernel.flags[vm.kernel.reset_index % SIZE] = 0
            vm.kernel.reset_index += 1
            count += 1
        vm._unreset = max(vm._unreset - count, 0)
        return count

    monkeypatch.setattr(vm, "reset_dirty_rings", partial)
    for _ in range(180):
        vm.kernel.push()
    vm.collect(running=False)
    assert vm.reported == set(range(180))
