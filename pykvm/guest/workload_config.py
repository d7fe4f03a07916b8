"""What a workload is asked to do, and where everything lies in its memory.

Memory is ``config.memory`` bytes, seen by the guest at the linear addresses [0, memory); linear address and
offset into the GuestMemory are the same.  Up to 3 GiB there is one slot at gpa 0; the rest, if any, is a
second slot at 4 GiB, which leaves the addresses of a PC's devices free.  Tables and stacks come first, then
one region per vCPU: its ledger, then its data pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pykvm.errors import UsageError
from pykvm.guest import catalog
from pykvm.guest.boot import Arena
from pykvm.memory import PAGE_SIZE

MIB: Final = 1 << 20
GIB: Final = 1 << 30
LARGE_PAGE: Final = 2 * MIB
HOLE_START, HOLE_END = 3 * GIB, 4 * GIB
MAX_VCPUS: Final = 64
_TABLES_START: Final = 0x10000
_UNIT_PAGES: Final = {"strings": 4}


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
        if self.memory % LARGE_PAGE or not LARGE_PAGE <= self.memory <= 1 << 40:
            raise UsageError("The memory of a workload must be a multiple of 2 MiB, from 2 MiB to 1 TiB.")
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise UsageError(f"A workload has 1 to {MAX_VCPUS} vCPUs, not {self.vcpus}.")
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
    return offset if offset < HOLE_START else offset + HOLE_END - HOLE_START


def random_numbers(config: WorkloadConfig, vcpu: int) -> tuple[int, int, int]:
    """What the seed makes of a vCPU: the first random state and the two odd keys of its stamps."""
    random = _splitmix(config.seed * MAX_VCPUS + vcpu)
    return random, _splitmix(random) | 1, _splitmix(random + 1) | 1


def _splitmix(seed: int) -> int:
    """One step of the SplitMix64 generator: independent 64-bit numbers from consecutive seeds."""
    mask = (1 << 64) - 1
    value = (seed + 0x9E3779B97F4A7C15) & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31
