"""Single step, breakpoints, translation, signal masks, shared registers."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Iterator

import pytest

from pykvm.abi import lib
from pykvm.errors import CapabilityError, ClosedError, KvmError, UsageError
from pykvm.kvm import KvmVm
from pykvm.kvm.debug import BreakKind, Breakpoint, encode_dr7
from pykvm.kvm.sync import SyncSet
from pykvm.machine import DebugStop, IoOut, Registers
from pykvm.machine.state import VcpuEvents
from pykvm.memory import PAGE_SIZE

from .handlers import install, run_soon
from .tiny import CODE, DATA, PORT, SPIN, Tiny, done, running

START = CODE * PAGE_SIZE
NOPS = bytes.fromhex("90 4890 90 e610")
"""nop (1 byte); nop (2 bytes); nop; out 0x10, al"""
ADD_OUT = bytes.fromhex("4883c305 e610 ebf8")
"""again: add rbx, 5; out 0x10, al; jmp again"""


@pytest.fixture
def kernel(vm: KvmVm) -> Iterator[Tiny]:
    """A guest at CPL 0: hosts that interpret supervisor code can debug only that (hosts.md C.4)."""
    with Tiny(vm, cpl=0) as made:
        yield made


@pytest.fixture
def guest(vm: KvmVm) -> Iterator[Tiny]:
    with Tiny(vm) as made:
        yield made


# --- guest debug ---------------------------------------------------------------------------------


def test_single_step_stops_after_each_instruction(kernel: Tiny) -> None:
    kernel.load(NOPS)
    kernel.vcpu.set_guest_debug(single_step=True)
    for offset in (1, 3, 4):
        stop = kernel.vcpu.run()
        assert isinstance(stop, DebugStop)
        assert (stop.exception, stop.pc) == (1, START + offset)
        assert stop.dr6 & 1 << 14, "DR6.BS (SDM vol. 3, 18.2.3)"
    kernel.vcpu.clear_guest_debug()
    assert done(kernel.vcpu.run())


def test_a_hardware_breakpoint_stops_before_the_instruction(kernel: Tiny) -> None:
    kernel.load(NOPS)
    kernel.vcpu.set_guest_debug(breakpoints=[Breakpoint(START + 3)])
    stop = kernel.vcpu.run()
    assert isinstance(stop, DebugStop)
    assert (stop.exception, stop.pc, stop.dr6 & 0xF) == (1, START + 3, 1)
    kernel.vcpu.clear_guest_debug()
    assert done(kernel.vcpu.run())


def test_debugging_uses_no_register_of_the_guest(kernel: Tiny) -> None:
    kernel.load(NOPS)
    before = kernel.vcpu.get_debug_registers()
    kernel.vcpu.set_guest_debug(breakpoints=[Breakpoint(START + 3)])
    assert kernel.vcpu.get_debug_registers() == before


def test_dr7_is_encoded_as_the_manual_says() -> None:
    """SDM vol. 3, 18.2.4: G0 to G3 at 1, 3, 5, 7; GE at 9; bit 10 is one; R/W and LEN from 16 on."""
    assert encode_dr7([]) == 0x400
    assert encode_dr7([Breakpoint(0)]) == 0x602
    points = [
        Breakpoint(0x10),
        Breakpoint(0x20, BreakKind.WRITE, 4),
        Breakpoint(0x30, BreakKind.ACCESS, 8),
        Breakpoint(0x40, BreakKind.WRITE, 2),
    ]
    assert encode_dr7(points) == 0x600 | 0xAA | 0b0000 << 16 | 0b1101 << 20 | 0b1011 << 24 | 0b0101 << 28


@pytest.mark.parametrize(
    "points",
    [
        [Breakpoint(0)] * 5,
        [Breakpoint(0, BreakKind.WRITE, 3)],
        [Breakpoint(0, BreakKind.EXECUTE, 4)],
        [Breakpoint(2, BreakKind.WRITE, 4)],
    ],
)
def test_breakpoints_that_do_not_exist(points: list[Breakpoint]) -> None:
    with pytest.raises(UsageError):
        encode_dr7(points)


@pytest.mark.parametrize("blocked", [False, True])
def test_blocked_interrupts_wait(vm: KvmVm, blocked: bool) -> None:
    vm.create_irqchip()
    with Tiny(vm, cpl=0) as guest:
        lapic = bytearray(guest.vcpu.get_lapic())
        lapic[0xF1] |= 1  # software enable: SVR bit 8 (SDM vol. 3, 11.9)
        guest.vcpu.set_lapic(bytes(lapic))
        install(guest, [0x40])
        guest.load(bytes.fromhex("90 90 90"), rflags=0x202)
        assert vm.signal_msi(0xFEE00000, 0x40)
        guest.vcpu.set_guest_debug(single_step=True, block_interrupts=blocked)
        stop = guest.vcpu.run()
        if blocked:
            assert isinstance(stop, DebugStop)
            assert stop.pc == START + 1
        elif isinstance(stop, DebugStop):
            assert stop.pc != START + 1, "it stops in the handler"
        else:
            assert stop == IoOut(PORT, 1, b"\x40"), "the gate cleared TF: the handler ran"


# --- translation ---------------------------------------------------------------------------------


def test_translate(guest: Tiny) -> None:
    assert guest.vcpu.translate(DATA * PAGE_SIZE + 0x123) == DATA * PAGE_SIZE + 0x123
    assert guest.vcpu.translate(1 << 40) is None
    with pytest.raises(UsageError, match="linear_address"):
        guest.vcpu.translate(1 << 64)


# --- signal mask ---------------------------------------------------------------------------------


def interruptions(guest: Tiny, seconds: float) -> int:
    """Entries of a spinning vCPU that SIGUSR1 to its thread caused, up to the first or for ``seconds``."""
    guest.load(SPIN)
    with running(guest.vcpu) as runner:
        before = guest.vcpu.entries
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and guest.vcpu.entries == before:
            signal.pthread_kill(runner.thread.ident or 0, signal.SIGUSR1)
            time.sleep(0.005)
        return guest.vcpu.entries - before


def test_signal_mask(guest: Tiny) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert interruptions(guest, 10) > 0
        guest.vcpu.set_signal_mask([signal.SIGUSR1])
        assert interruptions(guest, 0.2) == 0
        guest.vcpu.set_signal_mask(None)
        assert interruptions(guest, 10) > 0
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_signal_mask_refusals(guest: Tiny) -> None:
    with pytest.raises(UsageError, match="kick uses it"):
        guest.vcpu.set_signal_mask([lib.pykvm_kick_signal()])
    for number in (0, 65):
        with pytest.raises(UsageError, match="1 to 64"):
            guest.vcpu.set_signal_mask([number])


# --- shared registers ----------------------------------------------------------------------------


@pytest.mark.parametrize("cpl", [3, 0])
def test_shared_registers_are_those_of_the_exit(vm: KvmVm, cpl: int) -> None:
    with Tiny(vm, cpl=cpl) as guest:
        guest.load(ADD_OUT, rbx=10)
        guest.vcpu.share_registers(SyncSet.REGISTERS | SyncSet.SPECIAL | SyncSet.EVENTS)
        for expected in (15, 20):
            assert done(guest.vcpu.run())
            assert guest.vcpu.shared_registers().rbx == expected
        assert guest.vcpu.shared_registers() == guest.vcpu.get_registers()
        assert guest.vcpu.shared_special_registers() == guest.vcpu.get_special_registers()
        assert guest.vcpu.shared_events() == guest.vcpu.get_events()


def test_a_put_register_reaches_the_guest(guest: Tiny) -> None:
    guest.load(ADD_OUT)
    guest.vcpu.share_registers(SyncSet.REGISTERS)
    assert done(guest.vcpu.run())
    registers = guest.vcpu.shared_registers()
    registers.rbx = 1000
    guest.vcpu.put_shared(registers)
    assert done(guest.vcpu.run())
    assert guest.vcpu.shared_registers().rbx == 1005


def test_a_put_value_that_kvm_refuses_fails_the_run(guest: Tiny) -> None:
    special = guest.vcpu.get_special_registers()
    guest.load(ADD_OUT)
    special.cr0 &= ~1  # paging without protection
    guest.vcpu.put_shared(special=special)
    with pytest.raises(KvmError) as caught:
        guest.vcpu.run()
    assert caught.value.errno == errno.EINVAL


def test_put_events(kernel: Tiny) -> None:
    install(kernel, [2])
    kernel.load(SPIN, rflags=2)
    kernel.vcpu.put_shared(events=VcpuEvents(nmi_pending=1, flags=1))
    exit_ = run_soon(kernel.vcpu)
    assert (getattr(exit_, "port", None), getattr(exit_, "data", None)) == (PORT, b"\x02")


def test_sharing_refusals(guest: Tiny) -> None:
    with pytest.raises(UsageError, match="share_registers"):
        guest.vcpu.shared_registers()
    with pytest.raises(CapabilityError, match="KVM_CAP_SYNC_REGS"):
        guest.vcpu.share_registers(SyncSet(1 << 20))
    with pytest.raises(UsageError, match="rax"):
        guest.vcpu.put_shared(Registers(rax=-1))
    guest.vcpu.close()
    for call in (guest.vcpu.shared_registers, guest.vcpu.put_shared):
        with pytest.raises(ClosedError):
            call()
