"""Every exit that a tiny guest can cause, as its typed value (api.rst section 5)."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pykvm.abi import ffi, lib
from pykvm.errors import KvmError, UsageError
from pykvm.kvm import KvmVcpu, KvmVm
from pykvm.kvm.exits import decode
from pykvm.machine import (
    DebugStop,
    DirtyRingFull,
    FailEntry,
    Halted,
    InternalError,
    InterruptWindow,
    IoIn,
    IoOut,
    Kicked,
    MemoryFault,
    MmioRead,
    MmioWrite,
    Registers,
    Shutdown,
    SlotFlags,
    SystemEvent,
    UnknownExit,
)
from pykvm.memory import GuestMemory

CODE = 0x1000
SIZE = 1 << 20


class RealMode:
    """A vCPU in real mode over 1 MiB, with flat segments at 0."""

    def __init__(self, vm: KvmVm) -> None:
        self.memory = GuestMemory(SIZE)
        vm.create_slot(self.memory, 0)
        self.vcpu: KvmVcpu = vm.create_vcpu()

    def load(self, code: str, **registers: int) -> KvmVcpu:
        self.memory.write(CODE, bytes.fromhex(code))
        special = self.vcpu.get_special_registers()
        special.cs.base = special.cs.selector = 0
        self.vcpu.set_special_registers(special)
        self.vcpu.set_registers(Registers(rip=CODE, **registers))
        return self.vcpu


@pytest.fixture
def guest(vm: KvmVm) -> Iterator[RealMode]:
    made = RealMode(vm)
    yield made
    vm.close()
    made.memory.close()


@pytest.mark.parametrize(
    ("code", "size", "value"),
    [
        ("e680", 1, 0x78),  # out 0x80, al
        ("e780", 2, 0x5678),  # out 0x80, ax
        ("66e780", 4, 0x12345678),  # out 0x80, eax: more than fits beside the port in one word
    ],
)
def test_out(guest: RealMode, code: str, size: int, value: int) -> None:
    vcpu = guest.load(code + "f4", rax=0x12345678)
    exit_ = vcpu.run()
    assert exit_ == IoOut(0x80, size, value.to_bytes(size, "little"), 1)
    assert isinstance(exit_, IoOut)
    assert exit_.value == value
    assert vcpu.run() == Halted()


@pytest.mark.parametrize("value", [0, 1, 0x7FFFFFF, 0x8000000, 0xFFFFFFFF])
def test_wide_data_is_never_cut(guest: RealMode, value: int) -> None:
    vcpu = guest.load("66e7fff4", rax=value)
    assert vcpu.run() == IoOut(0xFF, 4, value.to_bytes(4, "little"), 1)


@pytest.mark.parametrize(
    ("code", "size", "after"),
    [("ec", 1, 0x123456A1), ("ed", 2, 0x1234B2A1), ("66ed", 4, 0xD4C3B2A1)],  # in al/ax/eax, dx
)
def test_in(guest: RealMode, code: str, size: int, after: int) -> None:
    vcpu = guest.load(code + "f4", rax=0x12345678, rdx=0xFFFF)
    assert vcpu.run() == IoIn(0xFFFF, size, 1)
    vcpu.reply(bytes.fromhex("a1b2c3d4")[:size])
    assert vcpu.run() == Halted()
    assert vcpu.get_registers().rax == after


def test_string_output_carries_all_its_data(guest: RealMode) -> None:
    """rep outsb: one exit for the whole string or one a byte, as the host likes; the bytes are the same."""
    guest.memory.write(0x2000, b"dirty log")
    vcpu = guest.load("f36ef4", rcx=9, rsi=0x2000, rdx=0xE9)
    data = b""
    while isinstance(exit_ := vcpu.run(), IoOut):
        assert len(exit_.data) == exit_.size * exit_.repeat
        data += exit_.data
    assert exit_ == Halted()
    assert data == b"dirty log"


def test_string_input_fills_memory(guest: RealMode) -> None:
    vcpu = guest.load("f36cf4", rcx=5000, rdi=0x3000, rdx=0x60)  # rep insb
    given = b""
    while isinstance(exit_ := vcpu.run(), IoIn):
        part = bytes((len(given) + i) * 7 & 0xFF for i in range(exit_.size * exit_.repeat))
        vcpu.reply(part)
        given += part
    assert exit_ == Halted()
    assert len(given) == 5000
    assert guest.memory.read(0x3000, 5000) == given


def test_mmio(vm: KvmVm) -> None:
    """mov [0x9000], eax; mov ebx, [0x9004], with memory only below 0x8000."""
    with GuestMemory(0x8000) as memory:
        vm.create_slot(memory, 0)
        vcpu = vm.create_vcpu()
        special = vcpu.get_special_registers()
        special.cs.base = special.cs.selector = 0
        vcpu.set_special_registers(special)
        memory.write(CODE, bytes.fromhex("66a30090668b1e0490f4"))
        vcpu.set_registers(Registers(rip=CODE, rax=0xCAFEF00D))
        assert vcpu.run() == MmioWrite(0x9000, bytes.fromhex("0df0feca"))
        assert vcpu.run() == MmioRead(0x9004, 4)
        vcpu.reply(b"\x01\x02\x03\x04")
        assert vcpu.run() == Halted()
        assert vcpu.get_registers().rbx == 0x04030201
        vm.close()


def test_a_store_to_a_readonly_slot_is_mmio(guest: RealMode, vm: KvmVm) -> None:
    with GuestMemory(0x1000) as rom:
        rom.write(0, b"\x55")
        vm.create_slot(rom, SIZE, flags=SlotFlags.READONLY)
        # mov ax, 0xffff; mov ds, ax; mov al, [0x10]; inc al; mov [0x10], al
        vcpu = guest.load("b8ffff8ed8a01000fec0a21000f4")
        assert vcpu.run() == MmioWrite(SIZE, b"\x56")
        assert vcpu.run() == Halted()
        assert rom.read(0, 1) == b"\x55"
        vm.close()


def test_an_unanswered_or_wrongly_answered_read(guest: RealMode) -> None:
    vcpu = guest.load("ed90f4")
    with pytest.raises(UsageError, match="no IoIn or MmioRead"):
        vcpu.reply(b"")
    vcpu.run()
    with pytest.raises(UsageError, match="2 bytes, not 1"):
        vcpu.reply(b"x")
    vcpu.reply(b"xy")
    with pytest.raises(UsageError, match="no IoIn"):
        vcpu.reply(b"xy")


def test_a_reply_too_late_is_refused(guest: RealMode) -> None:
    """The answer belongs to the exit just returned, not to a later one."""
    vcpu = guest.load("ecf4")
    assert vcpu.run() == IoIn(0, 1, 1)
    assert vcpu.run() == Halted()
    with pytest.raises(UsageError, match="no IoIn"):
        vcpu.reply(b"x")


def test_a_triple_fault_is_a_shutdown(guest: RealMode) -> None:
    """An IDT of limit 0 in protected mode: #UD, #DF, shutdown (SDM vol. 3, 6.15)."""
    vcpu = guest.load("0f0b")
    special = vcpu.get_special_registers()
    special.cr0 |= 1
    special.idt.limit = 0
    special.cs.type, special.cs.selector = 0xB, 8
    for name in ("ds", "es", "fs", "gs", "ss"):
        getattr(special, name).selector = 0x10
    vcpu.set_special_registers(special)
    vcpu.set_registers(Registers(rip=CODE))
    assert vcpu.run() == Shutdown()


def test_unlistened_ports_are_answered_inside(guest: RealMode) -> None:
    """out 0x80; in al, 0x81 -> 0xff; in ax, 0x82 -> 0xffff; out 0xe9: only 0xe9 is listened to."""
    vcpu = guest.load("e680e48188c3e58289c1b041e6e9f4")
    vcpu.listen([0xE9])
    assert vcpu.run() == IoOut(0xE9, 1, b"A", 1)
    assert vcpu.swallowed == 3
    registers = vcpu.get_registers()
    assert (registers.rbx & 0xFF, registers.rcx & 0xFFFF) == (0xFF, 0xFFFF)
    with pytest.raises(UsageError, match="0xffff"):
        vcpu.listen([0x10000])


def test_a_wide_access_that_touches_a_listened_port_is_seen(guest: RealMode) -> None:
    vcpu = guest.load("66e77ef4")  # out 0x7e, eax covers 0x7e to 0x81
    vcpu.listen([0x81])
    assert isinstance(vcpu.run(), IoOut)


def test_a_kick_ends_one_run_and_only_one(guest: RealMode) -> None:
    vcpu = guest.load("ebfe")
    vcpu.kick()
    vcpu.kick()
    assert vcpu.run() == Kicked()
    timer = threading.Timer(0.05, vcpu.kick)
    timer.start()
    assert vcpu.run() == Kicked()
    timer.join()


def test_an_io_exit_before_a_pending_kick_is_not_lost(guest: RealMode) -> None:
    """The kick waits for the next run, which first completes the I/O (api.rst 5, immediate_exit)."""
    vcpu = guest.load("e480e481f4")
    assert vcpu.run() == IoIn(0x80, 1, 1)
    vcpu.reply(b"\x11")
    vcpu.kick()
    assert vcpu.run() == Kicked()
    assert vcpu.get_registers().rax & 0xFF == 0x11
    assert vcpu.run() == IoIn(0x81, 1, 1)


def test_inaccessible_host_memory_is_an_error_or_mmio(vm: KvmVm) -> None:
    """docs/reference/hosts.md C.3: KVM_RUN fails with EFAULT where the guest runs natively."""
    with GuestMemory(0x2000) as memory:
        vm.create_slot(memory, 0)
        vm.set_user_memory_region(7, 0, 0x8000, 0x1000, 0x1000)  # a host address that is not mapped
        vcpu = vm.create_vcpu()
        special = vcpu.get_special_registers()
        special.cs.base = special.cs.selector = 0
        vcpu.set_special_registers(special)
        memory.write(CODE, bytes.fromhex("a20080f4"))
        vcpu.set_registers(Registers(rip=CODE))
        try:
            assert vcpu.run() == MmioWrite(0x8000, b"\0")
        except KvmError as error:
            assert "host memory" in str(error)  # noqa: PT017 - either is KVM's contract
        vm.close()


def page_with(reason: int, **fields: object) -> object:
    """A kvm_run page as KVM would leave it."""
    page = ffi.new("struct pykvm_run_page *")
    page.exit_reason = reason
    for path, value in fields.items():
        member, _, name = path.partition("__")
        target = getattr(page.u, member)
        if isinstance(value, list):
            for i, item in enumerate(value):
                getattr(target, name)[i] = item
        else:
            setattr(target, name, value)
    return page


def test_an_emulation_failure_shows_the_instruction() -> None:
    """kvm_run.emulation_failure: flags, then insn_size and insn_bytes (api.rst 5)."""
    code = bytes.fromhex("660ffec1").ljust(15, b"\x90")
    words = [int.from_bytes((b"\x0f" + code)[i : i + 8], "little") for i in (0, 8)]
    page = page_with(
        lib.KVM_EXIT_INTERNAL_ERROR, internal__suberror=1, internal__ndata=4, internal__data=[1, *words, 7]
    )
    exit_ = decode(page, lambda: 64)
    assert isinstance(exit_, InternalError)
    assert exit_.instruction == code
    assert exit_.disassembly == "paddd xmm0, xmm1"
    assert exit_.data == (1, *words, 7)
    assert "paddd xmm0, xmm1" in str(exit_)


@pytest.mark.parametrize("suberror", [2, 3, 4])
def test_other_internal_errors_have_no_instruction(suberror: int) -> None:
    page = page_with(
        lib.KVM_EXIT_INTERNAL_ERROR, internal__suberror=suberror, internal__ndata=3, internal__data=[1, 2, 3]
    )
    exit_ = decode(page, lambda: 64)
    assert exit_ == InternalError(suberror, (1, 2, 3))
    assert str(suberror) in str(exit_)


def test_a_lying_ndata_or_size_is_bounded() -> None:
    page = page_with(
        lib.KVM_EXIT_INTERNAL_ERROR,
        internal__suberror=1,
        internal__ndata=0xFFFFFFFF,
        internal__data=[1, 0xFFFFFFFFFFFFFFFF],
    )
    exit_ = decode(page, lambda: 16)
    assert isinstance(exit_, InternalError)
    assert len(exit_.data) == 16
    assert len(exit_.instruction) == 15


def test_the_other_exits() -> None:
    assert decode(page_with(lib.KVM_EXIT_DIRTY_RING_FULL), int) == DirtyRingFull()
    assert decode(page_with(lib.KVM_EXIT_IRQ_WINDOW_OPEN), int) == InterruptWindow()
    page = page_with(
        lib.KVM_EXIT_FAIL_ENTRY, fail_entry__hardware_entry_failure_reason=0x80000021, fail_entry__cpu=3
    )
    assert decode(page, int) == FailEntry(0x80000021, 3)
    page = page_with(
        lib.KVM_EXIT_MEMORY_FAULT, memory_fault__flags=8, memory_fault__gpa=0x123000, memory_fault__size=4096
    )
    assert decode(page, int) == MemoryFault(8, 0x123000, 4096)
    page = page_with(
        lib.KVM_EXIT_SYSTEM_EVENT, system_event__type=2, system_event__ndata=2, system_event__data=[5, 6]
    )
    assert decode(page, int) == SystemEvent(2, (5, 6))
    page = page_with(
        lib.KVM_EXIT_DEBUG, debug__exception=1, debug__pc=0x1001, debug__dr6=0x4000, debug__dr7=0x400
    )
    assert decode(page, int) == DebugStop(1, 0x1001, 0x4000, 0x400)
    unknown = decode(page_with(12345), int)
    assert unknown == UnknownExit(12345, bytes(256))
