"""Interrupts by every way in: they reach a guest's handler, and nothing else does."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from pykvm.errors import KvmError, UsageError
from pykvm.kvm import KvmVm
from pykvm.kvm.events import MpState
from pykvm.kvm.interrupts import ChipRoute, MsiRoute
from pykvm.machine import InterruptWindow, IoOut, Kicked
from pykvm.machine.state import IrqChips, PitState
from pykvm.memory import PAGE_SIZE
from pykvm.x86.bits import Rflags
from tests.kernels import kernel
from tests.patience import patient

from .handlers import install, run_soon
from .tiny import DATA, PORT, SPIN, TABLES, Tiny, done, running

MSI = 0xFEE00000  # to APIC id 0, physical destination, fixed delivery (SDM vol. 3, 11.11.1)
IOAPIC = 2
PIN_BYTES = 24
"""Where the redirection table starts in struct kvm_ioapic_state, 8 bytes an entry."""
MASKED = 1 << 16
LEVEL_TRIGGERED = 1 << 15
INTERRUPTS_ON = 2 | Rflags.IF


@pytest.fixture
def bare(vm: KvmVm) -> Iterator[Tiny]:
    """A guest at CPL 0 without interrupt controllers in the kernel."""
    with Tiny(vm, cpl=0) as guest:
        yield guest


@pytest.fixture
def guest(vm: KvmVm) -> Iterator[Tiny]:
    """A guest at CPL 0 with interrupt controllers in the kernel and its LAPIC switched on."""
    vm.create_irqchip()
    with Tiny(vm, cpl=0) as made:
        lapic = bytearray(made.vcpu.get_lapic())
        lapic[0xF1] |= 1  # SVR bit 8 (SDM vol. 3, 11.9)
        made.vcpu.set_lapic(bytes(lapic))
        yield made


def arrived(guest: Tiny, vector: int) -> bool:
    install(guest, [vector])
    return run_soon(guest.load(SPIN, rflags=INTERRUPTS_ON)) == IoOut(PORT, 1, bytes([vector]))


def nothing_comes(guest: Tiny) -> bool:
    """Run a guest that would take any interrupt; whether it did not leave its loop."""
    install(guest, range(0x20, 0xF0))
    guest.load(bytes.fromhex("90") * 16 + SPIN, rflags=INTERRUPTS_ON)
    guest.vcpu.kick()
    return guest.vcpu.run() == Kicked() and requested(guest) == []


def requested(guest: Tiny) -> list[int]:
    """Vectors in the LAPIC's interrupt request register: 8 words, 16 bytes apart (SDM vol. 3, 11.8.4)."""
    lapic = guest.vcpu.get_lapic()
    words = [int.from_bytes(lapic[0x200 + 16 * i : 0x204 + 16 * i], "little") for i in range(8)]
    return [32 * i + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patient(10)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# --- without controllers in the kernel -----------------------------------------------------------


def test_interrupt_is_delivered(bare: Tiny) -> None:
    bare.vcpu.interrupt(0x40)
    assert arrived(bare, 0x40)


def test_an_interrupt_waits_for_the_window(bare: Tiny) -> None:
    install(bare, [0x40])
    bare.load(bytes.fromhex("90 fb 90 ebfe"), rflags=2)  # nop; sti; nop; jmp $
    bare.vcpu.request_interrupt_window()
    assert run_soon(bare.vcpu) == InterruptWindow()
    assert bare.vcpu.get_registers().rflags & Rflags.IF
    bare.vcpu.interrupt(0x40)
    bare.vcpu.request_interrupt_window(False)
    assert run_soon(bare.vcpu) == IoOut(PORT, 1, b"\x40")


def test_nmi_is_delivered_with_interrupts_off(bare: Tiny) -> None:
    install(bare, [2])
    bare.vcpu.nmi()
    assert run_soon(bare.load(SPIN, rflags=2)) == IoOut(PORT, 1, b"\x02")


def test_interrupt_says_why_it_is_refused(bare: Tiny) -> None:
    with pytest.raises(KvmError, match="0 to 255") as caught:
        bare.vcpu.interrupt(256)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(UsageError, match="irq"):
        bare.vcpu.interrupt(-1)


def test_without_a_lapic_a_second_interrupt_takes_the_place_of_the_first(bare: Tiny) -> None:
    bare.vcpu.interrupt(0x40)
    bare.vcpu.interrupt(0x41)
    assert arrived(bare, 0x41)


def test_what_needs_controllers_says_so(bare: Tiny) -> None:
    for call in (
        bare.vm.get_irqchips,
        lambda: bare.vm.set_irqchips(IrqChips(*[bytes(512)] * 3)),
        lambda: bare.vm.set_irq_line(4, True),
        lambda: bare.vm.signal_msi(MSI, 0x40),
        bare.vcpu.get_lapic,
        lambda: bare.vcpu.set_lapic(bytes(1024)),
        lambda: bare.vm.set_gsi_routing([ChipRoute(0, IOAPIC, 0)]),
    ):
        with pytest.raises(KvmError, match=r"in the kernel"):
            call()


# --- with them -----------------------------------------------------------------------------------


def test_creation_has_its_order(guest: Tiny) -> None:
    with pytest.raises(KvmError, match="already") as caught:
        guest.vm.create_irqchip()
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(KvmError, match="PIC is in the kernel") as caught:
        guest.vcpu.interrupt(0x40)
    assert caught.value.errno == errno.ENXIO


def test_creation_after_a_vcpu(bare: Tiny) -> None:
    with pytest.raises(KvmError, match="before the first vCPU"):
        bare.vm.create_irqchip()


def test_msi_is_delivered(guest: Tiny) -> None:
    assert guest.vm.signal_msi(MSI, 0x51)
    assert requested(guest) == [0x51]
    assert arrived(guest, 0x51)


def test_a_processor_that_waits_for_init_is_started(vm: KvmVm) -> None:
    """SDM vol. 3, 8.4.3: INIT, then STARTUP with the page of its first instruction.  Without an INIT a second
    vCPU waits inside KVM_RUN, which ends with EAGAIN when it comes; the caller never sees that.
    """
    vm.create_irqchip()
    with Tiny(vm, vcpus=2) as guest:
        waiting = guest.vcpus[1]
        guest.memory.write(DATA * PAGE_SIZE, bytes([0xE6, PORT]))  # real mode: out 0x10, al
        waiting.set_mp_state(MpState.UNINITIALIZED)
        with running(waiting) as runner:
            assert runner.exits == []
            assert vm.signal_msi(MSI | 0xFF << 12, 0x500)  # INIT, to all
            assert vm.signal_msi(MSI | 0xFF << 12, 0x600 | DATA)  # STARTUP
            until(lambda: runner.exits != [] or runner.error is not None)
            assert runner.error is None
            assert isinstance(runner.exits[0], IoOut)
            assert runner.exits[0].port == PORT


def test_an_msi_that_nobody_takes(guest: Tiny) -> None:
    assert not guest.vm.signal_msi(MSI | 77 << 12, 0x51)  # no APIC has id 77
    assert nothing_comes(guest)


def test_irqfd_raises_an_msi(guest: Tiny) -> None:
    guest.vm.set_gsi_routing([MsiRoute(24, MSI, 0x52)])
    fd = os.eventfd(0)
    try:
        guest.vm.assign_irqfd(fd, 24)
        with pytest.raises(KvmError, match="already") as caught:
            guest.vm.assign_irqfd(fd, 24)
        assert caught.value.errno == errno.EBUSY
        os.eventfd_write(fd, 1)
        until(lambda: requested(guest) == [0x52])
        assert arrived(guest, 0x52)
        guest.vm.remove_irqfd(fd, 24)
        os.eventfd_write(fd, 1)
        assert os.eventfd_read(fd) == 1, "the eventfd is ours again"
    finally:
        os.close(fd)


def test_a_level_triggered_irqfd_is_resampled_at_the_end_of_interrupt(guest: Tiny) -> None:
    """The line stays up until the guest writes EOI (SDM vol. 3, 11.8.5); then the other eventfd fires.

    On kvm_pvm, whose LAPIC shows nothing in service after a delivery, it has fired by then.
    """
    window = 1010  # a page of the guest, shown the LAPIC instead
    entry = 0xFEE00000 | 0x67
    guest.memory.write((TABLES + 1) * PAGE_SIZE + 8 * (window - 512), entry.to_bytes(8, "little"))
    guest.vm.set_gsi_routing([ChipRoute(10, IOAPIC, 10)])
    program_pin(guest, 10, 0x63 | LEVEL_TRIGGERED)
    trigger, resample = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        guest.vm.assign_irqfd(trigger, 10, resample=resample)
        os.eventfd_write(trigger, 1)
        until(lambda: requested(guest) == [0x63])
        assert arrived(guest, 0x63)
        end_of_interrupt = bytes.fromhex("8987b0000000 e610")  # mov [rdi+0xb0], eax; out 0x10, al
        assert done(run_soon(guest.load(end_of_interrupt, rdi=window * PAGE_SIZE, rflags=2)))
        assert os.eventfd_read(resample) == 1
    finally:
        os.close(trigger)
        os.close(resample)


def test_irqfd_wants_an_eventfd(guest: Tiny) -> None:
    with open("/dev/null", "rb") as other, pytest.raises(KvmError, match="eventfd"):
        guest.vm.assign_irqfd(other.fileno(), 5)
    with pytest.raises(UsageError, match="fd"):
        guest.vm.assign_irqfd(-1, 5)


def program_pin(guest: Tiny, pin: int, entry: int) -> None:
    chips = guest.vm.get_irqchips()
    ioapic = bytearray(chips.ioapic)
    ioapic[PIN_BYTES + 8 * pin : PIN_BYTES + 8 * pin + 8] = entry.to_bytes(8, "little")
    guest.vm.set_irqchips(IrqChips(chips.pic_master, chips.pic_slave, bytes(ioapic)))


def test_irq_line_through_the_ioapic(guest: Tiny) -> None:
    guest.vm.set_gsi_routing([ChipRoute(4, IOAPIC, 4), ChipRoute(5, IOAPIC, 5)])
    program_pin(guest, 4, 0x61)
    program_pin(guest, 5, 0x62 | MASKED)
    assert guest.vm.set_irq_line(4, True) == 1
    assert guest.vm.set_irq_line(5, True) == -1
    assert requested(guest) == [0x61]
    guest.vm.set_irq_line(4, False)
    assert arrived(guest, 0x61)


def test_a_gsi_without_a_route_goes_nowhere(guest: Tiny) -> None:
    guest.vm.set_gsi_routing([ChipRoute(4, IOAPIC, 4)])
    assert guest.vm.set_irq_line(9, True) == -1


def test_routes_that_do_not_exist(guest: Tiny) -> None:
    with pytest.raises(KvmError, match="chip, pin or GSI"):
        guest.vm.set_gsi_routing([ChipRoute(4, 3, 0)])
    with pytest.raises(UsageError, match="gsi"):
        guest.vm.set_gsi_routing([ChipRoute(-1, IOAPIC, 0)])
    with pytest.raises(UsageError, match="address_hi"):
        guest.vm.set_gsi_routing([MsiRoute(4, 1 << 64, 0)])


def test_controllers_after_reset(guest: Tiny) -> None:
    """IOAPIC at 0xfec00000 with 24 masked pins (82093AA data sheet, 3.0 and 3.2.4)."""
    ioapic = guest.vm.get_irqchips().ioapic
    assert int.from_bytes(ioapic[:8], "little") == 0xFEC00000
    pins = [ioapic[PIN_BYTES + 8 * i : PIN_BYTES + 8 * i + 8] for i in range(24)]
    assert all(int.from_bytes(pin, "little") == MASKED for pin in pins)
    with pytest.raises(UsageError, match="512"):
        guest.vm.set_irqchips(IrqChips(b"", b"", b""))


def test_lapic_after_reset_and_round_trip(vm: KvmVm) -> None:
    """APIC id in bits 31:24 at 0x20, SVR 0xff at 0xf0, LVTs masked (SDM vol. 3, 11.4.7.1)."""
    vm.create_irqchip()
    vm.create_vcpu()
    vcpu = vm.create_vcpu(3)
    lapic = bytearray(vcpu.get_lapic())
    assert int.from_bytes(lapic[0x20:0x24], "little") == 3 << 24
    assert int.from_bytes(lapic[0xF0:0xF4], "little") == 0xFF
    assert int.from_bytes(lapic[0x320:0x324], "little") == MASKED
    lapic[0x80] = 0x30  # task priority
    vcpu.set_lapic(bytes(lapic))
    lapic[0xA0] = 0x30  # the processor priority follows, as nothing is in service
    assert vcpu.get_lapic() == lapic
    assert vcpu.get_special_registers().cr8 == 3, "CR8 is bits 7:4 of the task priority (SDM vol. 3, 11.8.6)"
    with pytest.raises(UsageError, match="1024"):
        vcpu.set_lapic(b"")


def test_lapic_timer(guest: Tiny) -> None:
    """One-shot timer: LVT at 0x320, divide configuration at 0x3e0, initial count at 0x380."""
    lapic = bytearray(guest.vcpu.get_lapic())
    lapic[0x320:0x324] = (0x71).to_bytes(4, "little")
    lapic[0x3E0:0x3E4] = (0xB).to_bytes(4, "little")
    lapic[0x380:0x384] = (1000).to_bytes(4, "little")
    lapic[0x390:0x394] = (1000).to_bytes(4, "little")
    guest.vcpu.set_lapic(bytes(lapic))
    assert arrived(guest, 0x71)


# --- the timer -----------------------------------------------------------------------------------


@pytest.mark.skipif(kernel() < (6, 12), reason="Linux 6.1 takes a timer without interrupt controllers")
def test_a_pit_needs_the_interrupt_controllers(vm: KvmVm) -> None:
    with pytest.raises(KvmError, match="create_irqchip first") as caught:
        vm.create_pit()
    assert caught.value.errno == errno.ENOENT
    assert not vm.has_pit


def test_pit_creation(vm: KvmVm) -> None:
    vm.create_irqchip()
    with pytest.raises(KvmError, match="create_pit first"):
        vm.get_pit()
    vm.create_pit()
    assert vm.has_pit
    with pytest.raises(KvmError, match="already") as caught:
        vm.create_pit()
    assert caught.value.errno == errno.EEXIST


def test_pit_round_trip(vm: KvmVm) -> None:
    vm.create_irqchip()
    vm.create_pit()
    state = vm.get_pit()
    # After reset: all in mode 3 (KVM's choice), only channel 2's gate is controllable and low.
    assert [channel.gate for channel in state.channels] == [1, 1, 0]
    changed = PitState(tuple(replace(channel, mode=2, count=0x1234) for channel in state.channels))
    vm.set_pit(changed)
    assert [(c.mode, c.count, c.bcd) for c in vm.get_pit().channels] == [(2, 0x1234, 0)] * 3
    with pytest.raises(UsageError, match="3 channels"):
        vm.set_pit(PitState(()))
