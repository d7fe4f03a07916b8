"""Saving a vCPU and VM and going on elsewhere: nothing is lost, repeated or changed on the way."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from pykvm.errors import BusyError, ClosedError, PendingExitError, PykvmError, UsageError
from pykvm.kvm import KvmSystem, KvmVcpu, KvmVm
from pykvm.kvm.events import MpState
from pykvm.machine import IoIn, IoOut, Kicked, MmioWrite, Registers
from pykvm.machine.state import DebugRegisters, MachineState, PitState, VcpuState
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.bits import Rflags
from pykvm.x86.cpuid import find
from tests.model.flow_kvm import emulates_cpl0
from tests.patience import patient

from .handlers import install, run_for, run_soon
from .processes import in_a_process
from .tiny import DATA, DONE, PORT, SPIN, TABLES, Tiny, done, running

MULTIPLIER, INCREMENT = 6364136223846793005, 1442695040888963407
LOOP = bytes.fromhex("480fafc3 4801d0 4989c0 49c1e82d 4921f0 4a8904c7")
"""imul rax, rbx; add rax, rdx; mov r8, rax; shr r8, 45; and r8, rsi; mov [rdi+r8*8], rax"""
PADDQ = bytes.fromhex("660fd4c1 660fd4c8")
"""paddq xmm0, xmm1; paddq xmm1, xmm0"""
CPL3_LOOP = LOOP + PADDQ + bytes.fromhex("48ffc9 75de 0f114500 e610")
"""…; dec rcx; jnz; movups [rbp], xmm0; out 0x10, al"""
CPL0_LOOP = LOOP + bytes.fromhex("48ffc9 75e6 e610")
TSC = 0x10
CLOCKS = {TSC, 0x4000_0010, 0x4000_0020}
"""MSRs that go on by themselves: the TSC and, where KVM has Hyper-V's, its run time and reference time."""
LSTAR = 0xC0000082
XSTATE_BV = slice(512, 520)
"""In an XSAVE area: which components are not in their initial state (SDM vol. 1, 13.4.2)."""


@pytest.fixture
def guests(system: KvmSystem) -> Iterator[type]:
    """Makes tiny guests that close at the end."""
    with ExitStack() as stack:

        def make(*, irqchip: bool = False, **options: int) -> Tiny:
            vm = system.create_machine()
            if irqchip:
                vm.create_irqchip()
            return stack.enter_context(Tiny(vm, **options))  # type: ignore[arg-type]

        yield make  # type: ignore[misc]


def start(guest: Tiny, code: bytes, count: int) -> KvmVcpu:
    guest.vcpu.set_fpu(_sse(guest.vcpu))
    return guest.load(
        code,
        rax=1,
        rbx=MULTIPLIER,
        rdx=INCREMENT,
        rcx=count,
        rdi=DATA * PAGE_SIZE,
        rsi=0x3FFFF,
        rbp=(DATA + 513) * PAGE_SIZE,
    )


def _sse(vcpu: KvmVcpu):  # type: ignore[no-untyped-def]
    fpu = vcpu.get_fpu()
    fpu.xmm = (bytes(range(16)), bytes(range(100, 116)), *fpu.xmm[2:])
    return fpu


def through_json(state: VcpuState) -> VcpuState:
    return VcpuState.from_json(json.loads(json.dumps(state.to_json())))


def hand_over(source: Tiny, destination: Tiny) -> None:
    """Everything that a migration moves: memory, vCPU, VM."""
    destination.memory.view()[:] = source.memory.view()
    destination.vcpu.load_state(through_json(source.vcpu.save_state()))
    machine = json.loads(json.dumps(source.vm.save_state().to_json()))
    destination.vm.load_state(MachineState.from_json(machine))


def _in_use(state: VcpuState) -> int:
    return int.from_bytes(state.xsave[XSTATE_BV], "little")


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(64) if mask >> bit & 1]


def _initial(state: VcpuState, component: int) -> bool:
    """Whether a component of the XSAVE area, in its standard format, holds its initial state."""
    area = state.xsave
    if component == 0:
        return area[:2] == b"\x7f\x03" and not any(area[2:24]) and not any(area[32:160])
    if component == 1:
        return not any(area[160:416])
    leaf = find(state.cpuid, 0xD, component)
    assert leaf is not None
    return not any(area[leaf.ebx : leaf.ebx + leaf.eax])


def linear_congruence(count: int) -> int:
    """x -> x * MULTIPLIER + INCREMENT, ``count`` times from 1 on, modulo 2^64, by squaring."""
    scale, offset, power_scale, power_offset = 1, 0, MULTIPLIER, INCREMENT
    while count:
        if count & 1:
            scale, offset = scale * power_scale, offset * power_scale + power_offset
        power_scale, power_offset = power_scale**2, power_offset * (power_scale + 1)
        scale, offset, power_scale, power_offset = (
            x % 2**64 for x in (scale, offset, power_scale, power_offset)
        )
        count >>= 1
    return (scale + offset) % 2**64


@pytest.mark.parametrize(("cpl", "code"), [(3, CPL3_LOOP), (0, CPL0_LOOP)], ids=["cpl3", "cpl0"])
def test_a_guest_moved_in_mid_loop_ends_as_if_it_had_stayed(
    system: KvmSystem, guests: type, cpl: int, code: bytes
) -> None:
    count = 8_000 if not cpl and emulates_cpl0(system) else 100_000_000  # some hundred milliseconds
    stayed = guests(cpl=cpl)
    assert done(start(stayed, code, count).run())
    assert stayed.vcpu.get_registers().rax == linear_congruence(count)

    moved = guests(cpl=cpl)
    start(moved, code, count)
    hops = 0
    for _ in range(3):
        exit_ = run_for(moved.vcpu, 0.01)
        if not isinstance(exit_, Kicked):
            break
        left = moved.vcpu.get_registers().rcx
        assert 0 < left <= count
        following = guests(cpl=cpl)
        hand_over(moved, following)
        moved = following
        hops += 1
    else:
        exit_ = moved.vcpu.run()
    assert done(exit_)
    assert hops > 0
    assert moved.vcpu.get_registers() == stayed.vcpu.get_registers()
    assert moved.vcpu.get_fpu() == stayed.vcpu.get_fpu()
    assert bytes(moved.memory.view()) == bytes(stayed.memory.view())


def test_a_guest_in_real_mode_moves(system: KvmSystem) -> None:
    """Segments with bases, 16-bit code; where KVM interprets it, in the midst of a batch."""
    code = bytes.fromhex("6640 67e2fb e610")  # again: inc eax; loop again (counting ecx); out 0x10, al
    machines = []
    with ExitStack() as stack:
        for _ in range(2):
            vm = stack.enter_context(system.create_machine())
            memory = stack.enter_context(GuestMemory(1 << 20))
            memory.write(0x1000, code)
            vm.create_slot(memory, 0)
            machines.append((vm, vm.create_vcpu()))
        (_, source), (_, destination) = machines
        special = source.get_special_registers()
        special.cs.base, special.cs.selector = 0x800, 0x80
        source.set_special_registers(special)
        for count in (
            0x30D41,
            0x8000041,
        ):  # two ones in the lowest byte: PF; no carry from its lower half: no AF
            source.set_registers(Registers(rip=0x800, rcx=count))
            exit_ = run_for(source, 0.01)
            if exit_ == Kicked():
                break
            assert done(exit_), "a processor that runs the code itself needs more of it"
        assert exit_ == Kicked()
        assert 0 < source.get_registers().rcx <= count
        destination.load_state(through_json(source.save_state()))
        assert done(run_for(destination, patient(20)))
        destination.complete_io()  # hosts.md C.3: RIP after an out is settled then
        assert destination.get_registers() == Registers(
            rip=0x800 + len(code), rax=count, rflags=Rflags.FIXED | Rflags.PF
        )


def test_two_vcpus_move_together(guests: type) -> None:
    count = 200_000_000
    source, destination = guests(vcpus=2), guests(vcpus=2)
    for number, vcpu in enumerate(source.vcpus):
        data = (DATA + 520 * number) * PAGE_SIZE
        source.load(
            CPL3_LOOP, vcpu, rax=1, rbx=MULTIPLIER, rdx=INCREMENT, rcx=count, rdi=data, rsi=0x3FFFF, rbp=data
        )
    for vcpu in source.vcpus:
        assert run_for(vcpu, 0.01) == Kicked()
        assert 0 < vcpu.get_registers().rcx <= count
    destination.memory.view()[:] = source.memory.view()
    for old, new in zip(source.vcpus, destination.vcpus, strict=True):
        new.load_state(through_json(old.save_state()))
    destination.vm.load_state(source.vm.save_state())
    for vcpu in destination.vcpus:
        assert done(vcpu.run())
        assert vcpu.get_registers().rax == linear_congruence(count)


def test_a_loaded_state_is_the_saved_one(guests: type) -> None:
    source, destination = guests(cpl=0), guests(cpl=0)
    source.vcpu.set_cpuid(source.vm.supported_cpuid)
    start(source, CPL0_LOOP, 5)
    source.vcpu.set_msrs({LSTAR: 0xFFFF_8000_1234_5678})
    source.vcpu.set_debug_registers(DebugRegisters((1, 2, 3, 4), 0xFFFF0FF1, 0x455))
    components = find(source.vm.supported_cpuid, 0xD)
    source.vcpu.set_xcrs({0: 3 if components is not None and components.eax & 2 else 1})
    saved = source.vcpu.save_state()
    destination.vcpu.load_state(saved)
    again = destination.vcpu.save_state()
    assert len(saved.cpuid) > 5
    assert saved.debug.dr7 == 0x455
    for field in ("cpuid", "registers", "special", "xcrs", "events", "mp_state", "debug", "tsc_khz"):
        assert getattr(again, field) == getattr(saved, field), field
    assert again.xsave[: XSTATE_BV.start] == saved.xsave[: XSTATE_BV.start]
    assert again.xsave[XSTATE_BV.stop :] == saved.xsave[XSTATE_BV.stop :]
    for component in _bits(_in_use(again) ^ _in_use(saved)):
        # A processor may take a component in its initial state for one in use (SDM vol. 1, 13.6).
        assert _initial(again, component), f"component {component}"
    ours, theirs = (
        {msr.index: msr.value for msr in state.msrs if msr.index not in CLOCKS} for state in (again, saved)
    )
    assert ours == theirs
    assert ours[LSTAR] == 0xFFFF_8000_1234_5678


def test_the_tsc_goes_on_from_where_it_was(guests: type) -> None:
    source, destination = guests(), guests()
    # Far from the host's, where the host can do that (kvm_pvm shows its own TSC whatever is written).
    source.vcpu.set_msrs({TSC: 1 << 50})
    started = time.monotonic()
    state = source.vcpu.save_state()
    saved = {msr.index: msr.value for msr in state.msrs}[TSC]
    destination.vcpu.load_state(state)
    now = destination.vcpu.get_msrs([TSC])[TSC]
    elapsed = time.monotonic() - started + 0.1
    assert state.tsc_khz is not None
    assert saved <= now <= saved + int(elapsed * 1000 * state.tsc_khz)


FIRST_IN_ITS_THREAD = """
import threading
from pykvm.kvm import KvmSystem
from tests.kvm.tiny import DONE, SPIN, Tiny, done

with KvmSystem() as system, Tiny(system.create_machine(), cpl=0) as guest:
    vcpu = guest.load(DONE + SPIN)
    exits = []
    thread = threading.Thread(target=lambda: exits.append(vcpu.run()))
    thread.start()
    thread.join()
    assert done(exits[0])
    entries = vcpu.entries
    assert vcpu.complete_io() is None
    assert vcpu.entries == entries + 1, "nothing was completed"
    rip = vcpu.get_registers().rip
    assert vcpu.complete_io() is None
    assert vcpu.get_registers().rip == rip
"""


@pytest.mark.kvm
def test_an_exit_is_completed_by_a_thread_that_runs_a_vcpu_for_the_first_time() -> None:
    """The main thread looks at Python's signal handlers before it enters KVM: a signal, as it were."""
    in_a_process(FIRST_IN_ITS_THREAD)


def test_an_out_is_not_repeated(guests: type) -> None:
    """On AMD the registers still show the OUT as not executed; saving completes it (hosts.md C.3)."""
    source, destination = guests(), guests()
    first = source.run(bytes.fromhex("e620 48ffc3 e610"))  # out 0x20, al; inc rbx; out 0x10, al
    assert isinstance(first, IoOut)
    assert first.port == 0x20
    hand_over(source, destination)
    second = destination.vcpu.run()
    assert done(second)
    assert destination.vcpu.get_registers().rbx == 1


def test_an_in_must_be_answered_before_saving(guests: type) -> None:
    source, destination = guests(), guests()
    assert isinstance(
        source.run(bytes.fromhex("e420 48ffc3 e610")), IoIn
    )  # in al, 0x20; inc rbx; out 0x10, al
    with pytest.raises(UsageError, match="reply"):
        source.vcpu.save_state()
    source.vcpu.reply(b"\x5a")
    hand_over(source, destination)
    assert done(destination.vcpu.run())
    registers = destination.vcpu.get_registers()
    assert (registers.rax & 0xFF, registers.rbx) == (0x5A, 1)


HOLE = 1010


def with_hole(guest: Tiny) -> int:
    """Map a page of the guest to where no slot is; its address."""
    guest.memory.write((TABLES + 1) * PAGE_SIZE + 8 * (HOLE - 512), (HOLE << 12 | 0x67).to_bytes(8, "little"))
    return HOLE * PAGE_SIZE


def test_a_wide_mmio_access_must_be_finished_before_saving(guests: type) -> None:
    source, destination = guests(pages=1000), guests(pages=1000)
    address = with_hole(source)
    source.vcpu.set_fpu(_sse(source.vcpu))
    first = source.run(bytes.fromhex("0f1107 e610"), rdi=address)  # movups [rdi], xmm0; out 0x10, al
    assert first == MmioWrite(address, bytes(range(8)))
    with pytest.raises(PendingExitError, match="handled") as caught:
        source.vcpu.save_state()
    assert caught.value.exit == MmioWrite(address + 8, bytes(range(8, 16)))
    hand_over(source, destination)
    assert done(destination.vcpu.run())


def test_complete_io_leaves_a_kick_for_the_next_run(guests: type) -> None:
    guest = guests()
    guest.load(DONE)
    guest.vcpu.kick()
    assert guest.vcpu.complete_io() is None
    assert guest.vcpu.run() == Kicked()
    assert done(guest.vcpu.run())


@pytest.mark.parametrize("what", ["interrupt", "nmi", "msi"])
def test_a_pending_event_arrives_at_the_destination(guests: type, what: str) -> None:
    irqchip = what == "msi"
    source, destination = guests(cpl=0, irqchip=irqchip), guests(cpl=0, irqchip=irqchip)
    vector = 2 if what == "nmi" else 0x51
    install(source, [vector])
    source.load(SPIN, rflags=2 | Rflags.IF)
    if what == "interrupt":
        source.vcpu.interrupt(vector)
    elif what == "nmi":
        source.vcpu.nmi()
    else:
        enable_lapic(source.vcpu)
        assert source.vm.signal_msi(0xFEE00000, vector)
    hand_over(source, destination)
    assert run_soon(destination.vcpu) == IoOut(PORT, 1, bytes([vector]))


def enable_lapic(vcpu: KvmVcpu) -> None:
    """Bit 8 of the spurious-interrupt vector register (SDM vol. 3, 11.9)."""
    lapic = bytearray(vcpu.get_lapic())
    lapic[0xF1] |= 1
    vcpu.set_lapic(bytes(lapic))


def test_a_halted_vcpu_stays_halted_and_wakes_there(guests: type) -> None:
    source, destination = guests(cpl=0, irqchip=True), guests(cpl=0, irqchip=True)
    install(source, [0x51])
    enable_lapic(source.vcpu)
    source.load(bytes.fromhex("fbf4 e610"))  # sti; hlt; out 0x10, al
    with running(source.vcpu):
        deadline = time.monotonic() + patient(10)
        while source.vcpu.statistics().value("halt_exits") == 0:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    state = source.vcpu.save_state()
    assert state.mp_state == MpState.HALTED
    hand_over(source, destination)
    assert destination.vcpu.get_mp_state() == MpState.HALTED
    destination.vm.signal_msi(0xFEE00000, 0x51)
    assert run_soon(destination.vcpu) == IoOut(PORT, 1, b"\x51")


def test_loading_dirties_no_page(guests: type) -> None:
    source, destination = guests(), guests()
    source.load(SPIN)
    destination.vm.get_dirty_log(destination.slot)
    destination.vcpu.load_state(source.vcpu.save_state())
    destination.vm.load_state(source.vm.save_state())
    assert destination.vcpu.complete_io() is None
    assert len(destination.vm.get_dirty_log(destination.slot)) == 0


def test_both_vms_must_have_the_same_controllers(guests: type) -> None:
    plain, equipped = guests(), guests(irqchip=True)
    with pytest.raises(UsageError, match="create_irqchip"):
        plain.vcpu.load_state(equipped.vcpu.save_state())
    with pytest.raises(UsageError, match="create_irqchip"):
        equipped.vcpu.load_state(plain.vcpu.save_state())
    with pytest.raises(UsageError, match="interrupt controllers"):
        plain.vm.load_state(equipped.vm.save_state())
    equipped.vm.create_pit()
    with pytest.raises(UsageError, match="a timer"):
        guests(irqchip=True).vm.load_state(equipped.vm.save_state())


def test_the_controllers_and_the_timer_move_too(guests: type) -> None:
    source, destination = guests(irqchip=True), guests(irqchip=True)
    for guest in (source, destination):
        guest.vm.create_pit()
    chips = source.vm.get_irqchips()
    entry = bytearray(chips.ioapic)
    entry[24 + 8 * 4 : 24 + 8 * 5] = (0x51).to_bytes(8, "little")  # pin 4: vector 0x51, edge, unmasked
    source.vm.set_irqchips(type(chips)(chips.pic_master, chips.pic_slave, bytes(entry)))
    pit = source.vm.get_pit()
    source.vm.set_pit(PitState(tuple(replace(channel, mode=2, count=0x1234) for channel in pit.channels)))
    source.vm.set_clock(10**15)
    destination.vm.load_state(MachineState.from_json(source.vm.save_state().to_json()))
    assert destination.vm.get_irqchips().ioapic[24 + 8 * 4] == 0x51
    assert [(c.mode, c.count) for c in destination.vm.get_pit().channels] == [(2, 0x1234)] * 3
    assert 10**15 <= destination.vm.get_clock().clock <= 10**15 + 60 * 10**9


def test_a_running_or_closed_vcpu_cannot_be_saved(guests: type) -> None:
    guest = guests()
    guest.load(SPIN)
    with running(guest.vcpu), pytest.raises(BusyError, match="kick"):
        guest.vcpu.save_state()
    guest.vcpu.close()
    with pytest.raises(ClosedError):
        guest.vcpu.save_state()
    with pytest.raises(ClosedError):
        guest.vcpu.complete_io()


def test_a_damaged_state_is_taken_or_refused_with_a_reason(vm: KvmVm) -> None:
    """What passes the JSON checks may still be nonsense to KVM: that is a PykvmError, whatever it is."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    vm.create_irqchip()
    vcpu = vm.create_vcpu()
    whole = vcpu.save_state().to_json()
    refused: list[str] = []
    for _ in range(150):
        damaged = copy.deepcopy(whole)
        damage(damaged, rng)
        try:
            vcpu.load_state(VcpuState.from_json(damaged))
        except PykvmError as error:
            refused.append(str(error))
    assert refused
    assert all(len(reason) > 20 for reason in refused)


def damage(state: Any, rng: random.Random) -> None:
    """Change one leaf somewhere."""
    key = rng.choice(list(state) if isinstance(state, dict) else range(len(state)))
    value = state[key]
    if isinstance(value, (dict, list)) and value:
        damage(value, rng)
    elif isinstance(value, str):
        octets = bytearray.fromhex(value)
        octets[rng.randrange(len(octets))] ^= 1 << rng.randrange(8)
        state[key] = octets.hex()
    else:
        state[key] = rng.getrandbits(rng.choice((1, 16, 32, 64)))
