"""Exits, events and statistics as a real KVM gives them (docs/reference/hosts.md C, kvm-mmu.md 14 and 15)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from pykvm.abi import ffi, lib
from pykvm.errors import KvmError, UsageError
from pykvm.kvm import KvmSystem
from pykvm.machine import (
    Halted,
    InternalError,
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Shutdown,
    SlotFlags,
)
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.bits import Cr0, Cr4, Efer

from .tiny import (
    COUNT_FOR_EVER,
    DATA,
    DONE,
    LOAD,
    PD,
    PDPT,
    PML4,
    PORT,
    STORE,
    SYSTEM,
    TABLES,
    Tiny,
    done,
    emulates_cpl0_in_batches,
)

HOLE = 100 * PAGE_SIZE
"""Mapped by the guest's page tables (of 512 pages), with no memory behind it."""
A = DATA * PAGE_SIZE


@pytest.fixture(params=[3, 0], ids=["CPL3", "CPL0"])
def guest(system: KvmSystem, request: pytest.FixtureRequest) -> Iterator[Tiny]:
    with Tiny(system.create_machine(), cpl=request.param, pages=512) as made:
        made.slot.delete()
        made.slot = made.vm.create_slot(made.memory, 0, size=HOLE, flags=SlotFlags.LOG_DIRTY_PAGES)
        yield made


# --- ports and MMIO (C.3) ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "size", "value"),
    [("e6 10", 1, 0xEF), ("66 e7 10", 2, 0xBEEF), ("e7 10", 4, 0xDEADBEEF)],
    ids=["byte", "word", "doubleword"],
)
def test_out_of_each_size(guest: Tiny, code: str, size: int, value: int) -> None:
    exit_ = guest.run(bytes.fromhex(code) + DONE, rax=0xDEADBEEF)
    assert exit_ == IoOut(PORT, size, value.to_bytes(size, "little"))


@pytest.mark.parametrize(("code", "size"), [("e4 20", 1), ("66 e5 20", 2), ("e5 20", 4)])
def test_in_of_each_size_takes_its_answer(guest: Tiny, code: str, size: int) -> None:
    assert guest.run(bytes.fromhex(code) + DONE, rax=0) == IoIn(0x20, size)
    answer = bytes(range(0x81, 0x81 + size))
    for wrong in (b"", answer[:-1], answer + b"x"):
        with pytest.raises(UsageError, match="bytes"):
            guest.vcpu.reply(wrong)
    guest.vcpu.reply(answer)
    with pytest.raises(UsageError, match="no IoIn"):
        guest.vcpu.reply(answer)
    assert done(guest.vcpu.run())
    assert guest.vcpu.get_registers().rax == int.from_bytes(answer, "little")


def test_the_instruction_pointer_after_an_exit_is_settled_by_the_next_run(guest: Tiny) -> None:
    """C.3: at an OUT exit RIP may be at or after the instruction; after a kick it is after it, and the OUT
    is not repeated."""
    exit_ = guest.run(DONE + bytes([0xE6, PORT + 1]))
    assert exit_ == IoOut(PORT, 1, b"\0")
    start = guest.vcpu.get_registers().rip & ~0x3F
    assert guest.vcpu.get_registers().rip in (start, start + 2)
    guest.vcpu.kick()
    guest.vcpu.run()
    assert guest.vcpu.get_registers().rip == start + 2
    assert guest.vcpu.run() == IoOut(PORT + 1, 1, b"\0")


def test_rep_outsb_arrives_whole(guest: Tiny) -> None:
    """C.3: one exit per byte or several with a count; in all exactly the string, in order."""
    guest.memory.write(A, b"a string of bytes")
    exit_ = guest.run(bytes.fromhex("f3 6e") + bytes([0xE6, PORT]), rsi=A, rcx=17, rdx=0x30)
    text = b""
    while isinstance(exit_, IoOut) and exit_.port == 0x30:
        assert len(exit_.data) == exit_.size * exit_.repeat
        text += exit_.data
        exit_ = guest.vcpu.run()
    assert done(exit_)
    assert text == b"a string of bytes"


def test_rep_insb_dirties_its_pages(guest: Tiny) -> None:
    """C.3: the data is written, and the pages marked, when it is supplied."""
    data = bytes(n % 251 for n in range(PAGE_SIZE + 100))
    guest.vm.get_dirty_log(guest.slot)
    exit_ = guest.run(bytes.fromhex("f3 6c") + DONE, rdi=A + PAGE_SIZE - 50, rcx=len(data), rdx=0x30)
    at = 0
    while isinstance(exit_, IoIn):
        length = exit_.size * exit_.repeat
        guest.vcpu.reply(data[at : at + length])
        at += length
        exit_ = guest.vcpu.run()
    assert done(exit_)
    assert guest.memory.read(A + PAGE_SIZE - 50, len(data)) == data
    assert guest.vm.get_dirty_log(guest.slot).tolist() == [DATA, DATA + 1, DATA + 2]


def test_mmio_read_and_write(guest: Tiny) -> None:
    assert guest.run(STORE, rdi=HOLE + 8, rax=0x1122334455667788) == MmioWrite(
        HOLE + 8, (0x1122334455667788).to_bytes(8, "little")
    )
    assert done(guest.vcpu.run())
    assert guest.run(LOAD, rdi=HOLE + 16) == MmioRead(HOLE + 16, 8)
    guest.vcpu.reply(b"answered")
    assert done(guest.vcpu.run())
    assert guest.vcpu.get_registers().rax.to_bytes(8, "little") == b"answered"


def test_read_modify_write_of_mmio_is_two_exits(guest: Tiny) -> None:
    """C.3: a read exit, then a write exit with the result."""
    assert guest.run(bytes.fromhex("48 ff 07") + DONE, rdi=HOLE) == MmioRead(HOLE, 8)
    guest.vcpu.reply((41).to_bytes(8, "little"))
    assert guest.vcpu.run() == MmioWrite(HOLE, (42).to_bytes(8, "little"))
    assert done(guest.vcpu.run())


def test_a_store_across_the_end_of_memory_writes_its_first_part(guest: Tiny) -> None:
    """C.3: the RAM part is written and dirtied, only the rest is MMIO."""
    guest.vm.get_dirty_log(guest.slot)
    exit_ = guest.run(STORE, rdi=HOLE - 4, rax=0x1122334455667788)
    assert exit_ == MmioWrite(HOLE, bytes.fromhex("44332211"))
    assert guest.memory.read(HOLE - 4, 4) == bytes.fromhex("88776655")
    assert guest.vm.get_dirty_log(guest.slot).tolist() == [99]


def test_ports_nobody_listens_to_do_not_reach_python(guest: Tiny) -> None:
    """OUT is dropped, IN reads all ones, as on a bus where nobody answers."""
    guest.vcpu.listen([PORT])
    code = bytes.fromhex("e6 40 e5 44") + DONE
    before = guest.vcpu.swallowed
    assert done(guest.run(code, rax=0))
    assert guest.vcpu.get_registers().rax == 0xFFFFFFFF
    assert guest.vcpu.swallowed == before + 2
    guest.vcpu.listen([0x47, PORT])
    assert guest.run(bytes.fromhex("e5 44"), rax=0) == IoIn(0x44, 4), "the port's last byte is listened to"
    for bad in (-1, 0x10000):
        with pytest.raises(UsageError):
            guest.vcpu.listen([bad])


# --- the end of a guest (C.2, H) --------------------------------------------------------------------


def test_hlt_at_cpl_0(system: KvmSystem) -> None:
    """C.3: without an in-kernel interrupt controller HLT is an exit."""
    with Tiny(system.create_machine(), cpl=0, pages=64) as guest:
        assert guest.run(b"\xf4") == Halted()


def test_a_triple_fault_is_a_shutdown_and_leaves_nothing_hanging(guest: Tiny) -> None:
    """C.2 and H.2: there may be no way on for this vCPU, and every later run must say so, not hang.

    AMD's leaves the processor's state undefined, so KVM resets the vCPU.
    """
    special = guest.vcpu.get_special_registers()
    assert guest.run(b"\x0f\x0b") == Shutdown()
    guest.vcpu.set_special_registers(special)
    again = guest.run(DONE)
    assert again == Shutdown() or done(again)
    if done(again):
        return
    assert guest.vcpu.run() == Shutdown()
    # Another vCPU of the same VM is not touched by that.
    other = guest.vm.create_vcpu()
    other.set_cpuid(guest.vm.supported_cpuid)
    other.set_special_registers(special)
    guest.vcpus.append(other)
    assert done(guest.run(DONE, other))


def test_an_instruction_that_kvm_cannot_emulate(system: KvmSystem) -> None:
    """15.14 and C.2: at CPL 0 an InternalError with the fetched bytes where KVM emulates, else it runs."""
    cmpxchg16b = bytes.fromhex("48 0f c7 0f")
    with Tiny(system.create_machine(), cpl=0, pages=64) as guest:
        exit_ = guest.run(cmpxchg16b + DONE, rdi=A)
        if not emulates_cpl0_in_batches(system):
            assert done(exit_)
            return
        assert isinstance(exit_, InternalError)
        assert exit_.suberror == lib.KVM_INTERNAL_ERROR_EMULATION
        assert exit_.instruction.startswith(cmpxchg16b)
        assert len(exit_.instruction) <= 15
        assert "cmpxchg16b" in exit_.disassembly
        assert "cmpxchg16b" in str(exit_)


def test_inconsistent_control_registers_are_refused(system: KvmSystem) -> None:
    """C.4: PG without PE, LMA without PG: EINVAL, and the vCPU keeps its state."""
    with Tiny(system.create_machine(), pages=64) as guest:
        for change in (
            {"cr0": int(Cr0.PG)},
            {"cr4": 0},
            {"efer": int(Efer.LME)},
            {"cr3": 1 << 60},
            {"cr4": int(Cr4.PAE) | 1 << 40},
        ):
            special = guest.vcpu.get_special_registers()
            for name, value in change.items():
                setattr(special, name, value)
            with pytest.raises(KvmError) as caught:
                guest.vcpu.set_special_registers(special)
            assert caught.value.errno == errno.EINVAL, change
        assert done(guest.store(DATA))


# --- statistics (15.11, 15.40) ----------------------------------------------------------------------


def test_statistics_are_u64_by_name(guest: Tiny) -> None:
    """15.11: by descriptor offset, not by index; cumulative ones never go down."""
    before = guest.vcpu.statistics()
    assert done(guest.store(DATA, 10))
    after = guest.vcpu.statistics()
    assert set(before) == set(after)
    assert after.value("exits") > before.value("exits")
    assert after.id != ""
    for name, statistic in after.items():
        assert all(0 <= value < 1 << 64 for value in statistic.values), name
        if statistic.type == 0:
            assert statistic.value >= before[name].value, name


def test_statistics_stay_readable_in_a_kept_descriptor(system: KvmSystem) -> None:
    """C.4: the statistics' own descriptor outlives the VM's; closing the VM here closes both."""
    with Tiny(system.create_machine(), pages=64) as guest:
        fd = guest.vm.ioctl_int(lib.KVM_GET_STATS_FD, 0, "KVM_GET_STATS_FD")
        try:
            header = os.pread(fd, 24, 0)
            guest.vm.close()
            assert os.pread(fd, 24, 0) == header
        finally:
            os.close(fd)


def test_emulated_code_shows_in_the_counters(system: KvmSystem) -> None:
    """14.1 and the probe: where CPL 0 is emulated, each instruction counts in insn_emulation."""
    counted = {}
    for cpl in (3, 0):
        with Tiny(system.create_machine(), cpl=cpl, pages=64) as guest:
            assert done(guest.run(DONE))
            before = guest.vcpu.statistics()
            assert done(guest.store(DATA, 40))
            counted[cpl] = guest.vcpu.statistics().value("insn_emulation") - before.value("insn_emulation")
    assert counted[3] < 40
    assert (counted[0] >= 4 * 40) == emulates_cpl0_in_batches(system)


def test_write_protection_costs_one_fault_per_page_and_round(system: KvmSystem) -> None:
    """hosts.md B.0: after a GET the first write to each page faults once, the second not at all."""
    with Tiny(system.create_machine()) as guest:
        assert done(guest.store(DATA, 20))
        guest.vm.get_dirty_log(guest.slot)
        before = guest.vcpu.statistics()
        assert done(guest.store(DATA, 20))
        first = guest.vcpu.statistics()
        assert done(guest.store(DATA, 20))
        second = guest.vcpu.statistics()
        faults = first.value("pf_taken") - before.value("pf_taken")
        assert faults >= 20 or first.value("exits") - before.value("exits") < 20, "or the CPU logs (PML)"
        assert second.value("pf_taken") - first.value("pf_taken") < 20


# --- side effects (15.12) ---------------------------------------------------------------------------


def test_translate_has_side_effects(system: KvmSystem) -> None:
    """15.12: it sets the A bits of the tables it walks, and their pages become dirty."""
    with Tiny(system.create_machine(), pages=512) as guest:
        guest.system.set_flags(SlotFlags.LOG_DIRTY_PAGES)
        table = TABLES * PAGE_SIZE + DATA * 8
        entry = int.from_bytes(guest.memory.read(table, 8), "little")
        guest.memory.write(table, (entry & ~0x60).to_bytes(8, "little"))
        assert guest.vcpu.translate(A + 5) == A + 5
        assert int.from_bytes(guest.memory.read(table, 8), "little") == entry & ~0x60 | 0x20
        assert guest.vm.get_dirty_log(guest.system).tolist() == [SYSTEM + TABLES]
        assert guest.vcpu.translate(1 << 40) is None


def test_accessed_and_dirty_bits_dirty_the_table(guest: Tiny) -> None:
    """15.19: the table's page is marked when the walk changes an entry.

    Which pages a store marks beyond that, if its walk changes none, the host says first: those of all
    tables with nested paging, none otherwise.
    """
    guest.system.set_flags(SlotFlags.LOG_DIRTY_PAGES)
    assert done(guest.store(DATA))
    guest.vm.get_dirty_log(guest.slot)
    guest.vm.get_dirty_log(guest.system)
    assert done(guest.store(DATA))
    always = guest.vm.get_dirty_log(guest.system).tolist()
    assert not always or {SYSTEM + page for page in (PML4, PDPT, PD, TABLES)} <= set(always)
    table = TABLES * PAGE_SIZE + DATA * 8
    entry = int.from_bytes(guest.memory.read(table, 8), "little")
    guest.memory.write(table, (entry & ~0x60).to_bytes(8, "little"))
    guest.vm.get_dirty_log(guest.slot)
    assert done(guest.store(DATA))
    assert int.from_bytes(guest.memory.read(table, 8), "little") == entry
    assert guest.vm.get_dirty_log(guest.slot).tolist() == [DATA]
    assert set(guest.vm.get_dirty_log(guest.system).tolist()) == {SYSTEM + TABLES, *always}


def test_a_slot_deletion_refaults_everything(system: KvmSystem) -> None:
    """15.36: all shadow state goes (default quirk), and the guest goes on with the same contents."""
    with Tiny(system.create_machine(), pages=512) as guest, GuestMemory(PAGE_SIZE) as memory:
        assert done(guest.store(DATA, 50))
        other = guest.vm.create_slot(memory, 1 << 32)
        guest.vm.get_dirty_log(guest.slot)
        other.delete()
        assert done(guest.run(LOAD, rdi=A))
        assert guest.vcpu.get_registers().rax == 50
        assert done(guest.store(DATA, 50))
        assert set(range(DATA, DATA + 50)) <= set(guest.vm.get_dirty_log(guest.slot).tolist())


def test_signal_mask_needs_eight_bytes(system: KvmSystem) -> None:
    """C.4: KVM_SET_SIGNAL_MASK with any other length is EINVAL."""
    with Tiny(system.create_machine(), pages=64) as guest:
        mask = ffi.new("__u32[]", [4, 0, 0, 0])
        with pytest.raises(KvmError) as caught:
            guest.vcpu.ioctl(lib.KVM_SET_SIGNAL_MASK, mask, "KVM_SET_SIGNAL_MASK")
        assert caught.value.errno == errno.EINVAL
        mask[0] = 8
        guest.vcpu.ioctl(lib.KVM_SET_SIGNAL_MASK, mask, "KVM_SET_SIGNAL_MASK")
        assert done(guest.run(DONE))


def test_an_unknown_ioctl_says_so(system: KvmSystem) -> None:
    """C.4: ENOTTY from a VM, with the advice to take a newer kernel; others may say EINVAL."""
    with system.create_machine() as vm:
        with pytest.raises(KvmError, match="a newer one is needed") as caught:
            vm.ioctl_int(0xAEFE, 0, "KVM_NOT_YET_INVENTED")
        assert caught.value.errno == errno.ENOTTY
        for owner in (system, vm.create_vcpu()):
            with pytest.raises(KvmError, match="KVM_NOT_YET_INVENTED") as caught:
                owner.ioctl_int(0xAEFE, 0, "KVM_NOT_YET_INVENTED")
            assert caught.value.errno in (errno.ENOTTY, errno.EINVAL)


def test_registers_survive_a_thousand_interruptions(guest: Tiny) -> None:
    """The guest's own count goes up by one at a time, however it is interrupted."""
    guest.load(COUNT_FOR_EVER)
    last = 0
    for _ in range(100):
        guest.vcpu.kick()
        guest.vcpu.run()
        registers = guest.vcpu.get_registers()
        assert registers.rcx >= last
        assert registers.rsp == 8 * PAGE_SIZE
        last = registers.rcx
