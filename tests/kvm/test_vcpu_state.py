"""CPUID, MSRs, floating point, debug registers, clocks of a vCPU, seen by its guest."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pykvm.abi import ffi
from pykvm.errors import CapabilityError, KvmError, MsrError, UsageError
from pykvm.kvm import KvmSystem, KvmVm
from pykvm.kvm.capabilities import Capability
from pykvm.kvm.cpuid import VcpuCpuid
from pykvm.kvm.events import MpState
from pykvm.kvm.registers import fill_sregs, read_sregs
from pykvm.kvm.tuning import Quirk
from pykvm.machine.state import DebugRegisters, VcpuEvents
from pykvm.memory import PAGE_SIZE
from pykvm.x86.cpuid import CpuidEntry, find
from pykvm.x86.fpu import FloatingPoint

from .handlers import install, run_soon
from .tiny import DATA, Tiny, done

LSTAR, STAR, TSC = 0xC0000082, 0xC0000081, 0x10
NO_SUCH_MSR = 0x4FFFFFFF
BUFFER = DATA * PAGE_SIZE
STORE_XMM0 = bytes.fromhex("0f1107 e610")
"""movups [rdi], xmm0; out 0x10, al"""
LOAD_XMM0 = bytes.fromhex("0f1007 e610")
"""movups xmm0, [rdi]; out 0x10, al"""
RDMSR = bytes.fromhex("0f32 e610")
"""rdmsr; out 0x10, al"""
CPUID = bytes.fromhex("0fa2 e610")
PATTERN = bytes(range(0xA0, 0xB0))


@pytest.fixture(params=[3, 0], ids=["cpl3", "cpl0"])
def guest(vm: KvmVm, request: pytest.FixtureRequest) -> Iterator[Tiny]:
    with Tiny(vm, cpl=request.param) as made:
        yield made


@pytest.fixture
def kernel(vm: KvmVm) -> Iterator[Tiny]:
    """A guest at CPL 0."""
    with Tiny(vm, cpl=0) as made:
        yield made


# --- CPUID ---------------------------------------------------------------------------------------


def test_the_guest_sees_the_cpuid_that_was_set(kernel: Tiny) -> None:
    """At CPL 0: some hosts let CPUID run natively at CPL 3, where it shows the host's leaves."""
    leaves = [
        CpuidEntry(0, 0, 0, 2, 0x11111111, 0x22222222, 0x33333333),
        CpuidEntry(2, 0, 0, 0xA, 0xB, 0xC, 0xD),
    ]
    kernel.vcpu.set_cpuid(leaves)
    assert list(kernel.vcpu.get_cpuid()) == leaves
    for leaf in leaves:
        assert done(kernel.run(CPUID, rax=leaf.function))
        registers = kernel.vcpu.get_registers()
        seen = (registers.rax, registers.rbx, registers.rcx, registers.rdx)
        assert seen == (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx)


def test_cpuid_is_fixed_by_the_first_run(guest: Tiny) -> None:
    guest.vcpu.set_cpuid(guest.vm.supported_cpuid)
    fixed = guest.vcpu.get_cpuid()
    assert done(guest.run(CPUID))
    guest.vcpu.set_cpuid(fixed)
    with pytest.raises(KvmError, match="before the first run") as caught:
        guest.vcpu.set_cpuid(fixed[1:])
    assert caught.value.errno == errno.EINVAL


def test_leaves_are_counted_where_the_kernel_does_not() -> None:
    """Linux 6.1 fills the entries of KVM_GET_CPUID2 and leaves their number as the caller set it."""

    class Kernel:
        def ioctl(self, request: int, argument: Any, operation: str) -> None:
            for number in (0, 1):
                for field in ("function", "index", "flags", "eax", "ebx", "ecx", "edx"):
                    setattr(argument.entries[number], field, number)

    assert VcpuCpuid.get_cpuid(Kernel()) == tuple(  # type: ignore[arg-type]
        CpuidEntry(*[number] * 7) for number in (0, 1)
    )


def test_cpuid_out_of_range(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    with pytest.raises(UsageError, match="at most 256"):
        vcpu.set_cpuid([CpuidEntry(0, 0, 0, 0, 0, 0, 0)] * 257)
    with pytest.raises(UsageError, match="eax"):
        vcpu.set_cpuid([CpuidEntry(0, 0, 0, 1 << 32, 0, 0, 0)])


def test_what_the_host_supports(system: KvmSystem, vm: KvmVm) -> None:
    vendor = find(system.supported_cpuid, 0)
    assert vendor is not None
    name = struct.pack("<3I", vendor.ebx, vendor.edx, vendor.ecx)
    with open("/proc/cpuinfo", encoding="ascii") as info:
        assert f"vendor_id\t: {name.decode()}\n" in info
    assert vm.supported_cpuid is system.supported_cpuid
    assert len({(e.function, e.index) for e in system.get_emulated_cpuid()}) > 0


# --- MSRs ----------------------------------------------------------------------------------------


def test_the_guest_reads_the_msr_that_was_set(kernel: Tiny) -> None:
    kernel.vcpu.set_msrs({STAR: 0x0023_0010_0000_0000, LSTAR: 0xFFFF_8000_DEAD_B000})
    assert done(kernel.run(RDMSR, rcx=LSTAR))
    registers = kernel.vcpu.get_registers()
    assert (registers.rdx, registers.rax) == (0xFFFF_8000, 0xDEAD_B000)
    assert kernel.vcpu.get_msrs([LSTAR, STAR]) == {
        LSTAR: 0xFFFF_8000_DEAD_B000,
        STAR: 0x0023_0010_0000_0000,
    }


def test_a_partial_read_names_the_msr(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    with pytest.raises(MsrError, match=r"KVM_GET_MSRS stopped at MSR 0x4fffffff") as caught:
        vcpu.get_msrs([STAR, NO_SUCH_MSR, LSTAR])
    assert caught.value.index == NO_SUCH_MSR
    assert set(vcpu.get_readable_msrs([STAR, NO_SUCH_MSR, LSTAR])) == {STAR, LSTAR}


def test_a_partial_write_names_the_msr_and_how_far_it_came(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    with pytest.raises(MsrError, match="1 of 3 were set") as caught:
        vcpu.set_msrs({STAR: 0x33, NO_SUCH_MSR: 1, LSTAR: 0x44})
    assert caught.value.index == NO_SUCH_MSR
    assert vcpu.get_msrs([STAR, LSTAR]) == {STAR: 0x33, LSTAR: 0}
    with pytest.raises(UsageError, match="0xc0000082"):
        vcpu.set_msrs({LSTAR: 1 << 64})


def test_long_lists_go_in_batches(vm: KvmVm) -> None:
    """KVM refuses 256 and more at once with E2BIG; repeats of one index are as good as a long list."""
    vcpu = vm.create_vcpu()
    refused = range(NO_SUCH_MSR - 600, NO_SUCH_MSR)
    assert vcpu.get_readable_msrs([*refused[:300], STAR, *refused[300:], LSTAR]) == {STAR: 0, LSTAR: 0}


def test_every_listed_msr_can_be_read_or_is_left_out(system: KvmSystem, vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    assert {TSC, STAR, LSTAR} <= set(system.msr_indices)
    readable = vcpu.get_readable_msrs(system.msr_indices)
    assert {TSC, STAR, LSTAR} <= set(readable)
    for index in set(system.msr_indices) - set(readable):
        with pytest.raises(MsrError):
            vcpu.get_msrs([index])


def test_feature_msrs(system: KvmSystem) -> None:
    values = system.get_feature_msrs()
    assert set(values) <= set(system.feature_msr_indices)
    for index, value in values.items():
        assert system.get_feature_msrs([index]) == {index: value}
    with pytest.raises(MsrError):
        system.get_feature_msrs([NO_SUCH_MSR])


# --- floating point ------------------------------------------------------------------------------


def test_xmm_set_on_a_fresh_vcpu_reaches_the_guest(guest: Tiny) -> None:
    """KVM_SET_FPU alone would be lost: the SSE component is in its initial state."""
    fpu = guest.vcpu.get_fpu()
    assert fpu == FloatingPoint()
    guest.vcpu.set_fpu(replace(fpu, xmm=(PATTERN, *fpu.xmm[1:])))
    assert done(guest.run(STORE_XMM0, rdi=BUFFER))
    assert guest.memory.read(BUFFER, 16) == PATTERN


def test_xmm_of_the_guest_is_read(guest: Tiny) -> None:
    guest.memory.write(BUFFER, PATTERN)
    assert done(guest.run(LOAD_XMM0, rdi=BUFFER))
    assert guest.vcpu.get_fpu().xmm[0] == PATTERN
    assert guest.vcpu.get_xsave()[160:176] == PATTERN, "XMM0 in the legacy region (SDM vol. 1, table 10-2)"


def test_xsave_reaches_the_guest(guest: Tiny) -> None:
    area = bytearray(guest.vcpu.get_xsave())
    assert len(area) == max(4096, guest.vm.check_extension(Capability.XSAVE2))
    area[160:176] = PATTERN
    area[512] |= 2
    guest.vcpu.set_xsave(bytes(area))
    assert done(guest.run(STORE_XMM0, rdi=BUFFER))
    assert guest.memory.read(BUFFER, 16) == PATTERN


def test_xsave_that_does_not_fit(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    area = vcpu.get_xsave()
    vcpu.set_xsave(area + bytes(4096))
    for wrong in (area[:-1], area + b"\1"):
        with pytest.raises(UsageError, match=f"{len(area)} bytes"):
            vcpu.set_xsave(wrong)
    unknown = bytearray(area)
    unknown[519] |= 0x40  # component 62, which no processor has
    with pytest.raises(KvmError, match="XSTATE_BV") as caught:
        vcpu.set_xsave(bytes(unknown))
    assert caught.value.errno == errno.EINVAL


def test_fpu_that_does_not_fit(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    for wrong in ({"xmm": (b"",) * 16}, {"fpr": ()}, {"fcw": 1 << 16}):
        with pytest.raises(UsageError):
            vcpu.set_fpu(replace(FloatingPoint(), **wrong))  # type: ignore[arg-type]


def test_x87_round_trip(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    value = FloatingPoint(
        fpr=tuple(bytes([i]) * 10 + bytes(6) for i in range(1, 9)),
        fcw=0x27F,
        fsw=0x3800,
        ftwx=0xFF,
        mxcsr=0x9F80,
    )
    vcpu.set_fpu(value)
    assert vcpu.get_fpu() == value
    assert vcpu.get_xsave()[:2] == b"\x7f\x02"


def test_xcr0(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    assert vcpu.get_xcrs() == {0: 1}, "XCR0 after reset (SDM vol. 3, 2.6)"
    vcpu.set_cpuid(vm.supported_cpuid)
    leaf = find(vm.supported_cpuid, 0xD)
    if leaf is not None and leaf.eax & 2:
        vcpu.set_xcrs({0: 3})
        assert vcpu.get_xcrs() == {0: 3}
    with pytest.raises(KvmError, match="bit 0") as caught:
        vcpu.set_xcrs({0: 2})
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(UsageError, match="at most"):
        vcpu.set_xcrs(dict.fromkeys(range(17), 1))


# --- events, MP state, debug registers -----------------------------------------------------------


def test_events_round_trip(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    vcpu.nmi()
    events = vcpu.get_events()
    assert events.nmi_pending == 1
    vcpu.set_events(replace(events, nmi_pending=0, nmi_masked=1))
    again = vcpu.get_events()
    assert (again.nmi_pending, again.nmi_masked) == (0, 1)
    with pytest.raises(KvmError, match="flags") as caught:
        vcpu.set_events(replace(events, flags=1 << 31))
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(UsageError, match="interrupt_nr"):
        vcpu.set_events(VcpuEvents(interrupt_nr=256))


def test_an_injected_exception_reaches_the_guest(kernel: Tiny) -> None:
    install(kernel, [6])
    kernel.load(bytes.fromhex("ebfe"), rflags=2)
    kernel.vcpu.set_events(replace(kernel.vcpu.get_events(), exception_injected=1, exception_nr=6))
    exit_ = run_soon(kernel.vcpu)
    assert getattr(exit_, "data", None) == b"\x06"


def test_mp_state(vm: KvmVm, system: KvmSystem) -> None:
    vcpu = vm.create_vcpu()
    assert vcpu.get_mp_state() is MpState.RUNNABLE
    with pytest.raises(KvmError, match="RUNNABLE"):
        vcpu.set_mp_state(MpState.HALTED)
    with system.create_machine() as other:
        other.create_irqchip()
        first, second = other.create_vcpu(), other.create_vcpu()
        assert (first.get_mp_state(), second.get_mp_state()) == (MpState.RUNNABLE, MpState.UNINITIALIZED)
        second.set_mp_state(MpState.HALTED)
        assert second.get_mp_state() is MpState.HALTED


def test_debug_registers(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    assert vcpu.get_debug_registers() == DebugRegisters(), "DR6, DR7 after reset (SDM vol. 3, table 10-1)"
    value = DebugRegisters((1, 2, 3, 4), 0xFFFF0FF1, 0x401)
    vcpu.set_debug_registers(value)
    assert vcpu.get_debug_registers() == value
    with pytest.raises(KvmError, match="32 bits"):
        vcpu.set_debug_registers(DebugRegisters(dr7=1 << 32))


def test_special_registers2_agree_with_the_first_form(kernel: Tiny) -> None:
    first, second = kernel.vcpu.get_special_registers(), kernel.vcpu.get_special_registers2()
    assert first == second
    assert second.pdptrs is None, "long mode has none"
    second.cr2 = 0x1234
    kernel.vcpu.set_special_registers2(second)
    assert kernel.vcpu.get_special_registers().cr2 == 0x1234
    with pytest.raises(KvmError):
        kernel.vcpu.set_special_registers2(replace(second, pdptrs=(1, 1, 1, 1)))
    with pytest.raises(UsageError, match="pdptrs"):
        kernel.vcpu.set_special_registers2(replace(second, pdptrs=(1 << 64, 1, 1, 1)))


def test_a_queued_interrupt_is_in_the_special_registers(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    vcpu.interrupt(0xC3)
    special = vcpu.get_special_registers()
    assert special.interrupt == 0xC3
    area = ffi.new("struct kvm_sregs *")
    fill_sregs(area, special)
    assert list(area.interrupt_bitmap) == [0, 0, 0, 1 << 3]
    fill_sregs(area, replace(special, interrupt=None))
    assert read_sregs(area).interrupt is None, "a struct that is used again keeps no old bit"


# --- time ----------------------------------------------------------------------------------------


def test_kvmclock_goes_on_from_what_was_set(vm: KvmVm) -> None:
    vm.create_vcpu()
    started = time.monotonic_ns()
    vm.set_clock(10**15)
    now = vm.get_clock().clock
    assert 10**15 <= now <= 10**15 + (time.monotonic_ns() - started) + 10**9
    with pytest.raises(UsageError, match="clock"):
        vm.set_clock(-1)


def test_kvmclock_adds_the_real_time_that_passed(vm: KvmVm) -> None:
    vm.create_vcpu()
    if not vm.check_extension(Capability.ADJUST_CLOCK) & 4:
        with pytest.raises(KvmError, match="leave it out"):
            vm.set_clock(10**15, realtime=time.time_ns())
        return
    vm.set_clock(10**15, realtime=time.time_ns() - 3600 * 10**9)
    assert 3590 * 10**9 < vm.get_clock().clock - 10**15 < 3660 * 10**9


def test_tsc_frequency(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    khz = vcpu.get_tsc_khz()
    times, values = [], []
    for pause in (0.05, 0):
        times.append(time.monotonic_ns())
        values.append(vcpu.get_msrs([TSC])[TSC])
        times.append(time.monotonic_ns())
        time.sleep(pause)
    # However late this thread ran, the ticks lie between those of the inner and of the outer interval.
    inner, outer = times[2] - times[1], times[3] - times[0]
    assert inner * khz / 1e6 * 0.99 <= values[1] - values[0] <= outer * khz / 1e6 * 1.01
    vcpu.set_tsc_khz(khz)
    if not vm.check_extension(Capability.TSC_CONTROL):
        with pytest.raises(KvmError, match="cannot scale"):
            vcpu.set_tsc_khz(khz // 3)
    with pytest.raises(UsageError, match="32-bit"):
        vcpu.set_tsc_khz(1 << 32)


def test_a_pause_notice_needs_kvmclock(vm: KvmVm) -> None:
    with pytest.raises(KvmError, match="kvmclock"):
        vm.create_vcpu().notify_paused()


# --- switches ------------------------------------------------------------------------------------


def test_shadow_pages(vm: KvmVm) -> None:
    vm.set_nr_mmu_pages(64)
    with pytest.raises(KvmError, match="at least 64"):
        vm.set_nr_mmu_pages(63)
    with pytest.raises(UsageError, match="32-bit"):
        vm.set_nr_mmu_pages(-1)


def test_quirks(vm: KvmVm) -> None:
    """Without CD_NW_CLEARED CR0.CD and NW keep their reset values (api.rst 7.31)."""
    assert Quirk.CD_NW_CLEARED in vm.quirks
    vm.disable_quirks(Quirk.CD_NW_CLEARED | Quirk.LINT0_REENABLED)
    unknown = Quirk(1 << 30)
    with pytest.raises(CapabilityError, match="cannot switch off"):
        vm.disable_quirks(unknown)


def test_quirk_lint0(system: KvmSystem) -> None:
    """With the quirk LINT0 comes out of reset as ExtINT (0x700), without it masked (api.rst 7.31)."""
    lint0 = {}
    for disabled in (False, True):
        with system.create_machine() as vm:
            vm.create_irqchip()
            if disabled:
                vm.disable_quirks(Quirk.LINT0_REENABLED)
            lint0[disabled] = int.from_bytes(vm.create_vcpu().get_lapic()[0x350:0x354], "little")
    assert lint0 == {False: 0x700, True: 0x10000}


def test_enable_cap_refuses_what_cannot_be_switched(vm: KvmVm) -> None:
    with pytest.raises(KvmError, match="KVM_CAP_USER_MEMORY") as caught:
        vm.enable_cap(Capability.USER_MEMORY)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(UsageError, match="args"):
        vm.enable_cap(Capability.HALT_POLL, -1)
    vm.enable_cap(Capability.HALT_POLL, 1000)


def test_intels_real_mode_pages(vm: KvmVm) -> None:
    vm.set_tss_address(0xFFFBD000)
    vm.set_identity_map_address(0xFFFBC000)
    vm.create_vcpu()
    with pytest.raises(KvmError, match="before the first vCPU"):
        vm.set_identity_map_address(0)
    with pytest.raises(KvmError, match="below 4 GiB"):
        vm.set_tss_address(0xFFFFFFFF)
