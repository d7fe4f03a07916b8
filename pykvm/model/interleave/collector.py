"""Userspace that collects: GET_DIRTY_LOG, manual GET and CLEAR, or the rings; then reads contents.

A collector goes through the phases of one collection, a few times while the vCPUs run.  Then it takes them
out of KVM_RUN, collects for the last time and compares what it copied with what memory holds: the last
step of a live migration.  A phase is one atomic step per page, vCPU or ring entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pykvm.model.interleave.explorer import Actor, BrokenProperty, Record, Step
from pykvm.model.interleave.rules import Rules
from pykvm.model.interleave.state import (
    DIRTY,
    FREE,
    HARVESTED,
    Entry,
    Mode,
    Vm,
    pages_of,
    put,
    words,
)

_BEGINNINGS = (("kick",), ("xchg",), ("get",), ("harvest",), ("pause",), ("idle",))


@dataclass
class CollectorFrame(Record):
    """``todo`` are the phases to come; the masks are bits by gfn, ``left`` those of the running phase."""

    todo: tuple[str, ...]
    mask: int = 0  # pages of this collection
    armed: int = 0  # pages whose bits were cleared: they are to be protected
    left: int = 0
    cursor: int = 0  # vCPU that is flushed, or whose ring is looked at
    early: int = -1  # payload that was read before its flag
    taken: bool = False  # the entry's flag was seen
    fetched: tuple[int, ...] = ()  # by vCPU: entries harvested


class Collector(Actor[Vm, CollectorFrame]):
    """``order`` are the phases of one collection; ``rounds`` of them run beside the vCPUs."""

    def __init__(self, name: str, order: Sequence[str], rounds: int, vcpus: int, rules: Rules) -> None:
        last = ("pause", *order) if rules.pause else ("idle", *order)
        super().__init__(
            name, CollectorFrame((*tuple(order) * rounds, *last, "compare"), fetched=(0,) * vcpus)
        )
        self._rules = rules
        self._phases: dict[str, tuple[Step[Vm, CollectorFrame], ...]] = {
            "kick": (self._kick,),
            "xchg": (self._xchg,),
            "get": (self._get,),
            "clear": (self._clear,),
            "harvest": (self._harvest,),
            "reset": (self._reset,),
            "protect": (self._protect,),
            "flush": (self._flush,),
            "return": (self._return,),
            "read": (self._read,),
            "pause": (self._pause,),
            "idle": (self._idle,),
            "compare": (self._compare,),
        }
        if not rules.acquire:
            self._phases["harvest"] = (self._harvest, self._payload_early)

    def steps(self, frame: CollectorFrame) -> Sequence[Step[Vm, CollectorFrame]]:
        return self._phases[frame.todo[0]] if frame.todo else ()

    @staticmethod
    def _next(me: CollectorFrame) -> None:
        me.todo = me.todo[1:]
        me.left = me.cursor = 0
        if me.todo[:1] in _BEGINNINGS:
            me.mask = me.armed = 0

    # --- the bitmap (kvm-mmu.md 3.2) ----------------------------------------------------------------

    def _kick(self, vm: Vm, me: CollectorFrame) -> str:
        """PML only: whoever is in the guest leaves it; the flush of its buffer is its own next step."""
        self._next(me)
        vm.mode = tuple(Mode.HOST if mode is Mode.GUEST else mode for mode in vm.mode)
        return "kicks all vCPUs: they leave the guest"

    def _xchg(self, vm: Vm, me: CollectorFrame) -> str | None:
        """The word is exchanged under mmu_lock, which is kept until its pages are protected."""
        holds = self._rules.protect_locks and "protect" in me.todo and bool(vm.bitmap)
        if vm.mmu_lock or (self._rules.protect_locks and vm.sharers):
            return None
        me.mask = me.armed = vm.bitmap
        vm.bitmap = 0
        self._next(me)
        did = f"exchanges the word with 0: {words(pages_of(me.mask))}"
        if not me.mask:
            self._skip(me, "protect", "flush", "return", "read")
        if not holds:
            return did
        vm.lock(self.name)
        return f"takes mmu_lock, {did}"

    def _get(self, vm: Vm, me: CollectorFrame) -> str:
        me.mask = vm.bitmap
        self._next(me)
        if not me.mask:
            self._skip(me, "clear", "protect", "flush", "read")
        return f"KVM_GET_DIRTY_LOG copies the bitmap: {words(pages_of(me.mask))}"

    def _clear(self, vm: Vm, me: CollectorFrame) -> str | None:
        if not vm.lock(self.name):
            return None
        me.armed = vm.bitmap & me.mask if self._rules.clear_only_what_was_read else vm.bitmap
        vm.bitmap &= ~me.armed
        self._next(me)
        return f"takes mmu_lock, clears {words(pages_of(me.armed))}"

    @staticmethod
    def _skip(me: CollectorFrame, *phases: str) -> None:
        """Nothing was collected, so the rest of this collection has nothing to do."""
        while me.todo and me.todo[0] in phases:
            me.todo = me.todo[1:]

    # --- the rings (kvm-mmu.md 4.1, 4.5) --------------------------------------------------------------

    def _harvest(self, vm: Vm, me: CollectorFrame) -> str | None:
        """Flag, payload, release of the entry, in three steps; then the next entry, or the next ring."""
        vcpu = me.cursor
        at = me.fetched[vcpu] % len(vm.rings[vcpu])
        entry = vm.rings[vcpu][at]
        where = f"ring of vCPU {vcpu}, entry {at}"
        if not me.taken:
            if not entry.flags & DIRTY or entry.flags & HARVESTED:
                me.early = -1
                me.cursor += 1
                if me.cursor == len(vm.rings):
                    self._next(me)
                    if not me.mask:
                        self._skip(me, "reset", "protect", "flush", "read")
                return f"{where}: not DIRTY, ends there"
            me.taken, me.left = True, 0
            return f"{where}: reads flags, DIRTY"
        return self._take(vm, me, where, at, entry)

    def _take(self, vm: Vm, me: CollectorFrame, where: str, at: int, entry: Entry) -> str:
        part = self._rules.harvest_order[me.left]
        me.left += 1
        if part == "payload":
            gfn = entry.gfn if me.early < 0 else me.early
            did = f"{where}: {'reads page' if me.early < 0 else 'uses page'} {gfn}"
            me.mask |= 1 << gfn
        else:
            vm.rings = put(vm.rings, me.cursor, put(vm.rings[me.cursor], at, entry._replace(flags=HARVESTED)))
            did = f"{where}: flags = HARVESTED"
        if me.left == len(self._rules.harvest_order):
            me.fetched = put(me.fetched, me.cursor, me.fetched[me.cursor] + 1)
            me.taken, me.left, me.early = False, 0, -1
        return did

    def _payload_early(self, vm: Vm, me: CollectorFrame) -> str | None:
        """Without acquire the load of the payload may come before that of the flag."""
        if me.taken or me.early >= 0:
            return None
        at = me.fetched[me.cursor] % len(vm.rings[me.cursor])
        me.early = vm.rings[me.cursor][at].gfn
        return f"ring of vCPU {me.cursor}, entry {at}: reads page {me.early}, ahead of the flags"

    def _reset(self, vm: Vm, me: CollectorFrame) -> str:
        """KVM_RESET_DIRTY_RINGS takes harvested entries back, one a step.

        Nobody but this actor sets HARVESTED, so looking whether there is another one is no step.
        """
        vcpu, at = self._harvested(vm) or (0, 0)
        entry = vm.rings[vcpu][at]
        vm.rings = put(vm.rings, vcpu, put(vm.rings[vcpu], at, entry._replace(flags=FREE)))
        vm.reset = put(vm.reset, vcpu, vm.reset[vcpu] + 1)
        me.armed |= 1 << entry.gfn
        if self._harvested(vm) is None:
            self._next(me)
        return f"RESET, ring of vCPU {vcpu}, entry {at}: takes page {entry.gfn} back, flags = 0"

    @staticmethod
    def _harvested(vm: Vm) -> tuple[int, int] | None:
        """Ring and entry that RESET takes next."""
        for vcpu, ring in enumerate(vm.rings):
            at = vm.reset[vcpu] % len(ring)
            if ring[at].flags == HARVESTED:
                return vcpu, at
        return None

    # --- what all have in common ----------------------------------------------------------------------

    def _protect(self, vm: Vm, me: CollectorFrame) -> str | None:
        """Re-arm one page: W (under PML: D) is cleared, MMU-writable stays; under mmu_lock."""
        locks = self._rules.protect_locks
        did = "takes mmu_lock, " if locks and not vm.mmu_lock else ""
        if locks and not vm.lock(self.name):
            return None
        me.left = me.left or me.armed
        if me.left:
            gfn = pages_of(me.left)[0]
            me.left &= ~(1 << gfn)
            spte = vm.spte[gfn]
            change = {"dirty": False} if vm.pml else {"writable": False, "dirty": False}
            vm.set_spte(gfn, spte._replace(**change))
            did += f"clears {'D' if vm.pml else 'W'} in SPTE {gfn}"
        if not me.left:
            self._next(me)
            if locks:
                vm.mmu_lock = ""
                did += ", releases mmu_lock"
        return did

    def _flush(self, vm: Vm, me: CollectorFrame) -> str:
        vm.flush(me.cursor)
        did = f"flushes the TLB of vCPU {me.cursor}"
        me.cursor += 1
        if me.cursor == len(vm.mode):
            self._next(me)
        return did

    def _return(self, vm: Vm, me: CollectorFrame) -> str:
        """Only where the order is in question: otherwise the return is part of the first copy."""
        self._next(me)
        return f"returns the bitmap to userspace: {words(pages_of(me.mask))}"

    def _read(self, vm: Vm, me: CollectorFrame) -> str:
        """Userspace copies the contents of one page."""
        if not me.left:
            me.left = me.mask
        if not me.left:
            self._next(me)
            return "has nothing to copy"
        gfn = pages_of(me.left)[0]
        me.left &= ~(1 << gfn)
        vm.copied = put(vm.copied, gfn, vm.memory[gfn])
        if not me.left:
            self._next(me)
        return f"copies page {gfn}: contents {vm.memory[gfn]}"

    def _pause(self, vm: Vm, me: CollectorFrame) -> str | None:
        """KVM_RUN returns on every vCPU: what it had begun is done, and its PML buffer is empty."""
        waits = self._rules.pause_waits
        if waits and (any(mode is Mode.HOST for mode in vm.mode) or vm.outside):
            return None
        did = "pauses all vCPUs" + (": KVM_RUN has returned" if waits else ", does not wait for them")
        vm.mode = tuple(Mode.USER if mode is Mode.GUEST else mode for mode in vm.mode)
        vm.paused = True
        for vcpu in vm.vcpus:
            if vm.pml and vm.pml[vcpu]:
                did += f", vCPU {vcpu} flushed {words(vm.pml[vcpu])} from its PML buffer"
                for gfn in vm.pml[vcpu]:
                    vm.mark(gfn, did)
                vm.pml = put(vm.pml, vcpu, ())
        self._next(me)
        return did

    def _idle(self, vm: Vm, me: CollectorFrame) -> str | None:
        """The guest writes no more, but its vCPUs stay where they are."""
        if any(mode is Mode.HOST for mode in vm.mode) or vm.outside:
            return None
        vm.quiet = True
        self._next(me)
        return "waits until the guest writes no more; the vCPUs stay in KVM_RUN"

    def _compare(self, vm: Vm, me: CollectorFrame) -> str:
        """The end of the last collection: every page must have the contents that were copied."""
        did = "compares its copy with memory"
        for gfn in vm.pages:
            if vm.copied[gfn] != vm.memory[gfn]:
                raise BrokenProperty(
                    did,
                    f"page {gfn} has contents {vm.memory[gfn]}, the copy has {vm.copied[gfn]}, "
                    "and no collection is left: a lost write",
                )
        self._next(me)
        return f"{did}: they are equal"
