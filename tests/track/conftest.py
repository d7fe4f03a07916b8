"""A guest that stores to chosen pages and stops, small enough to be checked by reading.

Real mode, so it runs everywhere; at most 50 stores an entry, so that a ring of the smallest size is safe
even where KVM emulates the code in batches (docs/reference/hosts.md D.7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest

from pykvm.machine import DirtyPages, Halted, Machine, Registers, System, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.track import Tracker
from tests.backends import system

CODE = 0x1000
CODE_PAGE = (0, CODE // PAGE_SIZE)
MAX_STORES = 50
PAGES = 256


def store_code(pages: Iterable[int]) -> bytes:
    """mov ax, segment; mov ds, ax; inc byte [0], for each page; hlt."""
    code = b""
    for page in pages:
        code += b"\xb8" + (page * (PAGE_SIZE // 16)).to_bytes(2, "little")
        code += b"\x8e\xd8" + b"\xfe\x06\x00\x00"
    return code + b"\xf4"


class Rig:
    """A machine with 1 MiB, prepared and armed by one tracker."""

    def __init__(self, vm: Machine, memory: GuestMemory, tracker: Tracker, vcpus: int = 1) -> None:
        self.vm = vm
        self.memory = memory
        self.tracker = tracker
        tracker.prepare(vm)
        self.slot = vm.create_slot(memory, 0)
        self.vcpus = [vm.create_vcpu() for _ in range(vcpus)]
        # Real mode: paging off and the code's page written once, so that only the stores can dirty it.
        for vcpu in self.vcpus:
            special = vcpu.get_special_registers()
            special.cs.base = special.cs.selector = 0
            vcpu.set_special_registers(special)
        memory.write(0, b"\1" * memory.size)

    def store(self, pages: Iterable[int], vcpu: Vcpu | None = None) -> None:
        """Have the guest write each of the pages, in order."""
        todo = list(pages)
        for start in range(0, len(todo), MAX_STORES):
            self.memory.write(CODE, store_code(todo[start : start + MAX_STORES]))
            cpu = vcpu or self.vcpus[0]
            cpu.set_registers(Registers(rip=CODE))
            exit_ = cpu.run()
            while not isinstance(exit_, Halted):
                self.tracker.on_ring_full(cpu)
                exit_ = cpu.run()

    def reported(self, *, final: bool = False) -> set[int]:
        """Collect and re-arm; the code's page is left out: hosts with TDP may report a fetch."""
        pages = self.tracker.collect(final=final)
        self.tracker.rearm(pages)
        return {gfn for slot, gfn in pages - DirtyPages.of([CODE_PAGE]) if slot == self.slot.id}


@pytest.fixture
def rig(system: System) -> Iterator[Callable[..., Rig]]:
    """Makes rigs; closes them."""
    machines: list[Machine] = []
    memories: list[GuestMemory] = []

    def make(tracker: Tracker, vcpus: int = 1) -> Rig:
        machines.append(system.create_machine())
        memories.append(GuestMemory(PAGES * PAGE_SIZE))
        return Rig(machines[-1], memories[-1], tracker, vcpus)

    yield make
    for machine in machines:
        machine.close()
    for memory in memories:
        memory.close()


__all__ = ["rig", "system"]
