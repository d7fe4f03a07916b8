"""The dirty bitmap as KVM gives it, at the ioctl and through the binding (docs/reference/kvm-mmu.md 3)."""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt
import pytest

from pykvm.abi import ffi, lib
from pykvm.errors import (
    ClearRangeError,
    ClosedError,
    DirtyRingModeError,
    KvmError,
    LoggingDisabledError,
    UsageError,
)
from pykvm.kvm import KvmSystem, KvmVm
from pykvm.machine import SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from tests.rings import LEAST_RING

from .tiny import DATA, LOAD, STORE, Tiny, done, emulates_cpl0_in_batches, ring_guest

MANUAL_PROTECT2 = 168
ONES = 0xFFFFFFFFFFFFFFFF
LOG = SlotFlags.LOG_DIRTY_PAGES


def ones(words: int) -> npt.NDArray[np.uint64]:
    return np.full(words, ONES, dtype=np.uint64)


def raw_get(vm: KvmVm, slot: int, buffer: object) -> None:
    """KVM_GET_DIRTY_LOG as it is.  ``buffer``: a pointer."""
    log = ffi.new("struct kvm_dirty_log *")
    log.slot = slot
    log.dirty_bitmap = buffer
    vm.ioctl(lib.KVM_GET_DIRTY_LOG, log, "KVM_GET_DIRTY_LOG")


def raw_clear(vm: KvmVm, slot: int, first: int, pages: int) -> None:
    """KVM_CLEAR_DIRTY_LOG as it is, with as many set bits as any slot here needs."""
    log = ffi.new("struct kvm_clear_dirty_log *")
    words = ffi.new("__u64[]", [ONES] * 32)
    log.slot, log.first_page, log.num_pages = slot, first, pages
    log.dirty_bitmap = words
    vm.ioctl(lib.KVM_CLEAR_DIRTY_LOG, log, "KVM_CLEAR_DIRTY_LOG")


def dirty(guest: Tiny) -> list[int]:
    return [int(gfn) for gfn in guest.vm.get_dirty_log(guest.slot)]


# --- GET, with and without manual protection (hosts.md D.2) -----------------------------------------


@pytest.mark.parametrize("cpl", [0, 3])
def test_get_clears_and_the_next_write_is_seen_again(system: KvmSystem, cpl: int) -> None:
    """D.2, manual=0: the second GET is empty; a page stays silent until it is written again."""
    with Tiny(system.create_machine(), cpl=cpl) as guest:
        assert done(guest.store(DATA, 70))
        assert dirty(guest) == list(range(DATA, DATA + 70))
        assert dirty(guest) == []
        assert done(guest.store(DATA + 3, 2))
        assert dirty(guest) == [DATA + 3, DATA + 4]


@pytest.mark.parametrize("cpl", [0, 3])
def test_with_manual_protection_get_only_reads(system: KvmSystem, cpl: int) -> None:
    """D.2, manual=1: same bits again until CLEAR; only the bits asked for and set are re-armed."""
    vm = system.create_machine()
    vm.enable_manual_protect()
    with Tiny(vm, cpl=cpl) as guest:
        assert done(guest.store(DATA, 3))
        assert dirty(guest) == dirty(guest) == [DATA, DATA + 1, DATA + 2]
        words = np.zeros(1, dtype=np.uint64)
        words[0] = 1 << (DATA + 1)
        vm.clear_dirty_log(guest.slot, 0, 64, words)
        assert dirty(guest) == [DATA, DATA + 2]
        assert done(guest.store(DATA, 3))
        assert dirty(guest) == [DATA, DATA + 1, DATA + 2]


def test_a_write_between_get_and_clear_stays_covered(system: KvmSystem) -> None:
    """CLEAR drops the bit of a page written after the GET as well: hence contents are read after CLEAR."""
    vm = system.create_machine()
    vm.enable_manual_protect()
    with Tiny(vm) as guest:
        assert done(guest.store(DATA))
        assert dirty(guest) == [DATA]
        assert done(guest.run(STORE, rdi=DATA * PAGE_SIZE, rax=0x99))
        vm.clear_dirty_log(guest.slot, 0, 64, ones(1))
        assert dirty(guest) == []
        assert guest.memory.read(DATA * PAGE_SIZE, 1) == b"\x99"


@pytest.mark.parametrize("npages", [100, 128, 2048])
def test_initially_set_starts_with_exactly_every_page(system: KvmSystem, npages: int) -> None:
    """kvm-mmu.md 3.5 and 15.35: all ones, no bit beyond the slot, at creation and at enabling."""
    vm = system.create_machine()
    vm.enable_manual_protect(initially_set=True)
    with Tiny(vm, pages=npages) as guest:
        assert dirty(guest) == list(range(npages))
        words = vm.get_dirty_bitmap(guest.slot)
        assert len(words) == -(-npages // 64)
        guest.slot.set_flags(SlotFlags.NONE)
        guest.slot.set_flags(LOG)
        assert dirty(guest) == list(range(npages))
        vm.clear_dirty_log(guest.slot, 0, npages, ones(len(words)))
        assert dirty(guest) == []
        assert done(guest.store(DATA, 2))
        assert dirty(guest) == [DATA, DATA + 1]


def test_clear_works_without_manual_protection_too(system: KvmSystem) -> None:
    """kvm-mmu.md 3.1: "CLEAR works even without the cap"."""
    with Tiny(system.create_machine()) as guest:
        assert done(guest.store(DATA, 2))
        guest.vm.clear_dirty_log(guest.slot, 0, 64, ones(1))
        assert dirty(guest) == []


@pytest.mark.parametrize("value", [2, 4, 7, 1 << 32])
def test_manual_protection_knows_three_values(vm: KvmVm, value: int) -> None:
    """kvm-mmu.md 3.4: args[0] outside 0, 1, 3 is EINVAL, INITIALLY_SET alone included."""
    with pytest.raises(KvmError) as caught:
        vm.enable_cap(MANUAL_PROTECT2, value)
    assert caught.value.errno == errno.EINVAL


def test_manual_protection_may_change_at_any_time(system: KvmSystem) -> None:
    """kvm-mmu.md 3.4: it takes effect at the next operation, and bitmaps that exist are not filled anew."""
    with Tiny(system.create_machine()) as guest:
        vm = guest.vm
        assert done(guest.store(DATA))
        vm.enable_manual_protect(initially_set=True)
        assert dirty(guest) == dirty(guest) == [DATA]
        vm.enable_cap(MANUAL_PROTECT2, 0)
        assert dirty(guest) == [DATA]
        assert dirty(guest) == []


# --- the buffer (15.3, 15.10) -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("npages", "words"), [(64, 1), (65, 2), (74, 2), (100, 2), (127, 2), (128, 2), (129, 3)]
)
def test_get_writes_whole_words_and_no_more(system: KvmSystem, npages: int, words: int) -> None:
    """15.3 and D.2: buffers are padded to 64 pages; pad bits are 0, the next word stays untouched."""
    with Tiny(system.create_machine(), pages=npages) as guest:
        assert done(guest.store(npages - 1))
        buffer = ffi.new("__u64[]", [ONES] * (words + 1))
        raw_get(guest.vm, 0, buffer)
        assert list(buffer) == [*[0] * (words - 1), 1 << (npages - 1) % 64, ONES]
        assert done(guest.store(npages - 1))
        assert len(guest.vm.get_dirty_bitmap(guest.slot)) == words
        assert done(guest.store(npages - 1))
        assert dirty(guest) == [npages - 1]


def test_a_fault_on_the_buffer_loses_the_bits(system: KvmSystem) -> None:
    """15.10: an EFAULT from GET without manual protection has already cleared them.  The binding passes a
    buffer of its own, so this cannot happen through it."""
    with Tiny(system.create_machine()) as guest:
        assert done(guest.store(DATA))
        with pytest.raises(KvmError) as caught:
            raw_get(guest.vm, 0, ffi.cast("void *", 4096))
        assert caught.value.errno == errno.EFAULT
        assert dirty(guest) == []


def test_a_fault_on_the_buffer_keeps_the_bits_with_manual_protection(system: KvmSystem) -> None:
    """The counterpart of 15.10: GET only reads then."""
    vm = system.create_machine()
    vm.enable_manual_protect()
    with Tiny(vm) as guest:
        assert done(guest.store(DATA))
        with pytest.raises(KvmError):
            raw_get(vm, 0, ffi.cast("void *", 4096))
        assert dirty(guest) == [DATA]


def test_bits_are_relative_to_the_slot(system: KvmSystem) -> None:
    """15.4: bit 0 is the slot's first page; the binding's gfns are absolute."""
    with Tiny(system.create_machine(), pages=512) as guest, GuestMemory(70 * PAGE_SIZE) as memory:
        vm = guest.vm
        guest.slot.delete()
        vm.create_slot(guest.memory, 0, size=256 * PAGE_SIZE)
        slot = vm.create_slot(memory, 300 * PAGE_SIZE, flags=LOG)
        for gfn in (300, 363, 364, 369):
            assert done(guest.store(gfn))
        assert vm.get_dirty_bitmap(slot).tolist() == [1 | 1 << 63, 1 | 1 << 5]
        for gfn in (300, 363, 364, 369):
            assert done(guest.store(gfn))
        assert vm.get_dirty_log(slot).tolist() == [300, 363, 364, 369]


# --- CLEAR's arguments (15.3; matrix of kvm-mmu.md 3.2) ---------------------------------------------

CLEAR_100 = {
    **dict.fromkeys([(0, 100), (0, 64), (64, 36), (0, 0)], True),
    **dict.fromkeys([(1, 64), (64, 64), (0, 128), (64, 32), (128, 0), (100, 0), (0, 36)], False),
}
CLEAR_74 = {
    **dict.fromkeys([(64, 10), (0, 74), (0, 64), (64, 0)], True),
    **dict.fromkeys([(64, 64), (64, 128), (0, 10), (63, 11), (128, 0)], False),
}
MATRIX = [(100, *args, ok) for args, ok in CLEAR_100.items()] + [
    (74, *args, ok) for args, ok in CLEAR_74.items()
]


@pytest.mark.parametrize(("npages", "first", "pages", "accepted"), MATRIX)
def test_clear_ranges(system: KvmSystem, npages: int, first: int, pages: int, accepted: bool) -> None:
    """15.3: first_page % 64 == 0, and num_pages % 64 == 0 unless the range ends with the slot."""
    with Tiny(system.create_machine(), pages=npages) as guest:
        assert done(guest.store(DATA, npages - DATA))
        every = list(range(DATA, npages))
        if accepted:
            raw_clear(guest.vm, 0, first, pages)
            guest.vm.clear_dirty_log(guest.slot, first, pages, ones(2))
            assert dirty(guest) == [gfn for gfn in every if not first <= gfn < first + pages]
            return
        with pytest.raises(KvmError) as plain:
            raw_clear(guest.vm, 0, first, pages)
        with pytest.raises(ClearRangeError, match="multiple of 64") as caught:
            guest.vm.clear_dirty_log(guest.slot, first, pages, ones(2))
        assert plain.value.errno == caught.value.errno == errno.EINVAL
        assert dirty(guest) == every, "a refused CLEAR must clear nothing"


def test_clear_refuses_a_bitmap_that_is_too_short(system: KvmSystem) -> None:
    """The kernel would read past its end."""
    with Tiny(system.create_machine(), pages=100) as guest:
        for pages, words in ((64, 0), (100, 1)):
            with pytest.raises(UsageError, match="words"):
                guest.vm.clear_dirty_log(guest.slot, 0, pages, ones(words))
        for first, pages in ((-64, 64), (0, -1), (1 << 64, 64), (0, 1 << 32)):
            with pytest.raises(UsageError):
                guest.vm.clear_dirty_log(guest.slot, first, pages, ones(2))


# --- whose log (kvm-mmu.md 3.2, order of checks) ----------------------------------------------------


def test_a_slot_without_logging_has_no_log(system: KvmSystem) -> None:
    """3.2: ENOENT for GET and CLEAR, and for a slot that does not exist."""
    with Tiny(system.create_machine(), flags=SlotFlags.NONE) as guest:
        for call in (
            lambda: guest.vm.get_dirty_log(guest.slot),
            lambda: guest.vm.get_dirty_bitmap(guest.slot),
            lambda: guest.vm.clear_dirty_log(guest.slot, 0, 64, ones(1)),
        ):
            with pytest.raises(LoggingDisabledError, match="LOG_DIRTY_PAGES") as caught:
                call()
            assert caught.value.errno == errno.ENOENT
        for call in (lambda: raw_get(guest.vm, 5, ones_buffer()), lambda: raw_clear(guest.vm, 5, 0, 64)):
            with pytest.raises(KvmError) as plain:
                call()
            assert plain.value.errno == errno.ENOENT


def ones_buffer() -> object:
    return ffi.new("__u64[]", 64)


@pytest.mark.parametrize("slot", [32764, 32767, 0xFFFF])
def test_an_impossible_slot_id_is_not_the_same_as_an_absent_one(system: KvmSystem, slot: int) -> None:
    """3.2 and D.1: EINVAL for ids that cannot exist, ENOENT for those that could."""
    with Tiny(system.create_machine()) as guest:
        for call in (
            lambda: raw_get(guest.vm, slot, ones_buffer()),
            lambda: raw_clear(guest.vm, slot, 0, 64),
        ):
            with pytest.raises(KvmError) as caught:
                call()
            assert caught.value.errno == errno.EINVAL


def test_an_address_space_too_many(system: KvmSystem) -> None:
    """15.4: bits 31:16 are the address space; beyond those of the VM it is EINVAL."""
    with Tiny(system.create_machine()) as guest:
        spaces = max(guest.vm.check_extension(118), 1)
        with pytest.raises(KvmError) as caught:
            raw_get(guest.vm, spaces << 16, ones_buffer())
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("slot", [0, 5, 0xFFFF, 99 << 16])
def test_in_ring_mode_every_bitmap_call_is_refused_before_its_arguments(system: KvmSystem, slot: int) -> None:
    """15.2: ENXIO first, whatever slot, range or pointer."""
    with ring_guest(system, LEAST_RING) as guest:
        for call in (
            lambda: raw_get(guest.vm, slot, ffi.NULL),
            lambda: raw_clear(guest.vm, slot, 1, 1),
        ):
            with pytest.raises(KvmError) as caught:
                call()
            assert caught.value.errno == errno.ENXIO
        with pytest.raises(DirtyRingModeError, match="collect_rings"):
            guest.vm.get_dirty_log(guest.slot)
        with pytest.raises(DirtyRingModeError, match="collect_rings"):
            guest.vm.clear_dirty_log(guest.slot, 1, 1, ones(1))


def test_a_slot_of_another_machine_is_refused(system: KvmSystem) -> None:
    """Its id may well exist here: the kernel would hand out the log of somebody else's slot."""
    with Tiny(system.create_machine()) as one, Tiny(system.create_machine()) as two:
        with pytest.raises(UsageError, match="another machine"):
            one.vm.get_dirty_log(two.slot)
        with pytest.raises(UsageError, match="another machine"):
            one.vm.clear_dirty_log(two.slot, 0, 64, ones(1))


def test_a_deleted_slot_has_no_log_even_if_its_id_lives_on(system: KvmSystem) -> None:
    with Tiny(system.create_machine()) as guest:
        guest.slot.delete()
        guest.vm.create_slot(guest.memory, 0, slot_id=guest.slot.id, flags=LOG)
        with pytest.raises(ClosedError):
            guest.vm.get_dirty_log(guest.slot)


# --- what counts as a write (hosts.md B.8, E) -------------------------------------------------------


def test_writes_of_the_host_are_not_logged(system: KvmSystem) -> None:
    """E and 15.33: the VMM's own stores, whether through the mapping or the memfd."""
    with Tiny(system.create_machine()) as guest:
        guest.memory.write(DATA * PAGE_SIZE, b"host")
        guest.memory.view()[(DATA + 1) * PAGE_SIZE] = 1
        guest.memory.discard((DATA + 2) * PAGE_SIZE, PAGE_SIZE)
        assert dirty(guest) == []


def test_discarded_memory_reads_as_zero_and_is_logged_when_written_again(system: KvmSystem) -> None:
    """E: dropping the host page drops KVM's mapping, and the next write faults and is logged."""
    with Tiny(system.create_machine()) as guest:
        assert done(guest.run(STORE, rdi=DATA * PAGE_SIZE, rax=0x5555))
        assert dirty(guest) == [DATA]
        guest.memory.discard(DATA * PAGE_SIZE, PAGE_SIZE)
        assert done(guest.run(LOAD, rdi=DATA * PAGE_SIZE, rax=7))
        assert guest.vcpu.get_registers().rax == 0
        vm_first = set(dirty(guest))
        assert vm_first <= {DATA}, "a read may report the page that it maps writable, no other"
        assert done(guest.run(STORE, rdi=DATA * PAGE_SIZE, rax=0x66))
        assert DATA in dirty(guest) or vm_first == {DATA}


# mnemonic: (code, registers); rdi points to the page.
A = DATA * PAGE_SIZE
WRITES: dict[str, tuple[str, dict[str, int]]] = {
    "mov": ("48 89 07", {}),
    "xchg": ("48 87 07", {}),
    "lock cmpxchg that succeeds": ("f0 48 0f b1 0f", {"rax": 0}),
    "lock cmpxchg that fails (15.34)": ("f0 48 0f b1 0f", {"rax": 1}),
    "cmpxchg that fails (15.34)": ("48 0f b1 0f", {"rax": 1}),
    "xadd": ("48 0f c1 0f", {}),
    "or with 0": ("48 83 0f 00", {}),
    "inc": ("48 ff 07", {}),
    "bts": ("0f ba 2f 05", {}),
    "stosb": ("aa", {}),
    "push": ("54", {"rsp": A + 8}),
    "setcc": ("0f 94 07", {}),
}
READS: dict[str, tuple[str, dict[str, int]]] = {
    "bt": ("0f ba 27 05", {}),
    "test": ("48 85 07", {}),
    "cmp": ("48 39 07", {}),
    "rep stosb of nothing": ("f3 aa", {}),
    "lodsb": ("ac", {"rsi": A}),
    "lea": ("48 8d 07", {}),
}


def run_one(guest: Tiny, code: str, registers: dict[str, int]) -> list[int]:
    """Execute one instruction with rdi = the page; the pages reported for it."""
    rsp = registers.pop("rsp", None)
    guest.load(bytes.fromhex(code) + b"\xe6\x10", rdi=A, **registers)
    if rsp is not None:
        values = guest.vcpu.get_registers()
        values.rsp = rsp
        guest.vcpu.set_registers(values)
    assert done(guest.vcpu.run())
    return dirty(guest)


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("name", WRITES)
def test_instructions_that_write(system: KvmSystem, name: str, cpl: int) -> None:
    """E: all of these report the page, even where they store what was there."""
    code, registers = WRITES[name]
    with Tiny(system.create_machine(), cpl=cpl) as guest:
        assert run_one(guest, code, dict(registers)) == [DATA]


@pytest.mark.parametrize("name", READS)
def test_instructions_that_only_read(system: KvmSystem, name: str) -> None:
    """E: none of these reports a page that is mapped already and protected by the last GET."""
    code, registers = READS[name]
    with Tiny(system.create_machine()) as guest:
        assert done(guest.store(DATA))
        assert dirty(guest) == [DATA]
        assert run_one(guest, code, dict(registers)) == []


def test_a_read_of_a_page_whose_entry_is_dirty_may_report_it(system: KvmSystem) -> None:
    """15.17: mapping a page writable marks it, and a read maps it writable where the guest's entry has D
    set.  Emulated code maps nothing and reports exactly the stores; both keep to "superset"."""
    with Tiny(system.create_machine()) as guest:
        assert done(guest.run(LOAD, rdi=A))
        assert dirty(guest) in ([], [DATA])
    with Tiny(system.create_machine(), cpl=0) as guest:
        assert done(guest.run(LOAD, rdi=A))
        allowed = ([],) if emulates_cpl0_in_batches(system) else ([], [DATA])
        assert dirty(guest) in allowed


@pytest.mark.parametrize("cpl", [0, 3])
def test_a_store_across_two_pages_reports_both(system: KvmSystem, cpl: int) -> None:
    """15.32 and experiment 10: the second page is not forgotten."""
    with Tiny(system.create_machine(), cpl=cpl) as guest:
        assert done(guest.run(STORE, rdi=A + PAGE_SIZE - 4, rax=ONES))
        assert dirty(guest) == [DATA, DATA + 1]


@pytest.mark.parametrize("cpl", [0, 3])
def test_a_string_store_over_many_pages_reports_all(system: KvmSystem, cpl: int) -> None:
    """Experiment 9 and 15.32: rep stosq, more than one emulator batch long."""
    with Tiny(system.create_machine(), cpl=cpl) as guest:
        assert done(guest.run(bytes.fromhex("f3 48 ab e6 10"), rdi=A, rcx=9 * 512, rax=3))
        assert dirty(guest) == list(range(DATA, DATA + 9))
