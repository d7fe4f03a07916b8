"""KVM_GET_DIRTY_LOG and the conversion to gfns.

The log is filled without a guest: with INITIALLY_SET a log starts all ones, KVM_CLEAR_DIRTY_LOG leaves the
pages that are wanted, and with manual protection off again the next GET reads, clears and re-protects as
usual.  So both sides get the same log on the same slot in every round, and 64 GiB need no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from measure import Effort, Row, quiet, ratio_row
from yardstick import YardstickError, checked, ffi

from pykvm.abi import lib
from pykvm.kvm import KvmSystem, KvmVm, MemorySlot
from pykvm.kvm.capabilities import Capability
from pykvm.machine import SlotFlags
from pykvm.memory import GuestMemory

DENSITIES = ((0.001, "0.1 %"), (0.1, "10 %"))
SEED = 1
WARM_UP = 1 << 20


class Size(NamedTuple):
    """A slot size; ``slots`` of them are collected one after the other, as a tracker does, per round.

    A call of a few microseconds measured alone would tell of caches that the preparation left cold.
    """

    label: str
    bytes: int
    slots: int
    rounds: int
    quick_rounds: int


SIZES = (
    Size("256 MiB", 256 << 20, 16, 60, 15),
    Size("4 GiB", 4 << 30, 4, 40, 8),
    Size("64 GiB", 64 << 30, 1, 15, 3),
)


class PreparedLog:
    """A slot whose log can be set to the same chosen pages again and again."""

    def __init__(self, vm: KvmVm, slot: MemorySlot, dirty: npt.NDArray[np.uint64]) -> None:
        self.vm = vm
        self.slot = slot
        bits = np.zeros(slot.npages, dtype=np.uint8)
        bits[dirty] = 1
        self._clean = ~np.packbits(bits, bitorder="little").view(np.uint64)
        self.expected = dirty + np.uint64(slot.base_gfn)
        self._words = np.ones((slot.npages + 63) // 64, dtype=np.uint64)
        self._gfns = np.ones(len(dirty), dtype=np.uint64)
        self._words_pointer = ffi.from_buffer("uint64_t[]", self._words)
        self._gfns_pointer = ffi.from_buffer("uint64_t[]", self._gfns)
        self._count = ffi.new("size_t *")
        self._found = self._gfns

    def _region(self, flags: SlotFlags) -> None:
        """Behind the slot object's back, which would let go of its buffer when logging ends."""
        slot = self.slot
        self.vm.set_user_memory_region(slot.id, int(flags), slot.gpa, slot.size, slot.host_address)

    def fill(self) -> None:
        """Exactly the chosen pages are dirty now."""
        self._region(SlotFlags.NONE)
        both = lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | lib.KVM_DIRTY_LOG_INITIALLY_SET
        self.vm.enable_cap(Capability.MANUAL_DIRTY_LOG_PROTECT2, both)
        self._region(SlotFlags.LOG_DIRTY_PAGES)
        self.vm.clear_dirty_log(self.slot, 0, self.slot.npages, self._clean)
        self.vm.enable_cap(Capability.MANUAL_DIRTY_LOG_PROTECT2, 0)

    def library(self) -> float:
        """``get_dirty_log``."""
        start = perf_counter_ns()
        self._found = self.vm.get_dirty_log(self.slot)
        return perf_counter_ns() - start

    def yardstick(self, library: Any) -> float:
        """The same in C, into arrays that exist already."""
        spent = checked(
            library.yardstick_dirty_log(
                self.vm.fileno(),
                self.slot.id,
                self._words_pointer,
                len(self._words),
                self.slot.base_gfn,
                self._gfns_pointer,
                self._count,
            )
        )
        self._found = self._gfns[: self._count[0]]
        return spent

    def check(self) -> None:
        """Raise YardstickError unless the last call of either found exactly what was put in."""
        if not np.array_equal(self._found, self.expected):
            raise YardstickError("A dirty log came back with other pages than were put into it.")


def measure(yardstick: Any, effort: Effort) -> Iterator[Row]:
    rng = np.random.default_rng(SEED)
    for size in SIZES:
        for density, share in DENSITIES:
            with ExitStack() as stack:
                vm = stack.enter_context(stack.enter_context(KvmSystem()).create_machine())
                memory = stack.enter_context(GuestMemory(size.bytes))
                logs = [
                    PreparedLog(vm, vm.create_slot(memory, 0, size=WARM_UP), np.arange(16, dtype=np.uint64))
                ]
                for number in range(size.slots):
                    slot = vm.create_slot(memory, (number + 1) * size.bytes)
                    dirty = np.flatnonzero(rng.random(slot.npages) < density).astype(np.uint64)
                    logs.append(PreparedLog(vm, slot, dirty))
                stack.enter_context(quiet())
                pairs = [
                    pair
                    for _ in range(effort.rounds(size.rounds, size.quick_rounds))
                    for pair in both(logs, partial(PreparedLog.yardstick, library=yardstick))
                ]
            yield ratio_row(
                "dirtylog",
                f"GET + gfns, {size.label}, {share} dirty",
                pairs,
                per="call",
                target=1.2,
                details={"slot_bytes": size.bytes, "dirty_pages": sum(len(log.expected) for log in logs[1:])},
            )


def both(logs: list[PreparedLog], yardstick: Callable[[PreparedLog], float]) -> list[tuple[float, float]]:
    """(library, yardstick) for each log but the first, a small one that brings the code into the caches."""
    times = []
    for get in (PreparedLog.library, yardstick):
        for log in logs:
            log.fill()
        times.append([get(log) for log in logs])
        for log in logs:
            log.check()
    return list(zip(*times, strict=True))[1:]


__all__ = ["measure"]
