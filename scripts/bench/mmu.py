"""The model of KVM's MMU beside real KVM: what a simulated fault costs, a store, a scenario on both.

Real KVM is the yardstick of what the model stands in for.  The model is Python, so it is slower where the
processor does the work, and may well be faster where KVM has to leave the guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from time import perf_counter_ns
from typing import Any, Final

from measure import Effort, Row, paired, quiet, ratio_row
from tracking import PAGES, Guest

from pykvm.crosscheck.generate import RandomSource
from pykvm.crosscheck.mmu_generate import random_mmu_scenario
from pykvm.crosscheck.mmu_mass import MmuCheck
from pykvm.crosscheck.run import COUNTERS, run
from pykvm.kvm import KvmSystem
from pykvm.machine import SlotFlags
from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES
from pykvm.model.mmu.vcpu import ControlChange
from pykvm.model.mmu.vm import Mmu
from pykvm.model.paging import Access, Control
from pykvm.model.system import ModelSystem
from pykvm.profiles import DEVELOPMENT_HOST, profile

_STORE: Final = int(Access.USER | Access.WRITE)
_TABLE, _PAGE = 0x27, 0x67
_FIRST: Final = 0x100
_HOST: Final = 0x1000_0000_0000


class ModelGuest:
    """A guest of the model's MMU that stores to PAGES pages, with its page tables."""

    def __init__(self) -> None:
        self.mmu = Mmu(profile(*DEVELOPMENT_HOST))
        size = (_FIRST + PAGES) * 4096
        self.slot = self.mmu.memslots.set_region(
            0, LOG_DIRTY_PAGES, 0, size, _HOST, memoryview(bytearray(size))
        )
        assert self.slot is not None
        words = self.slot.words
        for table, below in ((0x10, 0x11), (0x11, 0x12)):
            words[table * 512] = below << 12 | _TABLE
        for number in range((_FIRST + PAGES) // 512 + 1):
            words[0x12 * 512 + number] = 0x13 + number << 12 | _TABLE
        for gfn in range(_FIRST, _FIRST + PAGES):
            words[0x13 * 512 + gfn] = gfn << 12 | _PAGE
        self.vcpu = self.mmu.create_vcpu()
        self.mmu.loaded = self.vcpu
        self.vcpu.set_control(Control(0x80010001, 0x10000, 0x20, 0xD00), ControlChange.HOST)
        assert self.vcpu.enter()
        self.addresses = [gfn << 12 for gfn in range(_FIRST, _FIRST + PAGES)]
        self.stores()

    def stores(self) -> float:
        """One store to each page; nanoseconds."""
        translate = self.vcpu.translate
        start = perf_counter_ns()
        for address in self.addresses:
            translate(address, _STORE)
        return perf_counter_ns() - start

    def logged(self) -> float:
        """The same with every page armed, so that each store faults."""
        self.mmu.dirty_log.get(self.slot)
        before = self.vcpu.counters.pf_taken
        spent = self.stores()
        assert self.vcpu.counters.pf_taken - before == PAGES
        return spent


def measure(yardstick: Any, effort: Effort) -> Iterator[Row]:
    rounds = effort.rounds(40, 8)
    with ExitStack() as stack:
        system = stack.enter_context(KvmSystem())
        guest = Guest(stack, stack.enter_context(system.create_machine()), PAGES)
        slot = guest.machine.slots[0]
        slot.set_flags(SlotFlags.LOG_DIRTY_PAGES)
        model = ModelGuest()
        guest.run()
        guest.run()

        def logged() -> float:
            guest.machine.get_dirty_log(slot)
            return guest.run()

        stack.enter_context(quiet())
        faults = paired(rounds, model.logged, logged)
        stores = paired(rounds, model.stores, guest.run)
    yield _row("simulated fault", faults, PAGES, "fault")
    yield _row("simulated store, mapped", stores, PAGES, "store")
    yield from _scenarios(effort)


def _row(name: str, pairs: list[tuple[float, float]], count: int, per: str) -> Row:
    best = min(mine for mine, _ in pairs) / count
    return ratio_row("mmu", name, pairs, count=count, per=per, details={"most_a_second": 1e9 / best})


def _scenarios(effort: Effort) -> Iterator[Row]:
    """Random scenarios on both and compared at L3, against the same scenarios on KVM alone."""
    rounds = effort.rounds(10, 2)
    each = 20
    with (
        KvmSystem() as system,
        ModelSystem(profile=profile(*DEVELOPMENT_HOST), gathers=False) as model,
        MmuCheck(model, system) as check,
    ):
        scenarios = [
            random_mmu_scenario(RandomSource(f"bench {number}"), f"bench {number}") for number in range(each)
        ]

        def both() -> float:
            start = perf_counter_ns()
            for scenario in scenarios:
                check.check(scenario)
            return perf_counter_ns() - start

        def alone() -> float:
            start = perf_counter_ns()
            for scenario in scenarios:
                run(scenario, system, watch=COUNTERS)
            return perf_counter_ns() - start

        pairs = paired(rounds, both, alone)
    yield _row("random scenario, L3", pairs, each, "scenario")


__all__ = ["measure"]
