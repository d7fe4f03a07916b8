"""Fetching a dirty log: whatever is in it comes out as exactly those gfns, however the last one was.

The log is filled without a guest: INITIALLY_SET makes it all ones, CLEAR leaves the chosen pages, and with
manual protection off again the next GET reads and clears.  Expected values are the chosen pages.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pykvm.kvm import KvmVm, MemorySlot
from pykvm.kvm.capabilities import Capability
from pykvm.machine import SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from tests.patience import patient

ROOT = Path(__file__).resolve().parents[2]
BASE = 0x12345
MANUAL_AND_INITIALLY_SET = 3


def fill(vm: KvmVm, slot: MemorySlot, pages: set[int]) -> None:
    """Make exactly ``pages`` of the slot dirty; logging goes off and on behind the slot object's back."""
    for flags, cap in ((0, MANUAL_AND_INITIALLY_SET), (int(SlotFlags.LOG_DIRTY_PAGES), None)):
        vm.set_user_memory_region(slot.id, flags, slot.gpa, slot.size, slot.host_address)
        if cap is not None:
            vm.enable_cap(Capability.MANUAL_DIRTY_LOG_PROTECT2, cap)
    clean = np.zeros((slot.npages + 63) // 64 * 64, dtype=np.uint8)
    clean[: slot.npages] = 1
    clean[sorted(pages)] = 0
    words = np.packbits(clean, bitorder="little").view(np.uint64)
    vm.clear_dirty_log(slot, 0, slot.npages, words)
    vm.enable_cap(Capability.MANUAL_DIRTY_LOG_PROTECT2, 0)


# Around words (64 pages), around the four words that are looked at together, and larger.
@pytest.mark.parametrize("pages", [1, 63, 64, 65, 255, 256, 257, 64 * 7 + 1, 64 * 1000 + 5])
def test_each_log_comes_out_as_it_was_put_in(vm: KvmVm, pages: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with GuestMemory(pages * PAGE_SIZE) as memory:
        slot = vm.create_slot(memory, BASE * PAGE_SIZE)
        # Empty, full and in between in an order that lets the room for pages grow and shrink.
        counts = [0, 1, pages, 0, pages // 2, pages, pages // 3, min(64, pages), min(65, pages), 0]
        for count in [*counts, *(rng.randrange(pages + 1) for _ in range(5))]:
            chosen = set(rng.sample(range(pages), count))
            fill(vm, slot, chosen)
            found = vm.get_dirty_log(slot)
            assert found.dtype == np.uint64
            assert found.tolist() == sorted(BASE + page for page in chosen)
            assert vm.get_dirty_log(slot).size == 0


def test_earlier_results_stay_what_they_were(vm: KvmVm) -> None:
    with GuestMemory(512 * PAGE_SIZE) as memory:
        slot = vm.create_slot(memory, BASE * PAGE_SIZE)
        results = []
        for step in (2, 3, 5, 7):
            fill(vm, slot, set(range(0, 512, step)))
            results.append(vm.get_dirty_log(slot))
        for step, result in zip((2, 3, 5, 7), results, strict=True):
            assert result.tolist() == list(range(BASE, BASE + 512, step))


def test_gfns_follow_a_slot_that_moved(vm: KvmVm) -> None:
    """The bitmap moves along with the slot (docs/reference/hosts.md D.1)."""
    with GuestMemory(128 * PAGE_SIZE) as memory:
        slot = vm.create_slot(memory, BASE * PAGE_SIZE, flags=SlotFlags.LOG_DIRTY_PAGES)
        fill(vm, slot, {3})
        assert vm.get_dirty_log(slot).tolist() == [BASE + 3]
        fill(vm, slot, {5})
        slot.move(0x777 * PAGE_SIZE)
        assert vm.get_dirty_log(slot).tolist() == [0x777 + 5]


FORKED = """
import os, signal, sys, threading
from pykvm.kvm import KvmSystem
from pykvm.machine import Kicked, Registers
from pykvm.memory import GuestMemory

def spin(kick_after):
    with KvmSystem() as system, system.create_machine() as vm, GuestMemory(1 << 16) as memory:
        memory.write(0x1000, b"\\xeb\\xfe")  # jmp to itself
        vm.create_slot(memory, 0)
        vcpu = vm.create_vcpu()
        special = vcpu.get_special_registers()
        special.cs.base = special.cs.selector = 0
        vcpu.set_special_registers(special)
        vcpu.set_registers(Registers(rip=0x1000))
        timer = threading.Timer(kick_after, vcpu.kick)
        timer.start()
        stopped = vcpu.run()
        timer.join()
        return isinstance(stopped, Kicked)

assert spin(0.02)
child = os.fork()
if child == 0:
    signal.alarm(10)  # a kick that reaches nobody must not leave the child behind
    os._exit(0 if spin(0.05) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.kvm
def test_a_forked_child_can_be_kicked() -> None:
    """The thread that ran a guest before the fork is another thread in the child."""
    result = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=patient(30), cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
