"""Putting a workload into a fresh machine: image, tables, parameters, vCPUs."""

from __future__ import annotations

import math
import struct
from typing import Final

from pykvm.errors import UsageError
from pykvm.guest import catalog
from pykvm.guest.boot import Arena, BootMode, SystemTables, boot_state
from pykvm.guest.pagetables import USER, PageTables, PagingMode
from pykvm.guest.protocol import LOAD_ADDRESS, Block
from pykvm.guest.workload_config import (
    HOLE_END,
    HOLE_START,
    LARGE_PAGE,
    Layout,
    Region,
    WorkloadConfig,
    random_numbers,
)
from pykvm.machine import Machine
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.cpuid import physical_address_bits

# At CPL 0 some hosts emulate 1024 instructions before they look at the dirty ring, whose reserve is 64
# entries (docs/reference/hosts.md D.7): with this many empty turns a visit's stores stay far enough apart.
_SAFE_THROTTLE: Final = 20


def create_slots(machine: Machine, memory: GuestMemory) -> None:
    """Show ``memory`` to the guest as a workload expects it: slot 0 at 0, above 3 GiB slot 1 at 4 GiB.

    Raises UsageError for memory that ends beyond the guest's physical addresses (SDM vol. 3, 4.1.4).
    """
    end = memory.size if memory.size <= HOLE_START else memory.size + HOLE_END - HOLE_START
    bits = physical_address_bits(machine.supported_cpuid)
    if end > 1 << bits:
        raise UsageError(
            f"{memory.size >> 20} MiB of memory end beyond the {bits} physical address bits that this host "
            f"gives a guest; take at most {(1 << bits) - (HOLE_END - HOLE_START) >> 20} MiB."
        )
    machine.create_slot(memory, 0, size=min(memory.size, HOLE_START), slot_id=0)
    if memory.size > HOLE_START:
        machine.create_slot(memory, HOLE_END, memory_offset=HOLE_START, slot_id=1)


def load_workload(machine: Machine, memory: GuestMemory, config: WorkloadConfig, layout: Layout) -> None:
    """Write everything into ``memory``, whose slots exist, and create the vCPUs, ready to run."""
    guest = catalog.load(config.workload)
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
    paging.map(PAGE_SIZE, PAGE_SIZE, LARGE_PAGE - PAGE_SIZE, flags=USER)
    below = min(memory.size, HOLE_START)
    if below > LARGE_PAGE:
        paging.map(LARGE_PAGE, LARGE_PAGE, below - LARGE_PAGE, page_size=LARGE_PAGE, flags=USER)
    if memory.size > HOLE_START:
        size = memory.size - HOLE_START
        paging.map(HOLE_START, HOLE_END, size, page_size=LARGE_PAGE, flags=USER)
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
    random, key1, key2 = random_numbers(config, region.vcpu)
    fields = {
        Block.VCPU: region.vcpu,
        Block.VCPUS: config.vcpus,
        Block.SEED: random,
        Block.KEY1: key1,
        Block.KEY2: key2,
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
