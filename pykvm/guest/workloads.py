"""The workloads: guests that dirty memory for as long as wanted and check all they wrote before.

Memory is ``config.memory`` bytes, seen by the guest at the linear addresses [0, memory); linear address and
offset into the GuestMemory are the same.  Up to 3 GiB there is one slot at gpa 0; the rest, if any, is a
second slot at 4 GiB, which leaves the addresses of a PC's devices free.  Tables and stacks lie below
2 MiB where they fit, a vCPU's ledger and data pages after them, in one region per vCPU.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from pykvm.errors import GuestError, UsageError
from pykvm.guest import catalog
from pykvm.guest.boot import Arena, BootMode, SystemTables, boot_state
from pykvm.guest.devices import Device, DeviceBus, GuestFinished
from pykvm.guest.pagetables import USER, PageTables, PagingMode
from pykvm.guest.protocol import (
    DOORBELL_PORT,
    LOAD_ADDRESS,
    RECORD_LIMIT,
    RECORD_SHIFT,
    Block,
    Doorbell,
    Kind,
    State,
)
from pykvm.guest.report import Corruption, GuestReport, explain
from pykvm.guest.runner import GuestRunner
from pykvm.machine import Machine, System, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.exceptions import Vector

MIB: Final = 1 << 20
GIB: Final = 1 << 30
_HOLE_START, _HOLE_END = 3 * GIB, 4 * GIB
_LARGE: Final = 2 * MIB
_TABLES_START: Final = 0x10000
_MAX_VCPUS: Final = 64
_UNIT_PAGES: Final = {"strings": 4}

# At CPL 0 some hosts emulate 1024 instructions before they look at the dirty ring, whose reserve is 64
# entries (docs/reference/hosts.md D.7): with this many empty turns a visit's stores stay far enough apart.
_SAFE_THROTTLE: Final = 20


@dataclass(frozen=True)
class WorkloadConfig:
    """What to run.  Raises UsageError for values that do not fit each other.

    ``memory`` in bytes, a multiple of 2 MiB up to 1 TiB.  ``vcpus`` 1 to 64.  ``cpl`` 0 or 3.  ``seed``
    decides all addresses and values.  ``passes`` per vCPU, each as many visits as it has pages; 0 runs until
    stopped.  ``touch``: bytes of memory to work on, spread evenly over all of it (``strings``: contiguous); 0
    means all.  ``hot_pages`` and ``hot_percent`` (hotspot): the hot set, by default 1/16 of the pages, and
    its share of the visits.  ``stride`` (stride) in pages.  ``burst`` visits and ``quiet`` pause-loop turns
    (burst, idle); 0 chooses.  ``throttle``: empty loop turns after each visit; None means 0 at CPL 3, and at
    CPL 0 as many as keep a dirty ring safe on hosts that emulate CPL 0 in batches (not for ``strings``).
    """

    workload: str = "hotspot"
    memory: int = 64 * MIB
    vcpus: int = 1
    cpl: int = 3
    seed: int = 1
    passes: int = 0
    touch: int = 0
    hot_pages: int = 0
    hot_percent: int = 90
    stride: int = 17
    burst: int = 1024
    quiet: int = 0
    throttle: int | None = None

    def __post_init__(self) -> None:
        if self.workload not in catalog.workloads():
            raise UsageError(
                f"There is no workload '{self.workload}'; the workloads are {', '.join(catalog.workloads())}."
            )
        if self.memory % _LARGE or not _LARGE <= self.memory <= 1 << 40:
            raise UsageError("The memory of a workload must be a multiple of 2 MiB, from 2 MiB to 1 TiB.")
        if not 1 <= self.vcpus <= _MAX_VCPUS:
            raise UsageError(f"A workload has 1 to {_MAX_VCPUS} vCPUs, not {self.vcpus}.")
        if self.cpl not in {0, 3}:
            raise UsageError(f"A workload runs at CPL 0 or 3, not {self.cpl}.")
        if not 0 <= self.hot_percent <= 100:
            raise UsageError("hot_percent is a percentage from 0 to 100.")
        for name in ("seed", "passes", "touch", "hot_pages", "burst", "quiet", "throttle"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << 63:
                raise UsageError(f"{name} must be a number from 0 to 2^63-1, not {value}.")
        if self.stride < 1 or self.burst < 1:
            raise UsageError("stride and burst must be at least 1.")


@dataclass(frozen=True, slots=True)
class Region:
    """The share of one vCPU: linear addresses in bytes, ``pages`` units of ``step`` bytes."""

    vcpu: int
    block: int
    ledger: int
    data: int
    pages: int
    step: int

    def ledger_entry(self, linear: int) -> int:
        """The linear address of the ledger entry for the data page at ``linear``."""
        return self.ledger + (linear - self.data) // self.step * 8

    def page_address(self, number: int) -> int:
        """The linear address of data page (strings: unit) ``number``."""
        return self.data + number * self.step


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in the memory of a workload; the same for the same configuration."""

    blocks: tuple[int, ...]
    shared: int
    kernel_stacks: tuple[int, ...]
    user_stacks: tuple[int, ...]
    arena_start: int
    data_start: int
    regions: tuple[Region, ...]

    @classmethod
    def of(cls, config: WorkloadConfig) -> Layout:
        """Raises UsageError if the memory is too small."""
        arena = Arena(_TABLES_START, config.memory)
        blocks = tuple(arena.take() for _ in range(config.vcpus))
        shared = arena.take()
        kernel = tuple(arena.take() + PAGE_SIZE - 16 for _ in range(config.vcpus))
        user = tuple(arena.take() + PAGE_SIZE for _ in range(config.vcpus))
        arena_start = arena.next
        arena.take(2 + 3 * config.vcpus + _table_pages(config.memory))
        start = arena.next
        share = (config.memory - start) // config.vcpus // PAGE_SIZE * PAGE_SIZE
        regions = tuple(
            cls._region(config, number, blocks[number], start + number * share, share)
            for number in range(config.vcpus)
        )
        return cls(blocks, shared, kernel, user, arena_start, start, regions)

    @staticmethod
    def _region(config: WorkloadConfig, vcpu: int, block: int, start: int, share: int) -> Region:
        unit = _UNIT_PAGES.get(config.workload, 1) * PAGE_SIZE
        wanted = config.touch // config.vcpus // unit if config.touch else share
        units = min(wanted, share // (unit + 8))
        ledger = -(-units * 8 // PAGE_SIZE) * PAGE_SIZE
        while units and ledger + units * unit > share:
            units -= 1
        if units < 1:
            raise UsageError("The memory (or touch) is too small for a page per vCPU; give the guest more.")
        spread = (
            unit if config.workload in _UNIT_PAGES else (share - ledger) // units // PAGE_SIZE * PAGE_SIZE
        )
        return Region(vcpu, block, start, start + ledger, units, spread)


def _table_pages(memory: int) -> int:
    """Root, one page-directory-pointer table per 512 GiB, one directory per GiB, one table for 2 MiB."""
    return 1 + -(-memory // (512 * GIB)) + -(-memory // GIB) + 1


def gpa_of(offset: int) -> int:
    """The guest-physical address of an offset into a workload's memory (equal to its linear address)."""
    return offset if offset < _HOLE_START else offset + _HOLE_END - _HOLE_START


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
            _load(machine, memory, config, layout)
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
        region = self.layout.regions[vcpu]
        ledger = region.ledger_entry(address) if address != self.layout.shared else None
        keys = (_field(block, Block.KEY1), _field(block, Block.KEY2))
        cause, suspect = explain(
            address, found, visit, ledger, keys, strings=self.config.workload == "strings", region_data=region
        )
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


def create_slots(machine: Machine, memory: GuestMemory) -> None:
    """Show ``memory`` to the guest as a workload expects it: slot 0 at 0, above 3 GiB slot 1 at 4 GiB."""
    machine.create_slot(memory, 0, size=min(memory.size, _HOLE_START), slot_id=0)
    if memory.size > _HOLE_START:
        machine.create_slot(memory, _HOLE_END, memory_offset=_HOLE_START, slot_id=1)


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


def _load(machine: Machine, memory: GuestMemory, config: WorkloadConfig, layout: Layout) -> None:
    guest = catalog.load(config.workload)
    if guest.header.kind is not Kind.WORKLOAD:
        raise UsageError(f"'{guest.name}' is not a workload.")
    memory.write(LOAD_ADDRESS, guest.image)
    arena = Arena(layout.arena_start, layout.data_start)
    tables = SystemTables.build(
        memory,
        arena.take,
        wide=True,
        stacks=layout.kernel_stacks,
        handlers=[guest.header.stubs + 16 * vector for vector in range(32)],
    )
    paging = _map_all(memory, arena)
    for number, region in enumerate(layout.regions):
        # The handlers find their vCPU block above their stack.
        memory.write(layout.kernel_stacks[number], struct.pack("<Q", region.block))
        memory.write(region.block, _parameters(config, layout, region))
        vcpu = machine.create_vcpu()
        vcpu.set_cpuid(machine.supported_cpuid)
        state = boot_state(
            BootMode.LONG,
            entry=guest.header.entry,
            stack=layout.user_stacks[number],
            cpl=config.cpl,
            cr3=paging.cr3,
            tables=tables,
            vcpu=number,
        )
        state.registers.rbp = region.block
        state.apply(vcpu)


def _map_all(memory: GuestMemory, arena: Arena) -> PageTables:
    """Linear addresses as offsets into the memory; page 0 stays unmapped to catch null pointers."""
    paging = PageTables(PagingMode.LONG4, memory, arena.take)
    paging.map(PAGE_SIZE, PAGE_SIZE, _LARGE - PAGE_SIZE, flags=USER)
    below = min(memory.size, _HOLE_START)
    if below > _LARGE:
        paging.map(_LARGE, _LARGE, below - _LARGE, page_size=_LARGE, flags=USER)
    if memory.size > _HOLE_START:
        size = memory.size - _HOLE_START
        paging.map(_HOLE_START, _HOLE_END, size, page_size=_LARGE, flags=USER)
    return paging


def _parameters(config: WorkloadConfig, layout: Layout, region: Region) -> bytes:
    throttle = config.throttle
    if throttle is None:
        throttle = _SAFE_THROTTLE if config.cpl == 0 else 0
    quiet = config.quiet or (4_000 if config.cpl == 0 else 400_000)
    argument0, argument1 = {
        "hotspot": (config.hot_pages or -(-region.pages // 16), config.hot_percent * 0xFFFFFFFF // 100),
        "stride": (_coprime(config.stride, region.pages), 0),
        "idle": (0, quiet),
        "burst": (config.burst, quiet),
    }.get(config.workload, (0, 0))
    random = _splitmix(config.seed * _MAX_VCPUS + region.vcpu)
    fields = {
        Block.VCPU: region.vcpu,
        Block.VCPUS: config.vcpus,
        Block.SEED: random,
        Block.KEY1: _splitmix(random) | 1,
        Block.KEY2: _splitmix(random + 1) | 1,
        Block.DATA: region.data,
        Block.PAGES: region.pages,
        Block.STEP: region.step,
        Block.LEDGER: region.ledger,
        Block.PASS_LIMIT: config.passes,
        Block.ARGUMENT0: min(argument0, region.pages) if config.workload == "hotspot" else argument0,
        Block.ARGUMENT1: argument1,
        Block.THROTTLE: throttle,
        Block.SHARED: layout.shared,
    }
    block = bytearray(Block.STATE)
    for field, value in fields.items():
        struct.pack_into("<Q", block, field, value)
    return bytes(block)


def _coprime(stride: int, pages: int) -> int:
    """The largest stride up to the wanted one that reaches every page."""
    stride = max(1, min(stride, pages - 1))
    while math.gcd(stride, pages) != 1:
        stride -= 1
    return stride


def _splitmix(seed: int) -> int:
    """One step of the SplitMix64 generator: independent 64-bit numbers from consecutive seeds."""
    mask = (1 << 64) - 1
    value = (seed + 0x9E3779B97F4A7C15) & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31
