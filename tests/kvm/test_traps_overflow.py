"""Hosts that emulate CPL 0 in batches can overflow a dirty ring for good (docs/reference/hosts.md D.7).

Whether this host does is found out by running such a guest, never by its name or version.  One that looks
at the soft limit at every exit must report every page instead, in every one of these cases.
"""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from pykvm.errors import RingOverflowError
from pykvm.kvm import KvmSystem
from pykvm.machine import DirtyRingFull
from pykvm.memory import PAGE_SIZE
from pykvm.track import RingTracker
from tests.rings import LEAST_RING

from .tiny import (
    DATA,
    DONE,
    ROUND_FOR_EVER,
    Runner,
    Tiny,
    done,
    emulates_cpl0_in_batches,
    gfns,
    ring_guest,
)

ENTRIES = LEAST_RING
DENSE = bytes.fromhex("48890f 4801d7") * 8 + bytes.fromhex("48ffc9 75cb") + DONE
"""again: 8 x (mov [rdi], rcx; add rdi, rdx); dec rcx; jnz again; out: 455 stores in 1024 instructions"""


def dense(guest: Tiny, pages: int) -> object:
    """Write ``pages`` pages (a multiple of 8) as fast as the emulator goes; the first exit."""
    return guest.run(DENSE, rdi=DATA * PAGE_SIZE, rcx=pages // 8, rdx=PAGE_SIZE)


def go_on(guest: Tiny, exit_: object) -> None:
    """Get the guest to the end of its snippet, whatever state its ring is in."""
    for _ in range(200):
        if done(exit_):  # type: ignore[arg-type]
            return
        assert isinstance(exit_, DirtyRingFull)
        with pytest.raises(RingOverflowError):
            guest.vm.collect_rings()
        exit_ = guest.vcpu.run()
    raise AssertionError("the vCPU never got out of DIRTY_RING_FULL")


def collect_all(guest: Tiny, exit_: object) -> set[int]:
    """Collect and go on to the end of the snippet; all the pages reported."""
    reported: set[int] = set()
    while True:
        reported.update(gfns(guest.vm.collect_rings().pages))
        if done(exit_):  # type: ignore[arg-type]
            return reported
        assert isinstance(exit_, DirtyRingFull)
        exit_ = guest.vcpu.run()


@pytest.mark.parametrize("pages", [1, 192, 230, 252, 253, 254, 255])
def test_below_the_size_of_the_ring_nothing_is_lost_and_nothing_raises(system: KvmSystem, pages: int) -> None:
    """D.7: the reserve of 64 entries is there to be used; no false alarm."""
    with ring_guest(system, ENTRIES, cpl=0) as guest:
        exit_ = guest.store(DATA, pages)
        assert collect_all(guest, exit_) == set(range(DATA, DATA + pages))


@pytest.mark.parametrize("pages", [256, 264, 304, 400, 448, 456, 1000, 2000])
def test_an_overflow_raises_for_ever_and_the_guest_goes_on(system: KvmSystem, pages: int) -> None:
    """D.7: never a loop, never silent.  Either every page is reported, or RingOverflowError comes, keeps
    coming, and the guest still reaches its end (a migration that fails leaves its source running)."""
    batches = emulates_cpl0_in_batches(system)
    with ring_guest(system, ENTRIES, cpl=0, pages=4096) as guest:
        exit_ = dense(guest, pages)
        reported = None
        with contextlib.suppress(RingOverflowError):
            reported = collect_all(guest, exit_)
        if reported is not None:
            assert reported == set(range(DATA, DATA + pages))
            return
        assert batches, "this host checks the limit at every exit and must not overflow"
        for _ in range(3):
            with pytest.raises(RingOverflowError, match=r"vCPU 0 .* Use the bitmap"):
                guest.vm.collect_rings()
        go_on(guest, exit_ if done(exit_) else guest.vcpu.run())  # type: ignore[arg-type]
        for _ in range(20):
            go_on(guest, guest.store(DATA, 100))
            with pytest.raises(RingOverflowError):
                guest.vm.collect_rings()


def test_this_kind_of_host_does_overflow(system: KvmSystem) -> None:
    """The probe and the tests above agree: where CPL 0 runs in batches, 304 pages in one go are too many
    at least once in ten times (a batch may be cut short by the host's timer)."""
    overflows = 0
    for _ in range(10):
        with ring_guest(system, ENTRIES, cpl=0, pages=4096) as guest:
            exit_ = dense(guest, 400)
            try:
                collect_all(guest, exit_)
            except RingOverflowError:
                overflows += 1
    assert bool(overflows) == emulates_cpl0_in_batches(system)


def test_the_same_guest_at_cpl_3_loses_nothing(system: KvmSystem) -> None:
    """D.4: natively running code stops at the limit, so the ring is safe at any size."""
    with ring_guest(system, ENTRIES, pages=4096) as guest:
        exit_ = dense(guest, 2000)
        assert collect_all(guest, exit_) == set(range(DATA, DATA + 2000))


def test_the_tracker_raises_too_and_lets_the_guest_run(system: KvmSystem) -> None:
    """RingTracker: on_ring_full never raises into the vCPU's thread; collect does, again and again; after
    disarm the guest runs as if nothing had been."""
    batches = emulates_cpl0_in_batches(system)
    vm = system.create_machine()
    tracker = RingTracker(ENTRIES)
    tracker.prepare(vm)
    with Tiny(vm, cpl=0, pages=4096) as guest:
        tracker.arm(vm)
        overflows = 0
        for _ in range(4):
            exit_ = dense(guest, 2000)
            for _ in range(200):
                if done(exit_):  # type: ignore[arg-type]
                    break
                assert isinstance(exit_, DirtyRingFull)
                tracker.on_ring_full(guest.vcpu)
                exit_ = guest.vcpu.run()
            assert done(exit_)  # type: ignore[arg-type]
            try:
                tracker.collect()
            except RingOverflowError:
                overflows += 1
        assert overflows == (4 if batches else 0)
        tracker.disarm()
        for _ in range(5):
            exit_ = dense(guest, 2000)
            for _ in range(200):
                if done(exit_):  # type: ignore[arg-type]
                    break
                tracker.on_ring_full(guest.vcpu)
                exit_ = guest.vcpu.run()
            assert done(exit_)  # type: ignore[arg-type]


def test_an_overflow_does_not_keep_slots_from_changing(system: KvmSystem) -> None:
    """A slot can be deleted or moved although its VM's log is beyond repair."""
    with ring_guest(system, ENTRIES, cpl=0, pages=4096) as guest:
        dense(guest, 2000)
        guest.slot.set_flags(guest.slot.flags & 0)  # type: ignore[arg-type]
        guest.slot.delete()
        assert list(guest.vm.slots) == [guest.system.id]


@pytest.mark.parametrize("pages", [40, 300])
def test_harvesting_in_another_thread_while_cpl_0_runs(system: KvmSystem, pages: int) -> None:
    """A harvester and a vCPU race: every page's last value is seen after some collection, or the overflow
    is raised and stays.  40 pages a round fit any ring; 300 do not fit a batch."""
    vm = system.create_machine()
    tracker = RingTracker(ENTRIES)
    tracker.prepare(vm)
    with Tiny(vm, cpl=0, pages=1024) as guest:
        tracker.arm(vm)
        guest.load(ROUND_FOR_EVER, r8=DATA * PAGE_SIZE, r9=pages, rdx=PAGE_SIZE)

        def seen(exit_: object) -> bool:
            if isinstance(exit_, DirtyRingFull):
                tracker.on_ring_full(guest.vcpu)
                return False
            return True

        def value(gfn: int) -> bytes:
            return guest.memory.read(gfn * PAGE_SIZE, 8)

        runner = Runner(guest.vcpu, seen)
        last: dict[int, bytes] = {}
        overflow: RingOverflowError | None = None
        deadline = time.monotonic() + 1
        try:
            while time.monotonic() < deadline:
                last |= {gfn: value(gfn) for gfn in gfns(tracker.collect())}
                threading.Event().wait(0.0005)
        except RingOverflowError as error:
            overflow = error
        runner.end()
        if overflow is None:
            try:
                last |= {gfn: value(gfn) for gfn in gfns(tracker.collect(final=True))}
            except RingOverflowError as error:
                overflow = error
        if overflow is None:
            assert last == {gfn: value(gfn) for gfn in range(DATA, DATA + pages)}
        else:
            assert emulates_cpl0_in_batches(system)
            for _ in range(3):
                with pytest.raises(RingOverflowError):
                    tracker.collect()
