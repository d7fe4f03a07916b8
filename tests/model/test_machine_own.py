"""What the model's machine promises beyond the tests that it shares with KVM."""

from __future__ import annotations

import signal
import threading
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from pykvm.errors import CapabilityError, KvmError, RingSizeError, SlotAlignmentError, SlotOverlapError
from pykvm.guest.boot import BootMode, boot_state
from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.kvm import KvmSystem
from pykvm.machine import (
    DirtyRingFull,
    Halted,
    IoIn,
    IoOut,
    Kicked,
    Machine,
    MmioWrite,
    Registers,
    SlotFlags,
    System,
    Vcpu,
)
from pykvm.machine.state import VcpuState
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.model import schedule
from pykvm.model.machine import ModelMachine
from pykvm.model.system import ModelSystem
from tests.patience import patient

MIB = 1 << 20
LOG = SlotFlags.LOG_DIRTY_PAGES
CODE = 0x1100


def real_mode(machine: Machine, memory: GuestMemory, code: bytes, number: int = 0) -> Vcpu:
    """A vCPU about to execute 16-bit code, each at a page of its own."""
    at = CODE + number * PAGE_SIZE
    memory.write(at, code)
    vcpu = machine.create_vcpu()
    special = vcpu.get_special_registers()
    special.cs.base = special.cs.selector = 0
    vcpu.set_special_registers(special)
    vcpu.set_registers(Registers(rip=at))
    return vcpu


# --- slots --------------------------------------------------------------------------------------------


def test_a_huge_slot_costs_what_is_used() -> None:
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(1 << 40) as memory:
        tracemalloc.start()
        slot = machine.create_slot(memory, 0)
        vcpu = real_mode(machine, memory, b"\xfe\x06\x00\x20\xf4")  # inc byte [0x2000]; hlt
        assert vcpu.run() == Halted()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert used < 2 * MIB
        begin = time.monotonic()
        slot.set_flags(LOG)
        vcpu.set_registers(Registers(rip=CODE))
        assert vcpu.run() == Halted()
        assert machine.get_dirty_log(slot).tolist() == [2]
        assert time.monotonic() - begin < 2
        assert memory.allocated < MIB


@pytest.mark.parametrize(
    ("gpa", "size", "error", "number"),
    [
        (0x800, PAGE_SIZE, SlotAlignmentError, 22),
        (0, 0x800, SlotAlignmentError, 22),
        (PAGE_SIZE, PAGE_SIZE, SlotOverlapError, 17),
        (1 << 52, PAGE_SIZE, KvmError, 22),
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE, KvmError, 22),
    ],
)
def test_a_wrong_slot_is_refused_and_lets_its_memory_go(
    gpa: int, size: int, error: type[KvmError], number: int
) -> None:
    """api.rst 4.35; the errnos are those of tests/kvm/test_traps_slots.py."""
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        machine.create_slot(memory, 0, size=2 * PAGE_SIZE)
        with pytest.raises(error) as caught:
            machine.create_slot(memory, gpa, size=size, slot_id=5)
        assert caught.value.errno == number
        assert list(machine.slots) == [0]


def test_a_store_to_a_readonly_slot_is_the_hosts() -> None:
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        machine.create_slot(memory, 0, size=2 * PAGE_SIZE)
        rom = machine.create_slot(
            memory, 2 * PAGE_SIZE, size=PAGE_SIZE, memory_offset=2 * PAGE_SIZE, flags=SlotFlags.READONLY | LOG
        )
        vcpu = real_mode(machine, memory, b"\xfe\x06\x00\x20\xf4")
        assert vcpu.run() == MmioWrite(0x2000, b"\x01")
        assert vcpu.run() == Halted()
        assert memory.read(0x2000, 1) == b"\0"
        assert machine.get_dirty_log(rom).tolist() == []


def test_the_host_sees_and_changes_memory_between_two_runs() -> None:
    """Code that was executed many times is another after the host wrote over it."""
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        machine.create_slot(memory, 0)
        vcpu = real_mode(machine, memory, bytes.fromhex("b96400 40 e2fd e610 ebf6"))  # 100 times inc ax; out
        assert isinstance(vcpu.run(), IoOut)
        assert vcpu.get_registers().rax == 100
        memory.write(CODE + 3, b"\x48")  # dec ax
        assert isinstance(vcpu.run(), IoOut)
        assert vcpu.get_registers().rax == 0


# --- dirty logs ---------------------------------------------------------------------------------------


def test_clear_ranges_are_those_of_kvm() -> None:
    """docs/reference/kvm-mmu.md 3.2: the matrix for a slot of 100 pages."""
    allowed = {(0, 100), (0, 64), (64, 36), (0, 0)}
    refused = {(1, 64), (64, 64), (0, 128), (64, 32), (128, 0), (100, 0), (0, 36)}
    with ModelSystem() as system, system.create_machine() as machine:
        with GuestMemory(100 * PAGE_SIZE) as memory:
            slot = machine.create_slot(memory, 0, flags=LOG)
            words = np.zeros(2, dtype=np.uint64)
            for first, pages in allowed:
                machine.clear_dirty_log(slot, first, pages, words)
            for first, pages in refused:
                with pytest.raises(KvmError) as caught:
                    machine.clear_dirty_log(slot, first, pages, words)
                assert caught.value.errno == 22, (first, pages)


@pytest.mark.parametrize("entries", [0, 16, 128, 300, 131072])
def test_ring_sizes_are_those_of_kvm(entries: int) -> None:
    with ModelSystem() as system, system.create_machine() as machine, pytest.raises(RingSizeError):
        machine.enable_dirty_ring(entries)


# again: mov ds, cx; inc word [0]; add cx, 0x100; jmp again: a page after the other, up to 1 MiB and around
_EVERY_PAGE = bytes.fromhex("8ed9 ff060000 81c10001 ebf4")


def test_a_vcpu_stops_at_the_soft_limit_exactly() -> None:
    """64 entries are in reserve (docs/reference/hosts.md D.4); a page has one entry per reset, in order."""
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        machine.enable_dirty_ring(256)
        machine.create_slot(memory, 0, flags=LOG)
        vcpu = real_mode(machine, memory, _EVERY_PAGE)
        vcpu.set_registers(Registers(rip=CODE, rcx=0x0200))
        seen: list[int] = []
        while len(seen) < 1000:
            assert vcpu.run() == DirtyRingFull()
            before = vcpu.get_registers()
            assert vcpu.run() == DirtyRingFull()
            assert vcpu.get_registers() == before, "no progress until the ring is emptied"
            (batch,) = machine.collect_rings().entries
            assert len(batch.offsets) == 256 - 64
            seen += batch.offsets.tolist()
        assert seen == [(2 + n) % 256 for n in range(len(seen))]


def test_a_full_ring_stops_instruction_by_instruction_too() -> None:
    # next: mov [ebx], al ; add ebx, 0x1000 ; jmp next
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(2 * MIB) as memory:
        machine.enable_dirty_ring(256)
        machine.create_slot(memory, 0, flags=LOG)
        real_mode(machine, memory, bytes.fromhex("678803 6681c300100000 ebf4"))
        (vcpu,) = machine.vcpus
        special = vcpu.get_special_registers()
        special.ds.limit = 0xFFFFFFFF
        vcpu.set_special_registers(special)
        vcpu.request_interrupt_window()
        assert vcpu.run() == DirtyRingFull()
        (entries,) = machine.collect_rings().entries
        assert len(entries.slots) == 256 - 64


def test_no_write_is_lost_between_two_collections() -> None:
    """What the guest wrote since the collection before is in this one, however often somebody collects."""
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        slot = machine.create_slot(memory, 0, flags=LOG)
        vcpu = real_mode(machine, memory, _EVERY_PAGE)
        vcpu.set_registers(Registers(rip=CODE, rcx=0x0200))
        thread = threading.Thread(target=vcpu.run)
        thread.start()
        copy = bytearray(memory.read(0, MIB))
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            for gfn in machine.get_dirty_log(slot).tolist():
                copy[gfn << 12 : gfn + 1 << 12] = memory.read(gfn << 12, PAGE_SIZE)
        vcpu.kick()
        thread.join()
        for gfn in machine.get_dirty_log(slot).tolist():
            copy[gfn << 12 : gfn + 1 << 12] = memory.read(gfn << 12, PAGE_SIZE)
        assert bytes(copy) == memory.read(0, MIB)
        assert memory.read(0x2000, 2) != bytes(2)


# --- several vCPUs ------------------------------------------------------------------------------------

# again: mov ax, [0x8000]; inc ax; mov [0x8000], ax; dec cx; jnz again; hlt: updates get lost
_RACE = bytes.fromhex("a10080 40 a30080 49 75f6 f4")


def race(seed: int) -> int:
    """What three racing vCPUs on three threads count to."""
    with ModelSystem(seed) as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        machine.create_slot(memory, 0)
        vcpus = [real_mode(machine, memory, _RACE, number) for number in range(3)]
        for number, vcpu in enumerate(vcpus):
            vcpu.set_registers(Registers(rip=CODE + number * PAGE_SIZE, rcx=20_000))
        threads = [threading.Thread(target=vcpu.run) for vcpu in vcpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return int.from_bytes(memory.read(0x8000, 2), "little")


def test_the_seed_decides_how_vcpus_interleave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_HELD_SECONDS", 10)  # a busy host may start threads later than usual
    results = {seed: race(seed) for seed in range(4)}
    assert len(set(results.values())) > 1, "other turns, other losses"
    for seed, result in results.items():
        assert race(seed) == result


# --- states go from one to the other ----------------------------------------------------------------------


def move(system: System, state: list[VcpuState], image: bytes, config: WorkloadConfig) -> tuple[bytes, int]:
    """Continue a guest elsewhere to its end: its memory, and the corruptions that it found."""
    machine, memory = system.create_machine(), GuestMemory(config.memory)
    memory.write(0, image)
    machine.create_slot(memory, 0)
    for number, each in enumerate(state):
        machine.create_vcpu(number).load_state(each)
    with WorkloadGuest.adopt(machine, memory, config) as guest:
        guest.runner.start()
        assert guest.runner.wait(patient(60)) == 0
        return memory.read(0, config.memory), guest.report().corruption_count


@pytest.mark.parametrize("workload", ["random", "sequential"])
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("direction", ["kvm to model", "model to kvm"])
def test_a_guest_goes_on_with_the_other_backend(
    system: KvmSystem, workload: str, cpl: int, direction: str
) -> None:
    config = WorkloadConfig(workload, memory=2 * MIB, cpl=cpl, passes=60, touch=16 * PAGE_SIZE, throttle=0)
    with ModelSystem() as model:
        here: System = system if direction == "kvm to model" else model
        there: System = model if here is system else system
        with WorkloadGuest.create(here, config) as guest:
            guest.runner.start()
            deadline = time.monotonic() + 20
            while not guest.report().visits and time.monotonic() < deadline:
                time.sleep(0.0005)
            guest.runner.pause()
            state = [VcpuState.from_json(vcpu.save_state().to_json()) for vcpu in guest.machine.vcpus]
            image = guest.memory.read(0, config.memory)
            guest.runner.resume()
            assert guest.runner.wait(patient(60)) == 0
            stayed = guest.memory.read(0, config.memory)
        assert move(there, state, image, config) == (stayed, 0)


# --- what it does not have ----------------------------------------------------------------------------------


def test_interrupt_controllers_are_refused_in_one_sentence() -> None:
    with ModelSystem() as system, system.create_machine() as machine:
        assert isinstance(machine, ModelMachine)
        with pytest.raises(CapabilityError, match="no interrupt controllers"):
            machine.create_irqchip()


def test_cr4_is_held_against_the_guests_cpuid() -> None:
    """SMEP without its CPUID bit: KVM_SET_SREGS gives EINVAL."""
    with ModelSystem() as system, system.create_machine() as machine:
        vcpu = machine.create_vcpu()
        special = vcpu.get_special_registers()
        special.cr4 = 1 << 20
        with pytest.raises(KvmError) as caught:
            vcpu.set_special_registers(special)
        assert caught.value.errno == 22
        vcpu.set_cpuid(machine.supported_cpuid)
        vcpu.set_special_registers(replace(special))
        assert vcpu.get_special_registers().cr4 == 1 << 20


def test_a_machine_can_be_closed_after_ctrl_c() -> None:
    """KeyboardInterrupt out of ``run`` leaves no lock behind."""
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        machine.create_slot(memory, 0)
        vcpu = real_mode(machine, memory, b"\xeb\xfe")
        for _ in range(20):
            interrupt = threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,))
            interrupt.start()
            with pytest.raises(KeyboardInterrupt):
                vcpu.run()
            interrupt.join()
            assert machine.get_clock().clock > 0
            with machine.schedule.visit():
                assert not vcpu.running


@pytest.mark.timeout(20)
def test_ctrl_c_at_the_end_of_a_slice_leaves_no_lock_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        machine.create_slot(memory, 0)
        vcpu = real_mode(machine, memory, b"\xeb\xfe")
        with monkeypatch.context() as patch:
            patch.setattr(machine.schedule, "end", interrupted)
            with pytest.raises(KeyboardInterrupt):
                vcpu.run()
        with machine.schedule.visit():
            assert not vcpu.running


# --- what slots share, and what waits for what --------------------------------------------------------


@pytest.mark.parametrize("translate", [False, True])
def test_code_changed_through_another_slot_of_its_memory(translate: bool) -> None:
    # mov ax, 0x1000 ; mov es, ax ; again: mov cx, 200 ; turn: inc bx ; loop turn
    # mov byte [es:turn], dec bx ; inc dx ; cmp dx, 1 ; jbe again ; hlt
    code = bytes.fromhex("b80010 8ec0 b9c800 43 e2fd 26c60608114b 42 83fa01 76ee f4")
    with (
        ModelSystem(translate=translate) as system,
        system.create_machine() as machine,
        GuestMemory(1 << 16) as memory,
    ):
        machine.create_slot(memory, 0)
        machine.create_slot(memory, 0x10000)
        vcpu = real_mode(machine, memory, code)
        assert vcpu.run() == Halted()
        registers = vcpu.get_registers()
        assert (registers.rbx, registers.rdx) == (0, 2)  # 200 up, 200 down


@pytest.mark.parametrize("translate", [False, True])
def test_a_copy_onto_itself_through_another_slot_of_its_memory(translate: bool) -> None:
    # mov ebp, 40 ; turn: mov esi, 0x2000 ; mov edi, 0x12001 ; mov ecx, 100 ; inc ebx ; mov [esi], bl
    # rep movsb ; dec ebp ; jnz turn ; hlt
    code = bytes.fromhex("bd28000000 be00200000 bf01200100 b964000000 43 881e f3a4 4d 75e9 f4")
    with (
        ModelSystem(translate=translate) as system,
        system.create_machine() as machine,
        GuestMemory(1 << 16) as memory,
    ):
        machine.create_slot(memory, 0)
        machine.create_slot(memory, 0x10000)
        memory.write(0x1000, code)
        vcpu = machine.create_vcpu()
        vcpu.set_cpuid(machine.supported_cpuid)
        boot_state(BootMode.PROTECTED32, entry=0x1000, stack=0x8000).apply(vcpu)
        assert vcpu.run() == Halted()
        assert memory.read(0x2000, 102) == bytes([40]) * 101 + b"\0"


@pytest.mark.timeout(20)
def test_a_kick_between_answer_and_run_does_not_wait_for_itself() -> None:
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        slot = machine.create_slot(memory, 0, flags=LOG)
        vcpu = real_mode(machine, memory, bytes.fromhex("e460 e661"))  # in al, 0x60 ; out 0x61, al
        vcpu.run()
        vcpu.reply(b"\x05")
        machine.get_dirty_log(slot)
        vcpu.kick()
        assert vcpu.run() == Kicked()
        assert vcpu.get_registers().rax == 5
        assert vcpu.run() == IoOut(0x61, 1, b"\x05")


def test_an_interrupt_comes_behind_the_instruction_that_was_answered() -> None:
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        machine.create_slot(memory, 0)
        memory.write(0x20 * 4, b"\x00\x20\x00\x00")
        memory.write(0x2000, bytes.fromhex("e461"))  # in al, 0x61
        real_mode(machine, memory, bytes.fromhex("e460"))
        (vcpu,) = machine.vcpus  # in al, 0x60
        vcpu.set_registers(replace(vcpu.get_registers(), rsp=0x8000))
        assert vcpu.run() == IoIn(0x60, 1)
        vcpu.interrupt(0x20)
        vcpu.reply(b"\x05")
        assert vcpu.run() == IoIn(0x61, 1)
        assert vcpu.get_registers().rax == 5
        assert memory.read(0x7FFA, 2) == (CODE + 2).to_bytes(2, "little")


@pytest.mark.timeout(60)
def test_repetitions_keep_a_collection_waiting_a_moment_only() -> None:
    """After fast code, which makes slices long: rep cmpsb backwards, a thousand iterations an instruction."""
    # mov bx, 20 ; mov cx, 0 ; inc ax ; loop ; dec bx ; jnz ; std ; mov cx, 0xffff ; rep cmpsb ; jmp
    code = bytes.fromhex("bb1400 b90000 40 e2fd 4b 75f7 fd b9ffff f3a6 ebf9")
    with ModelSystem() as system, system.create_machine() as machine, GuestMemory(MIB) as memory:
        slot = machine.create_slot(memory, 0, flags=LOG)
        real_mode(machine, memory, code)
        (vcpu,) = machine.vcpus
        thread = threading.Thread(target=vcpu.run)
        thread.start()
        while vcpu.cpu.instructions < 20 << 17:
            time.sleep(0.01)
        time.sleep(0.2)
        begin = time.monotonic()
        machine.get_dirty_log(slot)
        vcpu.kick()
        thread.join()
        assert time.monotonic() - begin < 2
