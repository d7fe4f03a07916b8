"""userfaultfd and PAGEMAP_SCAN: the contract of all trackers, and writers that KVM never sees.

The open question of KVM's page-tracking review: what about devices?  A host thread that stores into guest
memory stands for one.  KVM's logs and the write-tracker see nothing of it; the host's page tables do.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pykvm import track
from pykvm.errors import HostError, KvmError, UsageError
from pykvm.machine import IoOut, Kicked, SlotFlags, System
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.track import PagemapTracker, Tracker, UserfaultfdTracker, host_pages, make_tracker, uffd
from pykvm.track.host_pages import HostRange, merged
from tests.backends import on_kvm
from tests.host_trackers import HOST_TRACKERS, WHY_NOT, host_tracker
from tests.rings import LEAST_RING

from .conftest import Rig
from .test_trackers import (
    test_a_deleted_slot_is_left_out,
    test_a_page_written_in_every_round_is_reported_in_every_round,
    test_every_round_reports_exactly_what_was_written,
    test_several_collections_without_writes_are_empty,
    test_using_a_tracker_out_of_order_is_refused,
    test_writes_before_arming_and_after_disarming_are_not_reported,
)
from .writing import DATA, DONE, PAGES, Writing, word

MakeRig = Callable[..., Rig]
STORE = bytes.fromhex("488907")


@pytest.fixture(params=HOST_TRACKERS)
def tracker(request: pytest.FixtureRequest) -> Tracker:
    return host_tracker(request.param)


@pytest.fixture
def guest(system: System, tracker: Tracker) -> Iterator[Writing]:
    with Writing(system.create_machine()) as running:
        yield running
        tracker.disarm()


def reported(tracker: Tracker) -> set[int]:
    pages = tracker.collect()
    tracker.rearm(pages)
    return {gfn for slot, gfn in pages if slot == 0 and gfn >= DATA}


def by_a_device(action: Callable[[], object]) -> None:
    """Do it on a thread that is no vCPU's."""
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


# --- the open question -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bitmap", "manual", "ring"])
def test_kvm_sees_nothing_of_a_devices_writes(system: System, name: str) -> None:
    """Into logged pages and into tracked ones: neither the log nor the write-tracker tells of them."""
    kvms = make_tracker(name, ring_entries=LEAST_RING)
    with Writing(system.create_machine(), prepare=kvms.prepare) as guest:
        kvms.arm(guest.machine)
        guest.tracker.add_gfn(0x210)
        guest.run(STORE, rdi=0x210000, rax=1)
        guest.run(STORE, rdi=0x211000, rax=1)
        assert reported(kvms) == {0x210, 0x211}
        view = guest.memory.view()

        def write() -> None:
            for gfn in (0x210, 0x211):
                view[gfn * PAGE_SIZE : gfn * PAGE_SIZE + 8] = 9

        guest.writes()
        by_a_device(write)
        assert reported(kvms) == set()
        assert guest.writes() == []
        assert guest.memory.read(0x210000, 8) == guest.memory.read(0x211000, 8) == b"\x09" * 8
        kvms.disarm()


def test_the_hosts_page_tables_see_vcpus_and_devices_alike(guest: Writing, tracker: Tracker) -> None:
    guest.tracker.add_gfn(0x210)
    tracker.arm(guest.machine)
    view = guest.memory.view()
    for _ in range(3):
        guest.run(STORE, rdi=0x210000, rax=1)
        guest.run(STORE, rdi=0x211000, rax=1)
        assert reported(tracker) == {0x210, 0x211}

        def write() -> None:
            view[0x210008] = view[0x212000] = 9

        by_a_device(write)
        assert reported(tracker) == {0x210, 0x212}
        assert reported(tracker) == set()
    assert [each.gpa for each in guest.writes()] == [0x210000] * 3


def test_another_mapping_of_the_memory_is_not_seen(guest: Writing, tracker: Tracker) -> None:
    """The protection is in the page tables of one mapping: a device that maps the memfd itself goes past it.

    So does whoever writes to the file.  Reading what they wrote marks nothing either.
    """
    tracker.arm(guest.machine)
    backing = guest.memory._open()
    with mmap.mmap(backing.fd, guest.memory.size) as other:
        by_a_device(lambda: other.__setitem__(slice(0x210000, 0x210004), b"mine"))
        other[0x211000] = 1
    os.pwrite(backing.fd, b"file", 0x212000)
    guest.run(bytes.fromhex("488b07"), rdi=0x210000)
    assert guest.memory.view()[0x210000:0x210004].tobytes() == b"mine"
    assert reported(tracker) == set()


# --- kinds of pages ----------------------------------------------------------------------------------------


def test_pages_that_nobody_touched_before(guest: Writing, tracker: Tracker) -> None:
    """Unpopulated memory is protected, too: a first read reports nothing, a first write its page."""
    for gfn in range(0x210, 0x220):
        guest.memory.discard(gfn * PAGE_SIZE, PAGE_SIZE)
    tracker.arm(guest.machine)
    guest.run(bytes.fromhex("488b07"), rdi=0x210000)
    assert guest.memory.view()[0x211000] == 0
    assert reported(tracker) == set()
    guest.run(STORE, rdi=0x210000, rax=0)
    guest.run(STORE, rdi=0x212000, rax=0)
    by_a_device(lambda: guest.memory.view().__setitem__(0x213000, 0))
    assert reported(tracker) == {0x210, 0x212, 0x213}


def test_memory_in_two_slots_is_reported_for_both(guest: Writing, tracker: Tracker) -> None:
    """The host's page tables know no slots; KVM's bitmap marks only the one that was written through."""
    alias = guest.machine.create_slot(guest.memory, 1 << 30, size=4 * PAGE_SIZE, memory_offset=0x210000)
    tracker.arm(guest.machine)
    guest.run(STORE, rdi=0x212000)
    pages = tracker.collect()
    assert (0, 0x212) in pages
    assert pages.gfns(alias.id).tolist() == [(1 << 30) // PAGE_SIZE + 2]
    tracker.rearm(pages)
    assert reported(tracker) == set()


def test_a_slot_that_moved_is_reported_where_it_is(guest: Writing, tracker: Tracker) -> None:
    with GuestMemory(4 * PAGE_SIZE) as memory:
        slot = guest.machine.create_slot(memory, 1 << 30)
        tracker.arm(guest.machine)
        memory.view()[PAGE_SIZE] = 1
        slot.move(1 << 31)
        assert tracker.collect().gfns(slot.id).tolist() == [(1 << 31) // PAGE_SIZE + 1]
        tracker.disarm()


def test_only_writable_slots_are_armed(guest: Writing, tracker: Tracker) -> None:
    with GuestMemory(4 * PAGE_SIZE) as rom:
        slot = guest.machine.create_slot(rom, 1 << 30, flags=SlotFlags.READONLY)
        tracker.arm(guest.machine)
        rom.view()[0] = 1
        assert not len(tracker.collect().gfns(slot.id))
        assert guest.slot.flags == SlotFlags.NONE


def test_the_memory_may_be_closed_while_it_is_armed(system: System, tracker: Tracker) -> None:
    with system.create_machine() as machine:
        memory = GuestMemory(4 * PAGE_SIZE)
        machine.create_slot(memory, 0)
        tracker.arm(machine)
        view = memory.view()
        memory.close()
        machine.close()
        view[5] = 1
        assert len(tracker.collect()) == 0  # its slot is gone
        tracker.disarm()


def test_ranges_of_aliases_are_protected_once() -> None:
    ranges = [HostRange(0x5000, 0x1000), HostRange(0x1000, 0x2000), HostRange(0x2000, 0x3000)]
    assert merged(ranges) == [HostRange(0x1000, 0x5000)]
    assert merged([HostRange(0x3000, 0x1000), HostRange(0x1000, 0x1000)]) == [
        HostRange(0x1000, 0x1000),
        HostRange(0x3000, 0x1000),
    ]


def test_many_pages_in_many_runs(guest: Writing, tracker: Tracker) -> None:
    """More runs than one PAGEMAP_SCAN returns."""
    with GuestMemory(20_000 * PAGE_SIZE) as memory:
        slot = guest.machine.create_slot(memory, 1 << 30)
        tracker.arm(guest.machine)
        memory.view()[:: 2 * PAGE_SIZE] = 1
        pages = tracker.collect()
        tracker.rearm(pages)
        first = (1 << 30) // PAGE_SIZE
        assert np.array_equal(pages.gfns(slot.id), np.arange(first, first + 20_000, 2, dtype=np.uint64))
        assert not len(tracker.collect().gfns(slot.id))
        tracker.disarm()


# --- all at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpl", [3, 0])
def test_no_page_is_lost_while_vcpu_and_device_write(system: System, tracker: Tracker, cpl: int) -> None:
    """Round after round, whatever differs from the copy that the last reports make must be reported."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    with Writing(system.create_machine(), cpl=cpl) as guest:
        stop = threading.Event()
        view = guest.memory.view()

        def device() -> None:
            while not stop.is_set():
                view[choose.randrange(0x220, PAGES) * PAGE_SIZE + 64 + choose.randrange(64)] += 1
                stop.wait(0.0002)

        def vcpu() -> None:
            while not stop.is_set():
                exit = cpu.run()
                assert isinstance(exit, Kicked | IoOut)

        # top: mov rdi, r8; mov rcx, r9; again: inc rbx; mov [rdi], rbx; add rdi, rdx; dec rcx; jnz again;
        # jmp top
        rounds = bytes.fromhex("4c89c7 4c89c9 48ffc3 48891f 4801d7 48ffc9 75f2 ebea")
        cpu = guest.load(rounds, r8=DATA * PAGE_SIZE, r9=0x30, rdx=PAGE_SIZE, rbx=1)
        tracker.arm(guest.machine)
        copy = bytearray(guest.memory.read(DATA * PAGE_SIZE, (PAGES - DATA) * PAGE_SIZE))
        threads = [threading.Thread(target=each) for each in (device, vcpu)]
        for thread in threads:
            thread.start()
        seen = set()
        try:
            for _ in range(30):
                stop.wait(0.003)
                for gfn in sorted(reported(tracker)):
                    seen.add(gfn)
                    at = (gfn - DATA) * PAGE_SIZE
                    copy[at : at + PAGE_SIZE] = guest.memory.read(gfn * PAGE_SIZE, PAGE_SIZE)
        finally:
            stop.set()
            cpu.kick()
            for thread in threads:
                thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        for gfn in sorted(reported(tracker)):
            at = (gfn - DATA) * PAGE_SIZE
            copy[at : at + PAGE_SIZE] = guest.memory.read(gfn * PAGE_SIZE, PAGE_SIZE)
        assert guest.memory.read(DATA * PAGE_SIZE, (PAGES - DATA) * PAGE_SIZE) == copy
        assert {gfn for gfn in seen if gfn < 0x220}
        assert {gfn for gfn in seen if gfn >= 0x230}
        tracker.disarm()


def test_disarming_lets_a_writer_go_on(guest: Writing, tracker: Tracker) -> None:
    tracker.arm(guest.machine)
    tracker.disarm()
    tracker.disarm()
    guest.memory.view()[0x210000] = 7
    guest.run(STORE, rdi=0x211000, rax=0x77)
    assert guest.memory.read(0x211000, 8) == word(0x77)


def test_the_thread_counts_the_faults_that_it_answers(guest: Writing) -> None:
    tracker = host_tracker("userfaultfd-sync")
    assert isinstance(tracker, UserfaultfdTracker)
    tracker.arm(guest.machine)
    for at in (0x210000, 0x210008, 0x211000):
        guest.memory.view()[at] = 1
    assert tracker.faults == 2
    tracker.disarm()
    assert tracker.faults == 0


# --- refusals ----------------------------------------------------------------------------------------------


class Library:
    """The compiled library with another answer to one call."""

    def __init__(self, **calls: object) -> None:
        vars(self).update(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(REAL, name)


REAL = uffd.lib


@pytest.mark.parametrize("name", track.HOST_TRACKERS)
@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EPERM, r"a filter of system calls forbids it; use the bitmap tracker\.$"),
        (errno.ENOSYS, r"built without userfaultfd, .*; use the bitmap tracker\.$"),
        (errno.EMFILE, r"Cannot open a userfaultfd: Too many open files\.$"),
    ],
)
def test_what_the_host_does_not_allow_is_one_sentence(
    guest: Writing, monkeypatch: pytest.MonkeyPatch, name: str, number: int, text: str
) -> None:
    monkeypatch.setattr(uffd, "lib", Library(pykvm_userfaultfd=lambda flags: -number))
    tracker = make_tracker(name)
    with pytest.raises(HostError, match=text):
        tracker.arm(guest.machine)
    with pytest.raises(UsageError, match="call arm"):
        tracker.collect()


def test_a_missing_privilege_is_told_where_one_is_needed(
    guest: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_tracker("userfaultfd-sync")

    def refuse(flags: int) -> int:
        return int(REAL.pykvm_userfaultfd(flags)) if flags & REAL.UFFD_USER_MODE_ONLY else -errno.EPERM

    monkeypatch.setattr(uffd, "lib", Library(pykvm_userfaultfd=refuse))
    with pytest.raises(HostError, match=r"CAP_SYS_PTRACE, set the sysctl vm\.unprivileged_userfaultfd.*\.$"):
        UserfaultfdTracker("sync").arm(guest.machine)
    for name in ("userfaultfd-async", "pagemap"):
        if not WHY_NOT[name]:
            tracker = host_tracker(name)
            tracker.arm(guest.machine)
            guest.run(STORE, rdi=0x210000)
            assert reported(tracker) == {0x210}
            tracker.disarm()


@on_kvm
def test_answering_for_kvm_needs_more_than_user_mode(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vCPU's write faults within KVM_RUN: there UFFD_USER_MODE_ONLY answers nothing."""
    tracker = host_tracker("userfaultfd-sync")
    user_mode = Library(
        pykvm_userfaultfd=lambda flags: REAL.pykvm_userfaultfd(flags | REAL.UFFD_USER_MODE_ONLY)
    )
    monkeypatch.setattr(uffd, "lib", user_mode)
    with Writing(system.create_machine()) as guest:
        tracker.arm(guest.machine)
        vcpu = guest.load(STORE + DONE, rdi=0x210000)
        with pytest.raises(KvmError, match="EFAULT"):
            guest.finish(vcpu)
        tracker.disarm()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("name", ["userfaultfd-async", "pagemap"])
def test_asynchronous_trackers_need_no_privilege(name: str) -> None:
    host_tracker(name)
    program = (
        "import ctypes, os\n"
        "from pykvm.memory import GuestMemory\n"
        "from pykvm.model.system import ModelSystem\n"
        "from tests.host_trackers import HOST_TRACKERS\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"  # PR_SET_DUMPABLE: as if it had been started so
        f"tracker = HOST_TRACKERS[{name!r}]()\n"
        "with ModelSystem() as system, system.create_machine() as machine, GuestMemory(65536) as memory:\n"
        "    machine.create_slot(memory, 0)\n"
        "    tracker.arm(machine)\n"
        "    memory.view()[20480] = 1\n"
        "    print(list(tracker.collect()))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (found.returncode, found.stdout) == (0, "[(0, 5)]\n"), found.stderr


def test_a_hidden_pagemap_is_one_sentence(guest: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    host_tracker("pagemap")

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(host_pages.os, "open", refuse)
    for tracker in (PagemapTracker(), UserfaultfdTracker("async")):
        with pytest.raises(HostError, match=r"/proc/self/pagemap \(Permission denied\); .*\.$"):
            tracker.arm(guest.machine)
    monkeypatch.undo()
    PagemapTracker().arm(guest.machine)  # nothing of it was left


def test_an_old_kernel_is_told(guest: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    host_tracker("userfaultfd-sync")
    features = uffd._features
    without = [REAL.UFFD_FEATURE_WP_ASYNC]

    def old(fd: Any, wanted: int) -> int:
        offered = features(fd, wanted)
        for feature in without:
            offered &= ~feature
        return offered

    monkeypatch.setattr(uffd, "_features", old)
    with pytest.raises(HostError, match="asynchronous"):
        PagemapTracker().arm(guest.machine)
    either = make_tracker("userfaultfd")
    assert isinstance(either, UserfaultfdTracker)
    either.arm(guest.machine)
    assert either.mode == "sync"
    either.disarm()
    without.append(REAL.UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
    with pytest.raises(HostError, match=r"shared memory by userfaultfd \(linux 5.19\)"):
        make_tracker("userfaultfd").arm(guest.machine)


def test_a_second_userfaultfd_on_the_memory_is_refused(guest: Writing, tracker: Tracker) -> None:
    tracker.arm(guest.machine)
    with pytest.raises(HostError, match="disarm that tracker first"):
        UserfaultfdTracker("sync").arm(guest.machine)
    guest.run(STORE + DONE, rdi=0x210000)
    assert reported(tracker) == {0x210}


def test_a_mode_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="use 'sync' or 'async'"):
        UserfaultfdTracker("both")  # type: ignore[arg-type]


__all__ = [
    "test_a_deleted_slot_is_left_out",
    "test_a_page_written_in_every_round_is_reported_in_every_round",
    "test_every_round_reports_exactly_what_was_written",
    "test_several_collections_without_writes_are_empty",
    "test_using_a_tracker_out_of_order_is_refused",
    "test_writes_before_arming_and_after_disarming_are_not_reported",
]
