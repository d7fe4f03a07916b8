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
from pykvm.model.interleave.state import NO_SPTE, WRITABLE, Vm
from pykvm.model.interleave.tracker import OutsideWriter, Remover, Tracker
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


def _vcpus(stores: Stores, rules: Rules, soft_limit: int = 0) -> list[Vcpu]:
    return [Vcpu(number, pages, rules, soft_limit) for number, pages in enumerate(stores)]


def _pages(stores: Stores) -> int:
    return 1 + max(gfn for pages in stores for gfn in pages)


def _bitmap(
    stores: Stores, rounds: int, *, manual: bool = False, pml: bool = False
) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        vm = Vm.create(_pages(stores), len(stores), pml=pml)
        order = rules.manual_order if manual else rules.get_order
        if not pml:
            order = tuple(phase for phase in order if phase != "kick")
        collector = Collector("CLEAR" if manual else "GET", order, rounds, len(stores), rules)
        return _starts(vm), [*_vcpus(stores, rules), collector]

    return build


def _ring(stores: Stores, rounds: int, size: int) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        vm = Vm.create(_pages(stores), len(stores), ring_size=size)
        collector = Collector("userspace", rules.ring_order, rounds, len(stores), rules)
        return (
            [Start("all pages protected (W=0), rings empty", vm)],
            [*_vcpus(stores, rules, soft_limit=size), collector],
        )

    return build


def _outside(rules: Rules, ring_size: int) -> World:
    vm = Vm.create(1, 1, ring_size=ring_size)
    order = rules.ring_order if ring_size else tuple(phase for phase in rules.get_order if phase != "kick")
    collector = Collector("userspace" if ring_size else "GET", order, 1, 1, rules)
    starts = [Start("all pages protected (W=0), rings empty", vm)] if ring_size else _starts(vm)
    return starts, [*_vcpus(((0,),), rules, ring_size), OutsideWriter(0, rules), collector]


def _untracked(vm: Vm) -> list[Start[Vm]]:
    """No logging; the page is mapped with W=1, or was protected when logging was still on."""
    vm.logging = False
    writable = vm.copy()
    for gfn in vm.pages:
        writable.set_spte(gfn, WRITABLE)
    return [
        Start("page 0 mapped with W=1", writable),
        Start("page 0 mapped with W=0, MMU-writable=1 (logging was on)", vm),
    ]


def _tracking(stores: Stores, *, remove: bool) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        starts = _untracked(Vm.create(_pages(stores), len(stores)))
        return starts, [*_vcpus(stores, rules), Tracker(0, rules, remove=remove)]

    return build


def _tracking_while_logging(stores: Stores, rounds: int, *, remove: bool) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        starts, actors = _bitmap(stores, rounds)(rules)
        return starts, [*actors, Tracker(0, rules, remove=remove)]

    return build


def _removal(stores: Stores) -> Callable[[Rules], World]:
    def build(rules: Rules) -> World:
        starts = _starts(Vm.create(_pages(stores), len(stores)))
        return starts, [*_vcpus(stores, rules), Remover(rules)]

    return build
