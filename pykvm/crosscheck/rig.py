"""From a scenario's guest to a machine that holds it, and from there to another machine like it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Final, Self

from pykvm.crosscheck import snippets
from pykvm.crosscheck.scenario import CodeGuest, Scenario, TablePlan, WorkloadPlan
from pykvm.crosscheck.steps import SlotPlan
from pykvm.errors import ClosedError
from pykvm.guest import catalog
from pykvm.guest.boot import Arena, BootMode, SystemTables, boot_state
from pykvm.guest.launch import PAGING
from pykvm.guest.modes import MODES
from pykvm.guest.pagetables import PageTables
from pykvm.guest.protocol import LOAD_ADDRESS
from pykvm.guest.workload_boot import create_slots, load_workload
from pykvm.guest.workload_config import Layout, WorkloadConfig
from pykvm.machine import Machine, Slot, System
from pykvm.machine.state import MachineState, VcpuState
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.track import make_tracker
from pykvm.x86.cpuid import CpuidEntry

HANDLER_PORT: Final = 0x40
"""Handlers write AL to this port plus the vector."""
VECTORS: Final = 32
_HANDLER_BYTES: Final = 16
_IVT_BYTES: Final = 4


class MemoryPool:
    """Guest memories to be used again and again: making one costs more than a small scenario's run."""

    def __init__(self) -> None:
        self._free: dict[int, list[GuestMemory]] = {}

    def take(self, size: int) -> GuestMemory:
        """A zeroed memory of ``size`` bytes."""
        free = self._free.get(size)
        if not free:
            return GuestMemory(size)
        memory = free.pop()
        memory.view()[:] = 0
        return memory

    def put(self, memory: GuestMemory) -> None:
        """Take it back; no machine uses it any more."""
        self._free.setdefault(memory.size, []).append(memory)

    def close(self) -> None:
        """Close what is in the pool."""
        for memories in self._free.values():
            for memory in memories:
                memory.close()
        self._free.clear()


class Rig:
    """A machine with its memories and slots by number; a context manager that closes everything.

    ``slots`` keeps deleted slots, too, so that a step on one is refused by the machine.
    """

    def __init__(
        self,
        scenario: Scenario,
        system: System,
        cpuid: Sequence[CpuidEntry] | None = None,
        pool: MemoryPool | None = None,
    ) -> None:
        """``cpuid``: the processor that the guest sees; by default the best that the machine offers.
        ``pool``: where memories come from and go back to.

        Raises UsageError for a guest that cannot be built, HostError, KvmError.
        """
        self._scenario = scenario
        self._cpuid = cpuid
        self._system = system
        self._pool = pool
        self.slots: dict[int, Slot] = {}
        self.memories: list[GuestMemory] = []
        self.machine: Machine = system.create_machine()
        try:
            _prepare(self.machine, scenario)
            guest = scenario.guest
            if isinstance(guest, WorkloadPlan):
                self._load_workload(guest)
            else:
                self._load_code(guest)
        except BaseException:
            self.close()
            raise

    def add_slot(self, plan: SlotPlan) -> None:
        """Create a slot.  Raises as Machine.create_slot."""
        self.slots[plan.slot] = self.machine.create_slot(
            self.memories[plan.memory],
            plan.gpa,
            size=plan.size,
            memory_offset=plan.offset,
            slot_id=plan.slot,
            flags=plan.flags,
        )

    def slot(self, number: int) -> Slot:
        """The slot, dead or alive.  Raises ClosedError if the machine refused to create it."""
        if number not in self.slots:
            raise ClosedError(f"Slot {number} could not be created.")
        return self.slots[number]

    def memory_number(self, memory: GuestMemory) -> int:
        """Which of ``memories`` it is."""
        return next(number for number, each in enumerate(self.memories) if each is memory)

    def move(self) -> None:
        """Go on in a fresh machine: same memory, slots and state, and nothing else of the old one."""
        vcpus, machine = _saved(self.machine)
        plans = [
            SlotPlan(
                slot.id, slot.gpa, self.memory_number(slot.memory), slot.memory_offset, slot.size, slot.flags
            )
            for slot in self.machine.slots.values()
        ]
        # The old slots pin the memories: the new machine comes first, then the old one goes.
        old, self.machine = self.machine, self._system.create_machine()
        try:
            _prepare(self.machine, self._scenario)
            for plan in plans:
                self.add_slot(plan)
            for vcpu in vcpus:
                self.machine.create_vcpu().load_state(vcpu)
            self.machine.load_state(machine)
        finally:
            old.close()

    def reload(self) -> None:
        """Save the state and load it again."""
        vcpus, machine = _saved(self.machine)
        for vcpu, state in zip(self.machine.vcpus, vcpus, strict=True):
            vcpu.load_state(state)
        self.machine.load_state(machine)

    def close(self) -> None:
        """Close machine and memories.  Idempotent."""
        self.machine.close()
        for memory in self.memories:
            if self._pool is None:
                memory.close()
            else:
                self._pool.put(memory)
        self.memories = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ----------------------------------------------------------------------------------

    def _new_memory(self, size: int) -> GuestMemory:
        memory = self._pool.take(size) if self._pool is not None else GuestMemory(size)
        self.memories.append(memory)
        # Written once, so that the host has a page of its own everywhere (hosts.md A, untouched memory).
        memory.view()[::PAGE_SIZE] = 0
        return memory

    def _load_workload(self, plan: WorkloadPlan) -> None:
        config = WorkloadConfig(
            workload=plan.workload,
            memory=plan.memory,
            vcpus=plan.vcpus,
            cpl=plan.cpl,
            seed=plan.seed,
            passes=plan.passes,
        )
        layout = Layout.of(config)
        memory = self._new_memory(plan.memory)
        create_slots(self.machine, memory)
        self.slots |= self.machine.slots
        load_workload(self.machine, memory, config, layout)
        if self._cpuid is not None:
            for vcpu in self.machine.vcpus:
                vcpu.set_cpuid(self._cpuid)

    def _load_code(self, guest: CodeGuest) -> None:
        for size in guest.memories:
            self._new_memory(size)
        if guest.image is not None:
            self.memories[0].write(LOAD_ADDRESS, catalog.load(guest.image).image)
        for part in guest.contents:
            self.memories[part.memory].write(part.offset, part.data)
        if guest.snippets is not None:
            self.memories[0].write(guest.snippets, snippets.image())
        for plan in guest.slots:
            self.add_slot(plan)
        mode = MODES[guest.vcpus[0].mode]
        paging, system = build_tables(self.memories[0], guest)
        cr3 = paging.cr3 if paging else 0
        for number, vcpu in enumerate(guest.vcpus):
            wanted = vcpu.registers
            stack = wanted.rsp & 0xFFFF if mode is BootMode.REAL else wanted.rsp
            state = boot_state(
                mode,
                entry=wanted.rip,
                stack=stack,
                cpl=vcpu.cpl,
                cr3=vcpu.controls.cr3 if vcpu.controls else cr3,
                tables=system,
                vcpu=number,
            )
            rip = state.registers.rip  # in real mode relative to CS
            if vcpu.controls is not None:
                for field in fields(vcpu.controls):
                    setattr(state.special, field.name, getattr(vcpu.controls, field.name))
            made = self.machine.create_vcpu()
            made.set_cpuid(self.machine.supported_cpuid if self._cpuid is None else self._cpuid)
            replace(state, registers=replace(wanted, rip=rip)).apply(made)


def _prepare(machine: Machine, scenario: Scenario) -> None:
    if scenario.tracker == "none":
        return
    kind = scenario.tracker.removesuffix("-initially-set")
    tracker = make_tracker(kind, ring_entries=scenario.ring_entries, initially_set=kind != scenario.tracker)
    tracker.prepare(machine)


def _saved(machine: Machine) -> tuple[list[VcpuState], MachineState]:
    vcpus = [VcpuState.from_json(vcpu.save_state().to_json()) for vcpu in machine.vcpus]
    return vcpus, MachineState.from_json(machine.save_state().to_json())


def build_tables(memory: GuestMemory, guest: CodeGuest) -> tuple[PageTables | None, SystemTables | None]:
    """Write page tables, descriptor tables and handlers into memory 0, as far as the mode has them."""
    mode = MODES[guest.vcpus[0].mode]
    plan = guest.tables
    if plan is None:
        return None, None
    arena = Arena(plan.start, plan.start + plan.pages * PAGE_SIZE)
    handlers = _write_handlers(memory, plan)
    if mode is BootMode.REAL:
        for vector, handler in enumerate(handlers):
            memory.write(vector * _IVT_BYTES, struct.pack("<HH", handler & 0xF, handler >> 4))
        return None, None
    stacks = [arena.take() + PAGE_SIZE for _ in guest.vcpus]
    wide = mode in {BootMode.LONG, BootMode.LA57}
    system = SystemTables.build(memory, arena.take, wide=wide, stacks=stacks, handlers=handlers)
    if mode not in PAGING or guest.vcpus[0].controls is not None:
        return None, system
    paging = PageTables(PAGING[mode], memory, arena.take)
    for mapping in guest.mappings:
        paging.map(
            mapping.linear,
            mapping.physical,
            mapping.size,
            page_size=mapping.page_size,
            flags=mapping.flags,
            table_flags=mapping.table_flags,
        )
    return paging, system


def _write_handlers(memory: GuestMemory, plan: TablePlan) -> list[int]:
    """out 0x40 + vector, al; again: hlt; jmp again: for each vector, the same bytes in all modes."""
    if plan.handlers is None:
        return []
    handlers = [plan.handlers + _HANDLER_BYTES * vector for vector in range(VECTORS)]
    for vector, handler in enumerate(handlers):
        memory.write(handler, bytes([0xE6, HANDLER_PORT + vector, 0xF4, 0xEB, 0xFD]))
    return handlers
