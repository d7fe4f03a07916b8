"""What only a machine with a host profile has: page tracking, MMU notifiers, a limit of shadow pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm.errors import KvmError, SlotAbsentError, UsageError
from pykvm.machine import PageTracking
from pykvm.machine.tracking import MAX_TRACK_COUNT
from pykvm.memory import PAGE_SIZE
from pykvm.model.system import ModelSystem
from pykvm.profiles import DEVELOPMENT_HOST, profile
from tests.model.hostguest import DATA, DONE, HostGuest

STORE = b"\x48\x89\x07" + DONE
LOAD = b"\x48\x8b\x07" + DONE


@pytest.fixture
def guest() -> Iterator[HostGuest]:
    with HostGuest(ModelSystem(profile=profile(*DEVELOPMENT_HOST)).create_machine()) as made:
        yield made


class Node:
    """Keeps what it hears, and acts on the machine amid the guest's instruction."""

    def __init__(self, guest: HostGuest) -> None:
        self.guest = guest
        self.heard: list[tuple[object, ...]] = []

    def track_write(self, gpa: int, new: bytes) -> None:
        self.heard.append((gpa, new))
        self.guest.machine.track_add_gfn(DATA + 7)

    def track_remove_region(self, gfn: int, pages: int) -> None:
        self.heard.append((gfn, pages))


def test_a_tracked_page_is_emulated_and_heard_of(guest: HostGuest) -> None:
    machine, node = guest.machine, Node(guest)
    assert isinstance(machine, PageTracking)
    machine.register_track_notifier(node)
    machine.track_add_gfn(DATA + 1)
    moved = guest.step(STORE, rdi=DATA + 1 << 12, rax=5).counters
    assert (moved["pf_emulate"], moved["mmu_pte_write"]) == (1, 1)
    assert "pf_emulate" not in guest.step(STORE, rdi=DATA + 2 << 12).counters
    # What the node asked for amid the first store holds.
    assert guest.step(STORE, rdi=DATA + 7 << 12, rax=6).counters["pf_emulate"] == 1
    assert node.heard == [
        (DATA + 1 << 12, (5).to_bytes(8, "little")),
        (DATA + 7 << 12, (6).to_bytes(8, "little")),
    ]
    guest.slot.delete()
    assert node.heard[2:] == [(0, guest.slot.npages)]
    machine.unregister_track_notifier(node)


def test_tracking_is_refused_where_it_makes_no_sense(guest: HostGuest) -> None:
    machine, node = guest.machine, Node(guest)
    with pytest.raises(SlotAbsentError):
        machine.track_add_gfn(1 << 30)
    with pytest.raises(UsageError, match="not tracked"):
        machine.track_remove_gfn(DATA)
    machine.register_track_notifier(node)
    with pytest.raises(UsageError, match="already"):
        machine.register_track_notifier(node)
    machine.unregister_track_notifier(node)
    with pytest.raises(UsageError, match="not registered"):
        machine.unregister_track_notifier(node)
    for _ in range(MAX_TRACK_COUNT):
        machine.track_add_gfn(DATA)
    with pytest.raises(UsageError, match="65535"):
        machine.track_add_gfn(DATA)


def test_pages_that_the_host_drops_lose_their_mappings(guest: HostGuest) -> None:
    guest.step(STORE, rdi=DATA << 12, rax=7)
    guest.memory.discard(DATA * PAGE_SIZE, PAGE_SIZE)
    assert guest.moved() == {"pages_4k": -1, "remote_tlb_flush_requests": 1}
    seen = guest.step(LOAD, rdi=DATA << 12, rax=7)
    assert seen.exit.data == b"\0"
    assert seen.counters["pf_fixed"] == 1


def test_a_limit_of_shadow_pages(guest: HostGuest) -> None:
    with pytest.raises(KvmError, match="64"):
        guest.machine.set_nr_mmu_pages(63)
    with pytest.raises(UsageError):
        guest.machine.set_nr_mmu_pages(-1)
    guest.machine.set_nr_mmu_pages(64)


def test_translated_code_does_not_outlive_its_mappings(guest: HostGuest) -> None:
    """Its pages are the TLB's: after a harvest the same stores fault again, once a page."""
    loop = b"\x48\x89\x0f\x48\x01\xd7\x48\xff\xc9\x75\xf5" + DONE
    for _ in range(3):
        seen = guest.step(loop, rdi=DATA << 12, rcx=514, rdx=8)
        assert [gfn for gfn in seen.marks if gfn >= DATA] == [DATA, DATA + 1]
        guest.machine.collect_rings()
    assert guest.vcpu.cpu.translated > 1000
