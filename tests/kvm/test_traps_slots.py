"""What KVM_SET_USER_MEMORY_REGION refuses and what a slot change does (docs/reference/kvm-mmu.md 2)."""

from __future__ import annotations

import contextlib
import errno
import mmap
import threading

import pytest

from pykvm.abi import ffi
from pykvm.errors import (
    KvmError,
    LoggingDisabledError,
    SlotAbsentError,
    SlotAlignmentError,
    SlotChangeError,
    SlotError,
    SlotOverlapError,
    UsageError,
)
from pykvm.kvm import KvmSystem, KvmVm
from pykvm.machine import MemoryFault, MmioWrite, SlotFlags
from pykvm.machine.protocols import RingHarvest
from pykvm.memory import PAGE_SIZE, GuestMemory
from tests.rings import LEAST_RING

from .tiny import DATA, LOAD, STORE, Tiny, done, gfns

MAX_PAGES = (1 << 31) - 1
LOG, READONLY = 1, 2


@pytest.fixture
def area() -> int:
    """A host address with 16 mapped pages behind it, kept by the module."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(_AREA)))


_AREA = mmap.mmap(-1, 16 * PAGE_SIZE)


def gfns_of(guest: Tiny) -> list[int]:
    return [int(gfn) for gfn in guest.vm.get_dirty_log(guest.slot)]


def address_spaces(vm: KvmVm) -> int:
    """KVM_CAP_MULTI_ADDRESS_SPACE, 0 meaning one."""
    return max(vm.check_extension(118), 1)


# --- the decision table -----------------------------------------------------------------------------

# What differs from slot 0 with 4 pages at gpa 0 and the area's address; expected class and errno.
REFUSED = {
    "unknown flag": ({"flags": 1 << 31}, SlotError, errno.EINVAL),
    "gpa not aligned": ({"gpa": 0x800}, SlotAlignmentError, errno.EINVAL),
    "size not aligned": ({"size": 0x1800}, SlotAlignmentError, errno.EINVAL),
    "host address not aligned": ({"host": 0x10}, SlotAlignmentError, errno.EINVAL),
    "kernel host address": ({"host": 0xFFFF888000000000}, SlotError, errno.EINVAL),
    "gpa wraps": ({"gpa": (1 << 64) - PAGE_SIZE}, SlotError, errno.EINVAL),
    "id beyond the limit": ({"slot": 32764}, SlotError, errno.EINVAL),
    "too many pages": ({"size": (MAX_PAGES + 1) * PAGE_SIZE}, SlotError, errno.EINVAL),
    "deletion of an absent slot": ({"size": 0}, SlotAbsentError, errno.EINVAL),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_new_slot_is_refused(vm: KvmVm, area: int, name: str) -> None:
    """kvm-mmu.md 2, decision table: rows for an absent slot."""
    change, kind, number = REFUSED[name]
    values = {"slot": 0, "flags": 0, "gpa": 0, "size": 4 * PAGE_SIZE, "host": 0, **change}
    host = values["host"] if values["host"] >> 63 else area + values["host"]
    with pytest.raises(SlotError) as caught:
        vm.set_user_memory_region(values["slot"], values["flags"], values["gpa"], values["size"], host)
    assert type(caught.value) is kind
    assert caught.value.errno == number


def test_an_address_space_that_does_not_exist_is_refused(vm: KvmVm, area: int) -> None:
    """kvm-mmu.md 2 and 15.4: bits 31:16 of the id are the address space; the VM tells how many there are."""
    absent = address_spaces(vm)
    with pytest.raises(SlotError) as caught:
        vm.set_user_memory_region(absent << 16, 0, 0, PAGE_SIZE, area)
    assert caught.value.errno == errno.EINVAL


def test_a_live_slot_cannot_change_size_memory_or_readonly(vm: KvmVm, area: int) -> None:
    """kvm-mmu.md 2: hva differs, npages differ, or READONLY toggles: EINVAL (hosts.md D.1)."""
    with GuestMemory(8 * PAGE_SIZE) as memory:
        slot = vm.create_slot(memory, 0, size=4 * PAGE_SIZE)
        for size, host, flags in (
            (8 * PAGE_SIZE, slot.host_address, 0),
            (2 * PAGE_SIZE, slot.host_address, 0),
            (4 * PAGE_SIZE, area, 0),
            (4 * PAGE_SIZE, slot.host_address, READONLY),
        ):
            with pytest.raises(SlotChangeError) as caught:
                vm.set_user_memory_region(0, flags, 0, size, host)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(SlotChangeError):
            slot.set_flags(SlotFlags.READONLY)
        assert slot.flags == SlotFlags.NONE, "a refused change must not be remembered"


def test_overlapping_slots_are_refused_at_creation_and_move(vm: KvmVm) -> None:
    """kvm-mmu.md 2: EEXIST within one address space."""
    with GuestMemory(4 * PAGE_SIZE) as memory:
        first = vm.create_slot(memory, 0)
        for gpa in (0, PAGE_SIZE, 3 * PAGE_SIZE):
            with pytest.raises(SlotOverlapError) as caught:
                vm.create_slot(memory, gpa)
            assert caught.value.errno == errno.EEXIST
        second = vm.create_slot(memory, 4 * PAGE_SIZE)
        with pytest.raises(SlotOverlapError):
            second.move(3 * PAGE_SIZE)
        assert second.gpa == 4 * PAGE_SIZE
        assert list(vm.slots) == [first.id, second.id]


def test_the_first_matching_reason_wins(vm: KvmVm, area: int) -> None:
    """kvm-mmu.md 2: alignment is judged before presence, presence before overlap."""
    vm.set_user_memory_region(0, 0, 0, 4 * PAGE_SIZE, area)
    with pytest.raises(SlotAlignmentError):
        vm.set_user_memory_region(1, 0, 0x10, 0, area)
    with pytest.raises(SlotAbsentError):
        vm.set_user_memory_region(1, 0, 0, 0, area)
    with pytest.raises(SlotOverlapError):
        vm.set_user_memory_region(1, 0, 0, PAGE_SIZE, area)


def test_an_inaccessible_host_address_is_accepted_and_fails_when_used(system: KvmSystem) -> None:
    """hosts.md D.1: the host address is only looked up by a guest access.  hosts.md C.3: then EFAULT
    (an exit of its own where the kernel says which page), or an MMIO exit where the access is emulated; never
    a silent success."""
    hole = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(hole)))
    with Tiny(system.create_machine(), pages=64) as guest:
        # Within what the page tables map; reserved (PROT_NONE), so that nobody else's memory can be there.
        guest.slot.delete()
        guest.vm.create_slot(guest.memory, 0, size=48 * PAGE_SIZE)
        guest.vm.set_user_memory_region(7, 0, 48 * PAGE_SIZE, PAGE_SIZE, address)
        outcome: object
        try:
            outcome = guest.run(STORE, rdi=48 * PAGE_SIZE, rax=1)
        except KvmError as error:
            outcome = error.errno, "host memory" in str(error)
        if isinstance(outcome, MemoryFault):
            assert (outcome.gpa, outcome.size) == (48 * PAGE_SIZE, PAGE_SIZE)
        else:
            assert outcome in ((errno.EFAULT, True), MmioWrite(48 * PAGE_SIZE, (1).to_bytes(8, "little")))


def test_identical_values_again_change_nothing(vm: KvmVm) -> None:
    """kvm-mmu.md 2: 0 and no side effect; a logging slot keeps its bits."""
    with Tiny(vm) as guest:
        vm.get_dirty_log(guest.slot)
        assert done(guest.store(DATA + 5))
        guest.slot.set_flags(SlotFlags.LOG_DIRTY_PAGES)
        assert gfns_of(guest) == [DATA + 5]


# --- what becomes of the bits (15.9) ----------------------------------------------------------------


def test_turning_logging_off_discards_the_bits(vm: KvmVm) -> None:
    """kvm-mmu.md 15.9 and 3.5: off frees the bitmap, on again starts empty."""
    with Tiny(vm) as guest:
        vm.get_dirty_log(guest.slot)
        assert done(guest.store(DATA, 3))
        guest.slot.set_flags(SlotFlags.NONE)
        with pytest.raises(LoggingDisabledError):
            vm.get_dirty_log(guest.slot)
        guest.slot.set_flags(SlotFlags.LOG_DIRTY_PAGES)
        assert gfns_of(guest) == []
        assert done(guest.store(DATA + 1))
        assert gfns_of(guest) == [DATA + 1]


def test_a_move_keeps_unread_bits(system: KvmSystem) -> None:
    """kvm-mmu.md 2 and 15.9: bits keep their index within the slot, so they denote the same memory."""
    with Tiny(system.create_machine(), pages=512) as guest, GuestMemory(8 * PAGE_SIZE) as memory:
        vm = guest.vm
        guest.slot.delete()
        vm.create_slot(guest.memory, 0, size=256 * PAGE_SIZE)
        slot = vm.create_slot(memory, 256 * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
        assert done(guest.store(256 + 3))
        slot.move(300 * PAGE_SIZE)
        assert vm.get_dirty_log(slot).tolist() == [300 + 3]
        assert memory.read(3 * PAGE_SIZE, 8) == (1).to_bytes(8, "little")
        assert done(guest.store(300 + 5))
        assert vm.get_dirty_log(slot).tolist() == [300 + 5]


def test_deleting_a_slot_discards_its_bits(system: KvmSystem) -> None:
    """kvm-mmu.md 15.9: a slot made anew in its place starts clean."""
    with Tiny(system.create_machine()) as guest:
        assert done(guest.store(DATA, 3))
        guest.slot.delete()
        slot = guest.vm.create_slot(guest.memory, 0, flags=SlotFlags.LOG_DIRTY_PAGES)
        assert guest.vm.get_dirty_log(slot).tolist() == []
        assert done(guest.store(DATA + 9))
        assert guest.vm.get_dirty_log(slot).tolist() == [DATA + 9]


def test_a_deleted_slot_is_gone_for_the_guest(system: KvmSystem) -> None:
    """A store to where it was becomes MMIO and does not reach the memory, mapped before or not."""
    with Tiny(system.create_machine(), pages=512) as guest, GuestMemory(PAGE_SIZE) as memory:
        guest.slot.delete()
        guest.vm.create_slot(guest.memory, 0, size=256 * PAGE_SIZE)
        slot = guest.vm.create_slot(memory, 256 * PAGE_SIZE)
        assert done(guest.store(256))
        slot.delete()
        exit_ = guest.run(STORE, rdi=256 * PAGE_SIZE, rax=0x77)
        assert exit_ == MmioWrite(256 * PAGE_SIZE, (0x77).to_bytes(8, "little"))
        assert memory.read(0, 8) == (1).to_bytes(8, "little")


# --- slots over one memory, and READONLY ------------------------------------------------------------


@pytest.mark.parametrize("cpl", [0, 3])
def test_only_the_slot_written_through_gets_the_bit(system: KvmSystem, cpl: int) -> None:
    """hosts.md D.1: two slots over one memory have two logs."""
    with Tiny(system.create_machine(), pages=1024, cpl=cpl) as guest:
        guest.slot.delete()
        guest.vm.create_slot(guest.memory, 0, size=256 * PAGE_SIZE)
        log = SlotFlags.LOG_DIRTY_PAGES
        with GuestMemory(8 * PAGE_SIZE) as memory:
            first = guest.vm.create_slot(memory, 256 * PAGE_SIZE, flags=log)
            alias = guest.vm.create_slot(memory, 512 * PAGE_SIZE, flags=log)
            assert done(guest.store(512 + 2))
            assert memory.read(2 * PAGE_SIZE, 8) == (1).to_bytes(8, "little")
            assert guest.vm.get_dirty_log(first).tolist() == []
            assert guest.vm.get_dirty_log(alias).tolist() == [512 + 2]


@pytest.mark.parametrize("cpl", [0, 3])
def test_a_write_to_a_readonly_slot_is_mmio_and_never_dirty(system: KvmSystem, cpl: int) -> None:
    """hosts.md C.3: the exit names the address, memory stays, LOG_DIRTY_PAGES reports nothing; reads work."""
    both = SlotFlags.READONLY | SlotFlags.LOG_DIRTY_PAGES
    with Tiny(system.create_machine(), pages=512, cpl=cpl) as guest, GuestMemory(PAGE_SIZE) as rom:
        guest.slot.delete()
        guest.vm.create_slot(guest.memory, 0, size=256 * PAGE_SIZE)
        rom.write(0, b"firmware")
        slot = guest.vm.create_slot(rom, 256 * PAGE_SIZE, flags=both)
        assert done(guest.run(LOAD, rdi=256 * PAGE_SIZE))
        assert guest.vcpu.get_registers().rax.to_bytes(8, "little") == b"firmware"
        exit_ = guest.run(STORE, rdi=256 * PAGE_SIZE, rax=5)
        assert exit_ == MmioWrite(256 * PAGE_SIZE, (5).to_bytes(8, "little"))
        assert rom.read(0, 8) == b"firmware"
        with contextlib.suppress(LoggingDisabledError):  # a kernel may keep no bitmap for it at all
            assert guest.vm.get_dirty_log(slot).tolist() == []


# --- what the binding adds --------------------------------------------------------------------------


def test_the_kernel_never_sees_numbers_that_do_not_fit(vm: KvmVm) -> None:
    """A field that would be cut off silently is an error of the caller."""
    for bad in (
        (1 << 32, 0, 0, PAGE_SIZE, 0),
        (0, 1 << 32, 0, PAGE_SIZE, 0),
        (0, 0, -PAGE_SIZE, PAGE_SIZE, 0),
        (0, 0, 1 << 64, PAGE_SIZE, 0),
        (0, 0, 0, PAGE_SIZE, -1),
    ):
        with pytest.raises(UsageError):
            vm.set_user_memory_region(*bad)


def test_a_slot_beyond_its_memory_cannot_be_made(vm: KvmVm) -> None:
    with GuestMemory(4 * PAGE_SIZE) as memory:
        for size, offset in ((5, 0), (4, 1), (1, 4), (1, -1), (-1, 0), (0, 0)):
            with pytest.raises(UsageError):
                vm.create_slot(memory, 0, size=size * PAGE_SIZE, memory_offset=offset * PAGE_SIZE)
        assert not vm.slots


def test_ring_mode_drops_entries_of_deleted_slots_and_keeps_the_rest(system: KvmSystem) -> None:
    """kvm-mmu.md 2, traps: entries pushed before the change keep the old slot and offset."""
    vm = system.create_machine()
    vm.enable_dirty_ring(LEAST_RING)
    with Tiny(vm, pages=512) as guest, GuestMemory(8 * PAGE_SIZE) as memory:
        guest.slot.delete()
        base = vm.create_slot(guest.memory, 0, size=256 * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
        other = vm.create_slot(memory, 256 * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
        assert done(guest.store(256, 3))
        assert done(guest.store(DATA, 2))
        other.delete()
        harvest = vm.collect_rings()
        assert harvest.stale == 3
        assert gfns(harvest.pages, base.id) == [DATA, DATA + 1]
        assert harvest.pages.slots == (base.id,)


@pytest.mark.parametrize("change", ["move", "make anew"])
def test_ring_mode_drops_entries_whose_id_means_something_else_by_now(system: KvmSystem, change: str) -> None:
    """kvm-mmu.md 2, traps: the id and offset of an entry would now denote another page."""
    vm = system.create_machine()
    vm.enable_dirty_ring(LEAST_RING)
    with Tiny(vm, pages=512) as guest, GuestMemory(8 * PAGE_SIZE) as memory:
        guest.slot.delete()
        vm.create_slot(guest.memory, 0, size=256 * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
        other = vm.create_slot(memory, 256 * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
        assert done(guest.store(256, 3))
        if change == "move":
            other.move(300 * PAGE_SIZE)
        else:
            other.delete()
            vm.create_slot(memory, 300 * PAGE_SIZE, slot_id=other.id, flags=SlotFlags.LOG_DIRTY_PAGES)
        assert done(guest.store(301))
        harvest = vm.collect_rings()
        assert gfns(harvest.pages, other.id) == [301]
        assert harvest.stale == 3


@pytest.mark.parametrize("change", ["make", "move"])
def test_a_collector_does_not_meet_a_slot_that_only_the_kernel_knows(
    system: KvmSystem, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """What the guest writes right after the ioctl is in the ring before the slot is in our books."""
    vm = system.create_machine()
    vm.enable_dirty_ring(1024)
    with Tiny(vm, pages=512) as guest, GuestMemory(8 * PAGE_SIZE) as memory:
        guest.slot.delete()
        vm.create_slot(guest.memory, 0, size=256 * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
        if change == "move":
            other = vm.create_slot(memory, 256 * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
        vm.collect_rings()
        harvests: list[RingHarvest] = []
        collector = threading.Thread(target=lambda: harvests.append(vm.collect_rings()), daemon=True)
        make = vm.set_user_memory_region

        def then_write_and_collect(*values: int) -> None:
            make(*values)
            assert done(guest.store(300, 2))
            collector.start()
            collector.join(0.1)

        monkeypatch.setattr(vm, "set_user_memory_region", then_write_and_collect)
        if change == "move":
            other.move(300 * PAGE_SIZE)
        else:
            other = vm.create_slot(memory, 300 * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
        collector.join(20)
        assert [(harvest.stale, gfns(harvest.pages, other.id)) for harvest in harvests] == [(0, [300, 301])]
