"""Small worlds to explore: which actors there are, where they start, and how large it is.

A case is explored with KVM's rules (a proof for its size) or with a mutation's (``mutations``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pykvm.model.interleave.collector import Collector
from pykvm.model.interleave.explorer import Actor, Result, Start, explore
from pykvm.model.interleave.rules import Rules
from pykvm.model.interleave.shadow_fast import NO_FRAME, Around, Faulter, Shadow
from pykvm.model.interleave.state import NO_SPTE, WRITABLE, Vm
from pykvm.model.interleave.tracker import OutsideWriter, Remover, Tracker
from pykvm.model.interleave.unsync import Writer
from pykvm.model.interleave.unsync import start as start_table
from pykvm.model.interleave.vcpu import Vcpu

Stores = Sequence[tuple[int, ...]]
"""By vCPU: the pages that it writes, in order."""

World = tuple[Sequence[Start[Any]], Sequence[Actor[Any, Any]]]


@dataclass(frozen=True, slots=True)
class Case:
    """``bounds`` says in words how large it is; ``large`` cases take longer than a few seconds."""

    name: str
    summary: str
    bounds: str
    build: Callable[[Rules], World]
    large: bool = False

    def explore(self, rules: Rules | None = None) -> Result:
        """Visit all of it, or come back with the shortest counterexample."""
        starts, actors = self.build(rules or Rules())
        return explore(starts, actors)


def _starts(vm: Vm) -> list[Start[Vm]]:
    """Every page protected, written before (its bit is set), or not mapped, in all combinations."""
    clean = "protected (D=0)" if vm.pml else "protected (W=0)"
    dirty = "written before (D=1, bit set)" if vm.pml else "written before (W=1, bit set)"
    starts = []
    for kinds in product((clean, dirty, "not mapped"), repeat=len(vm.memory)):
        start = vm.copy()
        for gfn, kind in enumerate(kinds):
            if kind == dirty:
                start.bitmap |= 1 << gfn
                start.set_spte(gfn, WRITABLE)
            elif kind != clean:
                start.set_spte(gfn, NO_SPTE)
        starts.append(Start(", ".join(f"page {gfn} {kind}" for gfn, kind in enumerate(kinds)), start))
    return starts


def _vcpus(stores: Stores, rules: Rules, soft_limit: int = 0, *, tdp_mmu: bool = False) -> list[Vcpu]:
    return [Vcpu(number, pages, rules, soft_limit, tdp_mmu=tdp_mmu) for number, pages in enumerate(stores)]


def _pages(stores: Stores) -> int:
    return 1 + max(gfn for pages in stores for gfn in pages)


def _bitmap(
    stores: Stores, rounds: int, *, manual: bool = False, pml: bool = False, tdp_mmu: bool = False
) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        vm = Vm.create(_pages(stores), len(stores), pml=pml)
        order = rules.manual_order if manual else rules.get_order
        if not pml:
            order = tuple(phase for phase in order if phase != "kick")
        collector = Collector("CLEAR" if manual else "GET", order, rounds, len(stores), rules)
        return _starts(vm), [*_vcpus(stores, rules, tdp_mmu=tdp_mmu), collector]

    return build


def _ring(stores: Stores, rounds: int, size: int, *, tdp_mmu: bool = False) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        vm = Vm.create(_pages(stores), len(stores), ring_size=size)
        collector = Collector("userspace", rules.ring_order, rounds, len(stores), rules)
        starts = [start for start in _starts(vm) if not start.shared.bitmap]
        return starts, [*_vcpus(stores, rules, size, tdp_mmu=tdp_mmu), collector]

    return build


def _outside(rules: Rules) -> World:
    vm = Vm.create(1, 1, ring_size=int(rules.outside_ring))
    order = tuple(phase for phase in rules.get_order if phase != "kick")
    name, order = ("userspace", rules.ring_order) if rules.outside_ring else ("GET", order)
    collector = Collector(name, order, 1, 1, rules)
    starts = [start for start in _starts(vm) if not (vm.rings and start.shared.bitmap)]
    return starts, [*_vcpus(((0,),), rules, len(vm.rings)), OutsideWriter(0, rules), collector]


def _untracked(vm: Vm) -> list[Start[Vm]]:
    """No logging; the page is mapped with W=1, or was protected when logging was still on, or not mapped."""
    vm.logging = False
    writable, absent = vm.copy(), vm.copy()
    writable.set_spte(0, WRITABLE)
    absent.set_spte(0, NO_SPTE)
    return [
        Start("page 0 mapped with W=1", writable),
        Start("page 0 mapped with W=0, MMU-writable=1 (logging was on)", vm),
        Start("page 0 not mapped", absent),
    ]


def _tracking(stores: Stores, *, remove: bool, tdp_mmu: bool = False) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        starts = _untracked(Vm.create(1, len(stores)))
        return starts, [*_vcpus(stores, rules, tdp_mmu=tdp_mmu), Tracker(0, rules, remove=remove)]

    return build


def _tracking_while_logging(stores: Stores, rounds: int, *, remove: bool) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        starts, actors = _bitmap(stores, rounds)(rules)
        return starts, [*actors, Tracker(0, rules, remove=remove)]

    return build


def _removal(stores: Stores, *, tdp_mmu: bool = False) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        starts = _starts(Vm.create(_pages(stores), len(stores)))
        return starts, [*_vcpus(stores, rules, tdp_mmu=tdp_mmu), Remover(rules)]

    return build


def _unsync(programs: Sequence[tuple[str, ...]]) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        writers = [Writer(number, program, rules) for number, program in enumerate(programs)]
        return start_table(len(programs)), writers

    return build


_COLLECTS = ("xchg", "protect", "pause", "xchg", "protect", "compare")


def _shadow(
    words: str,
    backing: tuple[int, ...],
    programs: Sequence[tuple[str, ...]],
    host: tuple[str, ...] = (),
    *,
    dirty: bool = True,
) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        start = Shadow.create(len(programs), backing, dirty=dirty)
        if not dirty and rules.shadow_mmu_writable_needs_dirty:
            start.spte = start.spte._replace(mmu_writable=False)
        actors: list[Actor[Shadow, Any]] = [
            Faulter(number, program, rules) for number, program in enumerate(programs)
        ]
        if host:
            actors.append(Around("host" if "reuse" in host else "KVM", host, rules))
        return [Start(words, start)], [*actors, Around("GET", _COLLECTS, rules)]

    return build


_REMAP = ("lead to 1", "flush", "store", "store", "lead to 0", "flush", "store")
_UNSYNC = ("write", "flush", "use")

CASES = {
    case.name: case
    for case in (
        Case(
            "bitmap",
            "GET_DIRTY_LOG against stores and page faults",
            "2 vCPUs, 1 page, stores 2 + 1, 1 collection and the last",
            _bitmap(((0, 0), (0,)), 1),
        ),
        Case(
            "bitmap-pages",
            "GET_DIRTY_LOG with two pages in its word",
            "2 vCPUs, 2 pages, stores 1 + 1, 1 collection and the last",
            _bitmap(((0,), (1,)), 1),
        ),
        Case(
            "manual",
            "manual protect: GET reads, CLEAR re-arms",
            "2 vCPUs, 2 pages, stores 1 + 1, 1 collection and the last",
            _bitmap(((0,), (1,)), 1, manual=True),
        ),
        Case(
            "ring",
            "dirty ring: push, harvest, RESET",
            "1 vCPU, 2 pages, stores 3, ring of 2 entries, 1 collection and the last",
            _ring(((1, 0, 1),), 1, 2),
        ),
        Case(
            "ring-full",
            "dirty ring that is full after each push",
            "1 vCPU, 2 pages, stores 3, ring of 1 entry, 1 collection and the last",
            _ring(((0, 1, 0),), 1, 1),
        ),
        Case(
            "ring-vcpus",
            "two dirty rings",
            "2 vCPUs, 2 pages, stores 2 + 1, rings of 2 entries, 1 collection and the last",
            _ring(((0, 1), (1,)), 1, 2),
        ),
        Case(
            "pml",
            "Intel PML: the processor logs, an exit flushes its buffer",
            "2 vCPUs, 1 page, stores 2 + 1, 1 collection and the last",
            _bitmap(((0, 0), (0,)), 1, pml=True),
        ),
        Case(
            "outside",
            "KVM writes guest memory while no vCPU is loaded",
            "1 vCPU, 1 page, store 1, 1 write from outside, 1 collection and the last",
            _outside,
        ),
        Case(
            "tracking",
            "a page becomes write-tracked",
            "2 vCPUs, 1 page, stores 2 + 2, 1 add, no logging",
            _tracking(((0, 0), (0, 0)), remove=False),
        ),
        Case(
            "tracking-removed",
            "a page becomes write-tracked, and is not any more",
            "2 vCPUs, 1 page, stores 2 + 2, 1 add and its removal, no logging",
            _tracking(((0, 0), (0, 0)), remove=True),
        ),
        Case(
            "tracking-logging",
            "a page becomes write-tracked while GET_DIRTY_LOG collects",
            "2 vCPUs, 1 page, stores 1 + 1, 1 add, 1 collection and the last",
            _tracking_while_logging(((0,), (0,)), 1, remove=False),
        ),
        Case(
            "removal",
            "the slot is deleted under page faults",
            "2 vCPUs, 1 page, stores 2 + 1, 1 deletion",
            _removal(((0, 0), (0,))),
        ),
        Case(
            "tdp-bitmap",
            "GET_DIRTY_LOG, and faults that share mmu_lock (TDP MMU)",
            "2 vCPUs, 1 page, stores 2 + 1, 1 collection and the last",
            _bitmap(((0, 0), (0,)), 1, tdp_mmu=True),
        ),
        Case(
            "tdp-ring",
            "two dirty rings, and faults that share mmu_lock (TDP MMU)",
            "2 vCPUs, 1 page, stores 1 + 1, rings of 2 entries, 1 collection and the last",
            _ring(((0,), (0,)), 1, 2, tdp_mmu=True),
        ),
        Case(
            "tdp-tracking",
            "a page becomes write-tracked and is not any more; faults share mmu_lock (TDP MMU)",
            "2 vCPUs, 1 page, stores 2 + 1, 1 add and its removal, no logging",
            _tracking(((0, 0), (0,)), remove=True, tdp_mmu=True),
        ),
        Case(
            "tdp-removal",
            "the slot is deleted under faults that share mmu_lock (TDP MMU)",
            "2 vCPUs, 1 page, stores 2 + 1, 1 deletion",
            _removal(((0, 0), (0,)), tdp_mmu=True),
        ),
        Case(
            "unsync",
            "a guest page table is written while it is synchronized",
            "2 vCPUs, 1 table with 1 entry, each writes, flushes, uses it once",
            _unsync((_UNSYNC, _UNSYNC)),
        ),
        Case(
            "shadow-remap",
            "shadow paging: X leads to another gfn, which gets the page frame of the first",
            "2 vCPUs, 2 gfns, stores 1 + 3, 2 changes of the gPTE, 1 collection and the last",
            _shadow(
                "X leads to gfn 0 in frame 7, SPTE protected (W=0), gfn 1 has no frame",
                (7, NO_FRAME),
                (("store",), _REMAP),
                ("swap out", "reuse"),
            ),
        ),
        Case(
            "shadow-alias",
            "shadow paging: X leads to another gfn with the same page frame (two slots, one memory)",
            "2 vCPUs, 2 gfns, stores 1 + 1, 1 change of the gPTE, 1 collection and the last",
            _shadow(
                "X leads to gfn 0, gfns 0 and 1 are both in frame 7, SPTE protected (W=0)",
                (7, 7),
                (("store",), ("lead to 1", "flush", "store")),
            ),
        ),
        Case(
            "shadow-forbid",
            "shadow paging: the guest forbids writes to X",
            "2 vCPUs, 1 gfn, stores 1 + 1, 1 change of the gPTE, 1 collection and the last",
            _shadow(
                "X leads to gfn 0 in frame 7, SPTE protected (W=0)",
                (7,),
                (("store",), ("forbid", "flush", "store")),
            ),
        ),
        Case(
            "shadow-table",
            "shadow paging: the gfn becomes a page table that KVM shadows",
            "2 vCPUs, 1 gfn, stores 1 + 1, 1 account_shadowed, 1 collection and the last",
            _shadow(
                "X leads to gfn 0 in frame 7, SPTE protected (W=0)",
                (7,),
                (("store",), ("store",)),
                ("shadow",),
            ),
        ),
        Case(
            "shadow-clean",
            "shadow paging: the guest's D flag is clear",
            "2 vCPUs, 1 gfn, stores 1 + 1, 1 collection and the last",
            _shadow(
                "X leads to gfn 0 in frame 7, D of the gPTE is clear, SPTE read-only (W=0)",
                (7,),
                (("store",), ("store",)),
                dirty=False,
            ),
        ),
        Case(
            "bitmap-large",
            "GET_DIRTY_LOG, two pages, two vCPUs, two collections",
            "2 vCPUs, 2 pages, stores 2 + 2, 2 collections and the last",
            _bitmap(((0, 1), (1, 0)), 2),
            large=True,
        ),
        Case(
            "bitmap-vcpus",
            "GET_DIRTY_LOG and three vCPUs",
            "3 vCPUs, 1 page, stores 2 + 1 + 1, 2 collections and the last",
            _bitmap(((0, 0), (0,), (0,)), 2),
            large=True,
        ),
        Case(
            "manual-large",
            "manual protect, two collections",
            "2 vCPUs, 2 pages, stores 2 + 2, 2 collections and the last",
            _bitmap(((0, 1), (1, 0)), 2, manual=True),
            large=True,
        ),
        Case(
            "ring-large",
            "two dirty rings, more stores",
            "2 vCPUs, 2 pages, stores 2 + 2, rings of 2 entries, 1 collection and the last",
            _ring(((0, 1), (1, 0)), 1, 2),
            large=True,
        ),
        Case(
            "ring-rounds",
            "two dirty rings, two collections",
            "2 vCPUs, 2 pages, stores 1 + 1, rings of 2 entries, 2 collections and the last",
            _ring(((0,), (1,)), 2, 2),
            large=True,
        ),
        Case(
            "ring-full-large",
            "two dirty rings that are full after each push, two collections",
            "2 vCPUs, 2 pages, stores 2 + 1, rings of 1 entry, 2 collections and the last",
            _ring(((0, 1), (1,)), 2, 1),
            large=True,
        ),
        Case(
            "pml-large",
            "Intel PML, two pages, two collections",
            "2 vCPUs, 2 pages, stores 2 + 2, 2 collections and the last",
            _bitmap(((0, 1), (1, 0)), 2, pml=True),
            large=True,
        ),
        Case(
            "tracking-vcpus",
            "a page becomes write-tracked and is not any more, three vCPUs",
            "3 vCPUs, 1 page, stores 2 + 1 + 1, 1 add and its removal, no logging",
            _tracking(((0, 0), (0,), (0,)), remove=True),
            large=True,
        ),
        Case(
            "tracking-logging-large",
            "a page becomes write-tracked and is not any more while GET_DIRTY_LOG collects",
            "2 vCPUs, 1 page, stores 2 + 1, 1 add and its removal, 1 collection and the last",
            _tracking_while_logging(((0, 0), (0,)), 1, remove=True),
            large=True,
        ),
        Case(
            "removal-vcpus",
            "the slot is deleted, three vCPUs",
            "3 vCPUs, 1 page, stores 2 + 1 + 1, 1 deletion",
            _removal(((0, 0), (0,), (0,))),
            large=True,
        ),
        Case(
            "removal-pages",
            "a slot of two pages is deleted",
            "2 vCPUs, 2 pages, stores 2 + 2, 1 deletion",
            _removal(((0, 1), (1, 0))),
            large=True,
        ),
        Case(
            "tdp-bitmap-large",
            "GET_DIRTY_LOG, two pages, and faults that share mmu_lock (TDP MMU)",
            "2 vCPUs, 2 pages, stores 2 + 2, 1 collection and the last",
            _bitmap(((0, 1), (1, 0)), 1, tdp_mmu=True),
            large=True,
        ),
        Case(
            "tdp-removal-vcpus",
            "the slot is deleted under three vCPUs whose faults share mmu_lock (TDP MMU)",
            "3 vCPUs, 1 page, stores 2 + 1 + 1, 1 deletion",
            _removal(((0, 0), (0,), (0,)), tdp_mmu=True),
            large=True,
        ),
        Case(
            "unsync-vcpus",
            "a guest page table, three vCPUs",
            "3 vCPUs, 1 table with 1 entry, each writes, flushes, uses it once",
            _unsync((_UNSYNC,) * 3),
            large=True,
        ),
    )
}
