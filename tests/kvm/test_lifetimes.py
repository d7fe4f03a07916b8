"""Nothing crashes the interpreter, whatever is closed in whatever order from whichever thread.

The stress runs in processes of their own, so that a crash is a failed test and not the end of pytest.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pykvm.errors import ClosedError, KvmError, UsageError
from pykvm.kvm import KvmSystem
from pykvm.machine import Kicked, SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from tests.kvm.processes import in_a_process
from tests.rings import LEAST_RING

from .tiny import DATA, SPIN, STORE, Runner, Tiny, done, ring_guest, running

# --- use after close --------------------------------------------------------------------------------


@pytest.mark.kvm
def test_a_closed_system_raises() -> None:
    system = KvmSystem()
    system.close()
    system.close()
    for call in (
        lambda: system.api_version,
        lambda: system.check_extension(10),
        lambda: system.vcpu_mmap_size,
        system.create_machine,
        system.fileno,
    ):
        with pytest.raises(ClosedError, match="closed; create a new one"):
            call()
    assert system.closed
    assert "closed" in repr(system)


@pytest.mark.kvm
def test_a_closed_system_leaves_its_machines_alone() -> None:
    with KvmSystem() as system:
        vm = system.create_machine()
    with Tiny(vm) as guest:
        assert done(guest.store(DATA))
        assert guest.vm.get_dirty_log(guest.slot).tolist() == [DATA]
        guest.vcpu.load_state(guest.vcpu.save_state())


def test_everything_of_a_closed_machine_raises(system: KvmSystem) -> None:
    guest = ring_guest(system, LEAST_RING)
    vm, vcpu, slot = guest.vm, guest.vcpu, guest.slot
    registers, special = vcpu.get_registers(), vcpu.get_special_registers()
    vm.close()
    vm.close()
    assert vm.closed
    assert vcpu.closed
    assert not slot.alive
    calls: dict[str, Callable[[], object]] = {
        "create_vcpu": vm.create_vcpu,
        "create_slot": lambda: vm.create_slot(guest.memory, 0),
        "check_extension": lambda: vm.check_extension(10),
        "enable_cap": lambda: vm.enable_cap(168, 1),
        "enable_dirty_ring": lambda: vm.enable_dirty_ring(LEAST_RING),
        "enable_manual_protect": vm.enable_manual_protect,
        "reset_dirty_rings": vm.reset_dirty_rings,
        "collect_rings": vm.collect_rings,
        "set_user_memory_region": lambda: vm.set_user_memory_region(0, 0, 0, 0, 0),
        "get_dirty_log": lambda: vm.get_dirty_log(slot),
        "get_dirty_bitmap": lambda: vm.get_dirty_bitmap(slot),
        "clear_dirty_log": lambda: vm.clear_dirty_log(slot, 0, 64, np.zeros(1, dtype=np.uint64)),
        "vm fileno": vm.fileno,
        "vm statistics": vm.statistics,
        "vm save_state": vm.save_state,
        "slot set_flags": lambda: slot.set_flags(SlotFlags.NONE),
        "slot move": lambda: slot.move(1 << 32),
        "slot delete": slot.delete,
        "run": vcpu.run,
        "kick": vcpu.kick,
        "kick and wait": lambda: vcpu.kick(wait=1),
        "reply": lambda: vcpu.reply(b"x"),
        "get_registers": vcpu.get_registers,
        "set_registers": lambda: vcpu.set_registers(registers),
        "get_special_registers": vcpu.get_special_registers,
        "set_special_registers": lambda: vcpu.set_special_registers(special),
        "request_interrupt_window": vcpu.request_interrupt_window,
        "vcpu fileno": vcpu.fileno,
        "vcpu statistics": vcpu.statistics,
        "vcpu save_state": vcpu.save_state,
    }
    for name, call in calls.items():
        with pytest.raises(ClosedError) as caught:
            call()
        assert str(caught.value).endswith("."), name
    assert list(vm.slots) == []
    assert vcpu.running is False
    assert isinstance(vcpu.entries, int)
    guest.memory.close()


def test_closed_memory_raises(system: KvmSystem) -> None:
    memory = GuestMemory(4 * PAGE_SIZE)
    memory.close()
    memory.close()
    with system.create_machine() as vm:
        for call in (
            lambda: memory.read(0, 1),
            lambda: memory.write(0, b"x"),
            memory.view,
            memory.pointer,
            lambda: memory.discard(0, PAGE_SIZE),
            lambda: list(memory.extents()),
            lambda: memory.allocated,
            memory.page_digests,
            lambda: vm.create_slot(memory, 0),
        ):
            with pytest.raises(ClosedError, match="closed"):
                call()


# --- what keeps memory alive ------------------------------------------------------------------------


def mapped(address: int) -> bool:
    """Whether this process has something mapped there, by the kernel's own account."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_a_slot_keeps_its_memory_alive(system: KvmSystem) -> None:
    """After close and del the guest still runs in it; it goes with the last slot."""
    guest = Tiny(system.create_machine())
    guest.load(STORE, rdi=DATA * PAGE_SIZE)
    address = guest.slot.host_address
    guest.memory.close()
    del guest.memory
    gc.collect()
    assert mapped(address)
    assert done(guest.vcpu.run())
    with pytest.raises(ClosedError):
        guest.slot.memory.read(0, 1)
    guest.vm.close()
    del guest
    gc.collect()
    assert not mapped(address)


def test_a_guest_runs_on_in_closed_memory(system: KvmSystem) -> None:
    with Tiny(system.create_machine()) as guest:
        vcpu = guest.load(STORE, rdi=DATA * PAGE_SIZE, rax=0xABCD)
        view = guest.memory.view(DATA * PAGE_SIZE, 8)
        guest.memory.close()
        gc.collect()
        assert done(vcpu.run())
        assert view.tobytes() == (0xABCD).to_bytes(8, "little")


def test_two_slots_of_two_machines_share_a_memory(system: KvmSystem) -> None:
    """It goes when the second lets it go, not the first."""
    memory = GuestMemory(4 * PAGE_SIZE)
    one, two = system.create_machine(), system.create_machine()
    slot = one.create_slot(memory, 0)
    two.create_slot(memory, 0)
    address = slot.host_address
    memory.close()
    del memory
    one.close()
    del slot
    gc.collect()
    assert mapped(address)
    two.close()
    gc.collect()
    assert not mapped(address)


def test_a_view_keeps_its_memory_alive() -> None:
    memory = GuestMemory(4 * PAGE_SIZE)
    view = memory.view()
    view[5] = 7
    memory.close()
    del memory
    gc.collect()
    assert view[5] == 7


def test_a_failed_slot_does_not_pin_its_memory(system: KvmSystem) -> None:
    with system.create_machine() as vm:
        memory = GuestMemory(4 * PAGE_SIZE)
        address = vm.create_slot(memory, 0).host_address
        with pytest.raises(KvmError):
            vm.create_slot(memory, PAGE_SIZE)
        vm.slots[0].delete()
        memory.close()
        gc.collect()
        assert not mapped(address)


def test_dropping_every_reference_without_close_is_harmless(system: KvmSystem) -> None:
    before = resources()
    for _ in range(20):
        guest = Tiny(system.create_machine(), pages=64)
        assert done(guest.store(DATA))
        del guest
    gc.collect()
    assert resources() == before


def test_a_slot_is_not_deleted_under_a_log_being_fetched(system: KvmSystem) -> None:
    """A larger slot that takes over the id would have KVM write past the end of the smaller bitmap."""
    with system.create_machine() as vm, GuestMemory(64 * PAGE_SIZE) as memory:
        slot = vm.create_slot(memory, 0, flags=SlotFlags.LOG_DIRTY_PAGES)
        outcome: list[object] = []

        def fetch() -> None:
            try:
                outcome.append(vm.get_dirty_bitmap(slot))
            except ClosedError as error:
                outcome.append(error)

        with slot.log_lock:
            deleter = threading.Thread(target=slot.delete, daemon=True)
            deleter.start()
            deleter.join(0.1)
            assert deleter.is_alive()
            assert slot.alive
            fetcher = threading.Thread(target=fetch, daemon=True)
            fetcher.start()
        deleter.join(20)
        fetcher.join(20)
        assert not slot.alive
        assert len(outcome) == 1
        with pytest.raises(ClosedError):
            vm.get_dirty_bitmap(slot)


# --- closing while others are at it -----------------------------------------------------------------


def test_closing_a_running_vcpu_ends_its_run(system: KvmSystem) -> None:
    with Tiny(system.create_machine(), pages=64) as guest:
        guest.load(SPIN)
        with running(guest.vcpu) as runner:
            guest.vcpu.close()
            runner.thread.join(20)
            assert not runner.thread.is_alive()
            assert isinstance(runner.error, ClosedError)
            assert runner.exits in ([], [Kicked()])


@pytest.mark.parametrize("ring", [False, True])
def test_closing_the_machine_ends_every_run(system: KvmSystem, ring: bool) -> None:
    guest = ring_guest(system, LEAST_RING, vcpus=4) if ring else Tiny(system.create_machine(), vcpus=4)
    for vcpu in guest.vcpus:
        guest.load(SPIN, vcpu)
    runners = [Runner(vcpu) for vcpu in guest.vcpus]
    for runner in runners:
        runner.wait_until_running()
    guest.close()
    for runner in runners:
        runner.thread.join(20)
        assert not runner.thread.is_alive()
        assert isinstance(runner.error, ClosedError)


def test_memory_stays_while_a_thread_is_on_its_way_into_the_guest(system: KvmSystem) -> None:
    """It holds the descriptor, but is not in KVM_RUN yet, where it may complete an access first."""
    with Tiny(system.create_machine(), pages=64) as guest:
        handle = guest.vcpu._handle
        handle.users += 1
        closer = threading.Thread(target=guest.vm.close, daemon=True)
        closer.start()
        closer.join(0.2)
        assert closer.is_alive()
        assert guest.slot.alive
        handle.users -= 1
        closer.join(20)
        assert not guest.slot.alive
        guest.vcpu.close()  # closes the descriptor, as the last one to leave would have done


def test_kvm_run_works_after_the_vm_descriptor_is_gone(system: KvmSystem) -> None:
    """hosts.md C.4: the kernel would let it; here closing a VM closes its vCPUs, so it raises."""
    with Tiny(system.create_machine(), pages=64) as guest:
        guest.load(STORE, rdi=DATA * PAGE_SIZE)
        guest.vm.close()
        with pytest.raises(ClosedError):
            guest.vcpu.run()


# --- nothing leaks ----------------------------------------------------------------------------------


def resources() -> tuple[int, int, int]:
    """Descriptors, mappings of KVM or guest memory, threads: as the kernel counts them."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    ours = [line for line in maps if "kvm" in line or "memfd" in line]
    return len(os.listdir("/proc/self/fd")), len(ours), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("ring", [False, True])
def test_hundreds_of_machines_leak_nothing(system: KvmSystem, ring: bool) -> None:
    def once() -> None:
        guest = ring_guest(system, LEAST_RING, pages=64) if ring else Tiny(system.create_machine(), pages=64)
        with guest:
            assert done(guest.store(DATA, 3))
            guest.vm.statistics()
            guest.vcpu.statistics()

    once()
    before = resources()
    for _ in range(200):
        once()
    assert resources() == before


def test_machines_whose_creation_fails_leak_nothing(system: KvmSystem) -> None:
    before = resources()
    with system.create_machine() as vm:
        vm.create_vcpu(0)
        for _ in range(50):
            with pytest.raises(KvmError) as caught:
                vm.create_vcpu(0)
            assert caught.value.errno == errno.EEXIST
            with pytest.raises(UsageError):
                vm.create_vcpu(-1)
    with pytest.raises(KvmError):
        system.create_machine(vm_type=77)
    del caught
    assert resources() == before


def test_hundreds_of_machines_at_once(system: KvmSystem) -> None:
    guests = [Tiny(system.create_machine(), pages=64) for _ in range(100)]
    for number, guest in enumerate(guests):
        assert done(guest.run(STORE, rdi=DATA * PAGE_SIZE, rax=number))
    for number, guest in enumerate(guests):
        assert guest.memory.read(DATA * PAGE_SIZE, 8) == number.to_bytes(8, "little")
    random.Random(1).shuffle(guests)
    for guest in guests:
        guest.close()


# --- the stress -------------------------------------------------------------------------------------

STRESS = """
import random, sys, threading, time, traceback
from pykvm.errors import BusyError, ClosedError, GuestTimeoutError, LoggingDisabledError, UsageError
from pykvm.kvm import KvmSystem
from pykvm.machine import SlotFlags
from tests.kvm.tiny import *

seed, seconds = int(sys.argv[1]), float(sys.argv[2])
choose = random.Random(seed)
unexpected = []
rounds = 0
end = time.monotonic() + seconds

def worker(actions, number):
    own = random.Random(number)
    closed = 0
    while closed < 3:
        try:
            own.choice(actions)()
        except ClosedError:
            closed += 1
        except (BusyError, UsageError, GuestTimeoutError, LoggingDisabledError):
            pass  # the last: the slot went between two instructions, and its id is not KVM's any more
        except Exception:
            unexpected.append(traceback.format_exc())
            return

while time.monotonic() < end and not unexpected:
    rounds += 1
    system = KvmSystem()
    ring = choose.random() < 0.5
    vm = system.create_machine()
    if ring:
        vm.enable_dirty_ring(1024)
    guest = Tiny(vm, pages=128, vcpus=2)
    slot, memory = guest.slot, guest.memory
    view = memory.view()
    extra = GuestMemory(8 * PAGE_SIZE)
    extra_slot = vm.create_slot(extra, 128 * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
    for vcpu in guest.vcpus:
        guest.load(choose.choice([SPIN, OUT_FOR_EVER, ROUND_FOR_EVER]), vcpu,
                   r8=DATA * PAGE_SIZE, r9=100, rdx=PAGE_SIZE)

    def harvest(slot=slot):
        if ring:
            vm.collect_rings()
        else:
            vm.get_dirty_log(slot)

    def toggle(extra_slot=extra_slot):
        extra_slot.set_flags(SlotFlags(choose.randrange(2)))

    def quietly(call):
        try:
            call()
        except ClosedError:
            pass

    crews = [
        [vcpu.run for vcpu in guest.vcpus[:1]],
        [vcpu.run for vcpu in guest.vcpus[1:]],
        [vcpu.kick for vcpu in guest.vcpus],
        [harvest, vm.statistics, toggle],
        [guest.vcpus[0].get_registers, guest.vcpus[1].statistics, guest.vcpus[1].kick,
         lambda: guest.vcpus[0].kick(wait=5)],
    ]
    threads = [threading.Thread(target=worker, args=(crew, seed + i), daemon=True)
               for i, crew in enumerate(crews)]
    for thread in threads:
        thread.start()
    time.sleep(choose.random() * 0.02)
    closers = [system.close, vm.close, *[vcpu.close for vcpu in guest.vcpus], memory.close, extra.close,
               lambda gone=slot: quietly(gone.delete), lambda gone=extra_slot: quietly(gone.delete)]
    choose.shuffle(closers)
    def close_all(closers=closers):
        for close in closers:
            try:
                close()
            except ClosedError:
                pass
            except Exception:
                unexpected.append(traceback.format_exc())
    others = [threading.Thread(target=close_all, daemon=True) for _ in range(2)]
    for other in others:
        other.start()
    if choose.random() < 0.5:
        del memory, extra, slot, extra_slot, closers
        guest.memory = guest.slot = None
    for thread in [*others, *threads]:
        thread.join(30)
        if thread.is_alive():
            import faulthandler
            faulthandler.dump_traceback()
            sys.exit(f"seed {seed}, round {rounds}: a thread hangs")
    view[0] = 1
    assert vm.closed and all(vcpu.closed for vcpu in guest.vcpus)
print(rounds, "rounds")
if unexpected:
    sys.exit(f"seed {seed}, round {rounds}:\\n" + "\\n".join(unexpected))
"""


@pytest.mark.kvm
@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_closing_in_any_order_from_any_thread(seconds: int) -> None:
    """Threads run, kick, harvest, toggle logging and read statistics, while two others close everything in
    a random order.  Only ClosedError and BusyError (and refusals of arguments) may come of it."""
    seed = random.randrange(1 << 31)
    print(f"seed {seed}")
    in_a_process(STRESS, str(seed), str(seconds), timeout=seconds * 3 + 60)


def test_concurrent_creation_and_closing(system: KvmSystem) -> None:
    """No vCPU and no slot outlives a VM that was being closed while they were made."""
    before = resources()
    for _ in range(30):
        vm = system.create_machine()
        memory = GuestMemory(64 * PAGE_SIZE)
        errors: list[BaseException] = []

        def make(vm: object = vm, memory: GuestMemory = memory, errors: list[BaseException] = errors) -> None:
            try:
                for number in range(100):
                    vm.create_vcpu()  # type: ignore[attr-defined]
                    vm.create_slot(memory, number * 64 * PAGE_SIZE)  # type: ignore[attr-defined]
            except ClosedError:
                pass
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        time.sleep(random.random() * 0.003)
        vm.close()
        thread.join(20)
        assert not thread.is_alive()
        assert errors == []
        assert all(vcpu.closed for vcpu in vm.vcpus)
        assert not vm.slots
        memory.close()
        del vm, memory, thread, make
    assert resources() == before
