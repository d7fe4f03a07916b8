"""A 1 TiB guest that uses 1000 pages: what its size may cost is its bitmap, and nothing else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from measure import Effort, Row, paired, ratio_row, timed
from migration import TIMEOUT, migrate, running_guest
from yardstick import YardstickError, checked, ffi

from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.kvm import KvmSystem, KvmVm, MemorySlot
from pykvm.machine import SlotFlags
from pykvm.memory import PAGE_SIZE

SIZE = 1 << 40
PAGES = 1000


def resident() -> int:
    """This process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


class SparseGuest:
    """The paused guest, and both ways to do things to its slots."""

    def __init__(self, guest: WorkloadGuest, yardstick: Any) -> None:
        self.guest = guest
        assert isinstance(guest.machine, KvmVm)
        self.vm = guest.machine
        self._library = yardstick
        self.found: list[int] = []
        self.slots = [slot for slot in self.vm.slots.values() if isinstance(slot, MemorySlot)]
        self._words = [np.ones((slot.npages + 63) // 64, dtype=np.uint64) for slot in self.slots]
        self._gfns = np.ones(1 << 16, dtype=np.uint64)

    @property
    def bitmap_bytes(self) -> int:
        return sum(words.nbytes for words in self._words)

    def write_everything(self) -> None:
        """Let the guest write to each of its pages at least once more."""
        self.guest.runner.resume()
        before, deadline = self.guest.report().passes, time.monotonic() + TIMEOUT
        while self.guest.report().passes < before + 2:
            if time.monotonic() > deadline:
                raise YardstickError("The sparse guest does not get on.")
            time.sleep(0.001)
        self.guest.runner.pause()

    def collect(self) -> float:
        """``get_dirty_log`` of every slot."""
        self.write_everything()
        start = perf_counter_ns()
        pages = sum([len(self.vm.get_dirty_log(slot)) for slot in self.slots])
        spent = perf_counter_ns() - start
        self._note(pages)
        return spent

    def collect_in_c(self) -> float:
        self.write_everything()
        count, total, spent = ffi.new("size_t *"), 0, 0
        for slot, words in zip(self.slots, self._words, strict=True):
            spent += checked(
                self._library.yardstick_dirty_log(
                    self.vm.fileno(),
                    slot.id,
                    ffi.from_buffer("uint64_t[]", words),
                    len(words),
                    slot.base_gfn,
                    ffi.from_buffer("uint64_t[]", self._gfns),
                    count,
                )
            )
            total += count[0]
        self._note(total)
        return spent

    def _note(self, pages: int) -> None:
        if pages < PAGES:
            raise YardstickError(f"Only {pages} of the {PAGES} pages were reported.")
        self.found.append(pages)

    def arm(self) -> float:
        """Turn logging on."""
        self.disarm()
        return sum(timed(partial(slot.set_flags, SlotFlags.LOG_DIRTY_PAGES)) for slot in self.slots)

    def arm_in_c(self) -> float:
        self.disarm()
        flags = int(SlotFlags.LOG_DIRTY_PAGES)
        return sum(
            checked(
                self._library.yardstick_slot_flags(
                    self.vm.fileno(), slot.id, flags, slot.gpa, slot.size, slot.host_address
                )
            )
            for slot in self.slots
        )

    def disarm(self) -> None:
        for slot in self.slots:
            slot.set_flags(SlotFlags.NONE)


def measure(yardstick: Any, effort: Effort) -> Iterator[Row]:
    config = WorkloadConfig("sequential", memory=SIZE, touch=PAGES * PAGE_SIZE)
    with KvmSystem() as system, running_guest(system, config) as (guest, tracker):
        guest.runner.pause()
        sparse = SparseGuest(guest, yardstick)
        pairs = paired(effort.rounds(5, 2), sparse.arm, sparse.arm_in_c)
        yield ratio_row("sparse", "1 TiB, 1000 pages: arm", pairs, per="VM")
        sparse.arm()
        before = resident()
        for slot in sparse.slots:
            guest.machine.get_dirty_log(slot)
        grown = resident() - before
        pairs = paired(effort.rounds(15, 5), sparse.collect, sparse.collect_in_c)
        yield ratio_row(
            "sparse",
            "1 TiB, 1000 pages: collect",
            pairs,
            per="VM",
            target=1.2,
            details={"pages": sparse.found, "resident_growth_bytes": grown},
        )
        yield memory_row(grown, sparse.bitmap_bytes)
        sparse.disarm()
        guest.runner.resume()
        result = migrate(guest, tracker, SIZE)
        yield migration_row(result, statistics.median(theirs for _, theirs in pairs))


def memory_row(grown: int, bitmap: int) -> Row:
    """What the first collection added to this process, in bitmaps."""
    return Row(
        item="sparse",
        name="1 TiB, 1000 pages: memory of a collection",
        value=grown / bitmap,
        low=grown / bitmap,
        high=grown / bitmap,
        ours=grown,
        yardstick=bitmap,
        rounds=1,
        per="bytes",
        unit="bitmaps",
        target=1.1,
        details={"bitmap_bytes": bitmap},
    )


def migration_row(result: Any, get_in_c: float) -> Row:
    """What the rounds of the migration took, in KVM_GET_DIRTY_LOGs of the whole guest by C."""
    spent = sum(item.seconds for item in result.rounds) * 1e9
    return Row(
        item="sparse",
        name="1 TiB, 1000 pages: rounds of a migration",
        value=spent / get_in_c,
        low=spent / get_in_c,
        high=spent / get_in_c,
        ours=spent,
        yardstick=get_in_c,
        rounds=1,
        per="VM",
        unit="GETs in C",
        details={
            "rounds": len(result.rounds),
            "total_seconds": result.total_seconds,
            "downtime_seconds": result.downtime_seconds,
            "digest_seconds": result.digest_seconds,
            "bytes_sent": result.bytes_sent,
            "resident_bytes": resident(),
        },
    )


__all__ = ["measure"]
