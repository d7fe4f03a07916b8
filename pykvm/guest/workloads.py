"""The workloads: guests that dirty memory for as long as wanted and check all they wrote before."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pykvm.errors import GuestError, UsageError
from pykvm.guest import catalog
from pykvm.guest.devices import Device, DeviceBus, GuestFinished
from pykvm.guest.protocol import DOORBELL_PORT, RECORD_LIMIT, RECORD_SHIFT, Block, Doorbell, State
from pykvm.guest.report import Corruption, GuestReport, explain
from pykvm.guest.runner import GuestRunner
from pykvm.guest.workload_boot import create_slots, load_workload
from pykvm.guest.workload_config import Layout, Region, WorkloadConfig, gpa_of, random_numbers
from pykvm.machine import Machine, System, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.exceptions import Vector

__all__ = ["Corruption", "GuestReport", "Layout", "Region", "WorkloadConfig", "WorkloadGuest", "gpa_of"]


class _Doorbell(Device):
    def __init__(self, guest: WorkloadGuest) -> None:
        self._guest = guest

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        self._guest._rung(vcpu, value)


class WorkloadGuest:
    """A workload on a machine, with its memory, devices and runner; a context manager.

    Closing stops the runner and closes machine and memory.
    """

    def __init__(self, machine: Machine, memory: GuestMemory, config: WorkloadConfig) -> None:
        self.machine = machine
        self.memory = memory
        self.config = config
        self.layout = Layout.of(config)
        self.bus = DeviceBus()
        self.bus.attach_ports(_Doorbell(self), DOORBELL_PORT)
        self.runner = GuestRunner(machine, self.bus)
        self.on_corruption: Callable[[Corruption], None] | None = None
        """Called on the vCPU's thread when the guest reports a corruption (the first 64 per vCPU)."""

    @classmethod
    def create(
        cls, system: System, config: WorkloadConfig, *, prepare: Callable[[Machine], None] | None = None
    ) -> Self:
        """Make machine, memory and vCPUs and load the guest; it starts with ``runner.start()``.

        ``prepare`` gets the machine before it has slots and vCPUs.  Raises UsageError, HostError, KvmError.
        """
        layout = Layout.of(config)
        machine = system.create_machine()
        memory = None
        try:
            if prepare is not None:
                prepare(machine)
            memory = GuestMemory(config.memory)
            create_slots(machine, memory)
            load_workload(machine, memory, config, layout)
            return cls(machine, memory, config)
        except BaseException:
            machine.close()
            if memory is not None:
                memory.close()
            raise

    @classmethod
    def adopt(cls, machine: Machine, memory: GuestMemory, config: WorkloadConfig) -> Self:
        """A guest that lives already: slots and vCPUs exist and hold its state; only host parts are made."""
        if memory.size != config.memory or len(machine.vcpus) != config.vcpus:
            raise UsageError(
                f"The configuration says {config.memory} bytes and {config.vcpus} vCPUs, "
                f"the machine has {memory.size} bytes and {len(machine.vcpus)}."
            )
        return cls(machine, memory, config)

    def report(self) -> GuestReport:
        """What the guest says about itself, read from its memory; works at any time, also while it runs.

        Raises ClosedError after ``close``.
        """
        blocks = [self.memory.read(block, PAGE_SIZE) for block in self.layout.blocks]
        totals = {
            field: sum(_field(block, field) for block in blocks)
            for field in (Block.VISITS, Block.PASSES, Block.CORRUPTIONS)
        }
        checks = catalog.load(self.config.workload).header.checks
        records = [record for number, block in enumerate(blocks) for record in self._records(number, block)]
        return GuestReport(
            visits=totals[Block.VISITS],
            checks=totals[Block.VISITS] * checks,
            passes=totals[Block.PASSES],
            corruption_count=totals[Block.CORRUPTIONS],
            corruptions=tuple(records),
        )

    def close(self) -> None:
        """Stop the guest and free everything.  Idempotent."""
        try:
            self.runner.stop()
        finally:
            self.machine.close()
            self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ----------------------------------------------------------------------------------

    def _records(self, vcpu: int, block: bytes) -> list[Corruption]:
        count = min(_field(block, Block.RECORDS), RECORD_LIMIT)
        return [self._record(vcpu, block, number) for number in range(count)]

    def _record(self, vcpu: int, block: bytes, number: int) -> Corruption:
        at = Block.RECORD + (number << RECORD_SHIFT)
        address, expected, found, visit = struct.unpack_from("<QQQq", block, at)
        if address == self.layout.shared:
            cause, suspect = "the shared counter went backwards", address
        else:
            # Not from the block: that is guest memory, which may be lost like any other page.
            _, *keys = random_numbers(self.config, vcpu)
            strings = self.config.workload == "strings"
            region = self.layout.regions[vcpu]
            cause, suspect = explain(address, found, visit, region, keys, strings=strings)
        return Corruption(
            vcpu=vcpu,
            gpa=gpa_of(address),
            expected=expected,
            found=found,
            visit=visit,
            cause=cause,
            page=gpa_of(suspect) & -PAGE_SIZE,
        )

    def _rung(self, vcpu: Vcpu, event: int) -> None:
        number = next(index for index, other in enumerate(self.machine.vcpus) if other is vcpu)
        block = self.memory.read(self.layout.blocks[number], PAGE_SIZE)
        if event == Doorbell.EXCEPTION:
            raise GuestError(_describe_exception(number, block))
        if event == Doorbell.FINISHED:
            states = (self.memory.read(at + Block.STATE, 8)[0] for at in self.layout.blocks)
            if all(state == State.FINISHED for state in states):
                raise GuestFinished(1 if self.report().corruption_count else 0)
        elif event == Doorbell.CORRUPTION:
            records = self._records(number, block)
            if self.on_corruption is not None and records:
                self.on_corruption(records[-1])
        else:
            raise GuestError(f"vCPU {number} rang the doorbell with the unknown event {event:#x}.")


def _field(block: bytes, field: Block) -> int:
    return int.from_bytes(block[field : field + 8], "little")


def _describe_exception(vcpu: int, block: bytes) -> str:
    number = _field(block, Block.VECTOR)
    name = f"#{Vector(number).name}" if number in set(Vector) else f"exception {number}"
    text = f"vCPU {vcpu} took {name} (vector {number}, error code {_field(block, Block.ERROR):#x}) at "
    text += f"RIP {_field(block, Block.RIP):#x}, CPL {_field(block, Block.CS) & 3}"
    if number == Vector.PF:
        text += f", CR2 {_field(block, Block.CR2):#x}"
    return text + "."
