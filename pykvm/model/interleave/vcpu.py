"""A vCPU: stores through its TLB, and what KVM does about the fault when one does not get through.

Every method that takes ``(vm, me)`` is one atomic step.  The hardware checks its TLB entry and writes
memory in one step; a walk that caches a translation is another one, so anything may come in between.
Between two steps of the host's part other actors run, as they do on other CPUs.  Leaving the guest and
entering it again are part of the neighbouring step: nobody waits for more than their outcome.

A vCPU whose fault ends in RET_PF_RETRY because the slot is INVALID would fault again and again until the
memslots change; it waits for that instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pykvm.model.interleave.explorer import Actor, BrokenProperty, Record, Step
from pykvm.model.interleave.rules import Rules
from pykvm.model.interleave.state import (
    DIRTY,
    NO_SPTE,
    READ_ONLY,
    WRITABLE,
    Mode,
    Slot,
    Spte,
    Vm,
    put,
)


@dataclass
class VcpuFrame(Record):
    """``stores`` are the pages still to be written, in order; ``todo`` the host's next steps."""

    stores: tuple[int, ...]
    todo: tuple[str, ...] = ()
    old: Spte = NO_SPTE
    slot: Slot = Slot.VALID
    retried: int = -1  # memslots at the last RET_PF_RETRY

    @property
    def gfn(self) -> int:
        """The page of the store that is under way."""
        return self.stores[0]


class Vcpu(Actor[Vm, VcpuFrame]):
    """``soft_limit``: entries of the ring in use at which the vCPU is not let into the guest.

    ``tdp_mmu``: slow faults share mmu_lock and settle their races by the SPTE (kvm-mmu.md 11.1).
    """

    def __init__(
        self,
        number: int,
        stores: tuple[int, ...],
        rules: Rules,
        soft_limit: int = 0,
        *,
        tdp_mmu: bool = False,
    ) -> None:
        super().__init__(f"vCPU {number}", VcpuFrame(stores))
        self._number = number
        self._rules = rules
        self._soft_limit = soft_limit
        self._tdp_mmu = tdp_mmu
        self._host: dict[str, tuple[Step[Vm, VcpuFrame], ...]] = {
            "pml": (self._flush_pml,),
            "fault": (self._fault,),
            "read": (self._read_spte,),
            "cmpxchg": (self._compare_and_exchange,),
            "bitmap": (self._mark_bitmap,),
            "payload": (self._push_payload,),
            "flag": (self._push_flag,),
            "slow": (self._slow,),
            "install": (self._install,),
            "emulate": (self._emulate,),
            "notify": (self._notify,),
            "full": (self._full,),
        }
        self._guest: tuple[Step[Vm, VcpuFrame], ...] = (self._run,)

    def steps(self, frame: VcpuFrame) -> Sequence[Step[Vm, VcpuFrame]]:
        return self._host[frame.todo[0]] if frame.todo else self._guest

    def may_wait(self, frame: VcpuFrame) -> bool:
        return frame.todo in ((), ("full",))

    # --- in the guest ---------------------------------------------------------------------------

    def _run(self, vm: Vm, me: VcpuFrame) -> str | None:
        """The next store, as far as it gets by itself; or the way out and back when it was kicked."""
        mode = vm.mode[self._number]
        if mode is Mode.HOST:
            return self._kicked(vm, me)
        if mode is Mode.USER or vm.quiet or not me.stores:
            return None
        if vm.tlb[self._number][me.gfn]:
            return self._store(vm, me)
        spte = vm.spte[me.gfn]
        if spte.writable:
            return self._walk(vm, me, spte)
        if vm.slot is Slot.INVALID and me.retried == vm.memslots:
            return None
        return self._exit(vm, me)

    def _store(self, vm: Vm, me: VcpuFrame) -> str:
        gfn = me.gfn
        vm.memory = put(vm.memory, gfn, vm.memory[gfn] + 1)
        me.stores = me.stores[1:]
        did = f"stores to page {gfn} through its TLB"
        if vm.promised[gfn]:
            raise BrokenProperty(did, f"page {gfn} is tracked, and the tracker is not told of the store")
        vm.check_slot(did, "the memory")
        return did

    def _walk(self, vm: Vm, me: VcpuFrame, spte: Spte) -> str:
        gfn, number = me.gfn, self._number
        vm.cache(number, gfn, True)
        if vm.pml and not spte.dirty:
            vm.set_spte(gfn, spte._replace(dirty=True))
            vm.pml = put(vm.pml, number, (*vm.pml[number], gfn))
            return (
                f"walks: SPTE {gfn} has W=1 D=0, so it sets D, logs page {gfn} to its PML buffer, caches it"
            )
        return f"walks: SPTE {gfn} has W=1, caches it"

    def _exit(self, vm: Vm, me: VcpuFrame) -> str:
        vm.cache(self._number, me.gfn, False)
        vm.set_mode(self._number, Mode.HOST)
        vm.readers = put(vm.readers, self._number, vm.memslots)
        spte = vm.spte[me.gfn]
        me.todo = ("pml", "fault") if vm.pml and vm.pml[self._number] else ("fault",)
        return f"walks for a store: SPTE {me.gfn} {'has W=0' if spte.present else 'is not present'}, exits"

    def _kicked(self, vm: Vm, me: VcpuFrame) -> str:
        if vm.pml and vm.pml[self._number]:
            return self._flush_pml(vm, me)
        self._enter(vm, me)
        return "enters the guest again"

    def _enter(self, vm: Vm, me: VcpuFrame) -> str:
        """Into the guest, or to userspace if the ring is full; ends the last step of the host's part."""
        vm.readers = put(vm.readers, self._number, None)
        me.todo = ()
        me.old, me.slot = NO_SPTE, Slot.VALID
        if vm.paused:
            vm.set_mode(self._number, Mode.USER)
            return "; leaves KVM_RUN"
        if vm.rings and self._rules.full_check and self._used(vm) >= self._soft_limit:
            vm.set_mode(self._number, Mode.USER)
            me.todo = ("full",)
            return "; its ring is full: KVM_EXIT_DIRTY_RING_FULL"
        vm.set_mode(self._number, Mode.GUEST)
        return "; enters the guest"

    def _full(self, vm: Vm, me: VcpuFrame) -> str | None:
        if vm.paused or self._used(vm) >= self._soft_limit:
            return None
        vm.set_mode(self._number, Mode.GUEST)
        me.todo = ()
        return "runs again: its ring has room"

    def _flush_pml(self, vm: Vm, me: VcpuFrame) -> str:
        """One entry of the buffer; the first step of every exit, before the exit is handled."""
        gfn, *rest = vm.pml[self._number]
        vm.pml = put(vm.pml, self._number, tuple(rest))
        did = f"flushes its PML buffer: marks page {gfn}"
        vm.mark(gfn, did)
        if me.todo and not rest:
            me.todo = me.todo[1:]
        return did

    # --- a page fault, direct MMU (kvm-mmu.md 7.2) ------------------------------------------------

    def _fault(self, vm: Vm, me: VcpuFrame) -> str:
        """The slot is looked up and the track count read, both without mmu_lock."""
        gfn, me.slot = me.gfn, vm.slot
        if vm.slot in (Slot.ABSENT, Slot.FREED):
            me.stores = me.stores[1:]
            return f"page fault: no slot has page {gfn}, the store becomes an MMIO exit{self._enter(vm, me)}"
        me.todo = ("read",)
        if not self._rules.fault_looks_at_tracking:
            return f"page fault on page {gfn}"
        if not (vm.tracked[gfn] and vm.spte[gfn].present):
            return f"page fault: page {gfn} is not tracked"
        me.todo = self._emulation()
        return f"page fault: page {gfn} is tracked, the store is emulated"

    def _emulation(self) -> tuple[str, ...]:
        return ("emulate", "mark", "notify")

    def _marks(self, vm: Vm) -> tuple[str, ...]:
        """The steps of one mark_page_dirty_in_slot, none without logging."""
        if not vm.logging:
            return ()
        return self._rules.push_order if vm.rings else ("bitmap",)

    def _then(self, vm: Vm, me: VcpuFrame, did: str) -> str:
        """Go on with what is to do; into the guest if that was all."""
        if me.todo and me.todo[0] == "mark":
            me.todo = (*self._marks(vm), *me.todo[1:])
        return did if me.todo else did + self._enter(vm, me)

    def _read_spte(self, vm: Vm, me: VcpuFrame) -> str:
        gfn = me.gfn
        spte = vm.spte[gfn]
        did = f"fast page fault: reads SPTE {gfn}"
        if not spte.present:
            me.todo = ("slow",)
            return f"{did}, not present: takes the slow path"
        if spte.writable:
            return f"{did}, W=1 by now: spurious{self._enter(vm, me)}"
        if not spte.mmu_writable and self._rules.fast_needs_mmu_writable:
            me.todo = ("slow",)
            return f"{did}, MMU-writable=0: takes the slow path"
        me.old = spte
        me.todo = self._rules.fast_order
        return self._then(vm, me, f"{did}, W=0 MMU-writable={int(spte.mmu_writable)}")

    def _compare_and_exchange(self, vm: Vm, me: VcpuFrame) -> str:
        gfn = me.gfn
        if self._rules.fast_compares and vm.spte[gfn] != me.old:
            me.todo = ("read",)
            return f"fast page fault: SPTE {gfn} has changed, tries again"
        how = "compare-and-exchange" if self._rules.fast_compares else "plain store"
        vm.set_spte(gfn, me.old._replace(writable=True))
        me.todo = me.todo[1:]
        return self._then(vm, me, f"fast page fault: {how} sets W=1 in SPTE {gfn}")

    def _slow(self, vm: Vm, me: VcpuFrame) -> str | None:
        """mmu_lock is taken; make_spte decides."""
        gfn = me.gfn
        if me.slot is Slot.INVALID:
            me.retried = vm.memslots
            return f"slow page fault: the slot is INVALID, RET_PF_RETRY{self._enter(vm, me)}"
        if vm.mmu_lock or (vm.sharers and not self._tdp_mmu):
            return None
        did = f"slow page fault: takes mmu_lock{' for reading' if self._tdp_mmu else ''}"
        spte = vm.spte[gfn]
        if vm.tracked[gfn] and self._rules.slow_rechecks_tracking:
            if not spte.present:
                vm.set_spte(gfn, READ_ONLY)
            me.todo = self._emulation()
            return f"{did}, page {gfn} is tracked: SPTE {gfn} stays W=0, the store is emulated"
        if self._tdp_mmu and spte.writable:
            return f"{did}, SPTE {gfn} has W=1 by now: spurious{self._enter(vm, me)}"
        if self._tdp_mmu:
            vm.sharers += 1
            me.old = spte
            did += f", reads SPTE {gfn}"
        else:
            vm.mmu_lock = self.name
        me.todo = ("mark", "install")
        return self._then(vm, me, did)

    def _install(self, vm: Vm, me: VcpuFrame) -> str:
        """The SPTE, compared and exchanged where others hold mmu_lock, too; then the lock is released."""
        gfn = me.gfn
        me.todo = ()
        did = f"slow page fault: installs SPTE {gfn} with W=1, releases mmu_lock"
        if self._tdp_mmu:
            vm.sharers -= 1
            if self._rules.slow_compares and vm.spte[gfn] != me.old:
                did = f"slow page fault: SPTE {gfn} has changed, RET_PF_RETRY, releases mmu_lock"
                return did + self._enter(vm, me)
        else:
            vm.mmu_lock = ""
        vm.set_spte(gfn, WRITABLE)
        vm.check_slot(did, "the rmap")
        return did + self._enter(vm, me)

    # --- emulation of a store to a tracked page (kvm-mmu.md 12.4) ---------------------------------

    def _emulate(self, vm: Vm, me: VcpuFrame) -> str:
        gfn = me.gfn
        did = f"emulator: writes page {gfn}"
        vm.check_slot(did, "the memory")
        vm.memory = put(vm.memory, gfn, vm.memory[gfn] + 1)
        me.todo = me.todo[1:]
        return self._then(vm, me, did)

    def _notify(self, vm: Vm, me: VcpuFrame) -> str:
        gfn = me.gfn
        me.stores = me.stores[1:]
        return f"emulator: track_write for page {gfn}{self._enter(vm, me)}"

    # --- marks (kvm-mmu.md 3.2, 4.3) ---------------------------------------------------------------

    def _mark_bitmap(self, vm: Vm, me: VcpuFrame) -> str:
        did = f"marks page {me.gfn} in the bitmap"
        vm.mark(me.gfn, did)
        me.todo = me.todo[1:]
        return self._then(vm, me, did)

    def _push_payload(self, vm: Vm, me: VcpuFrame) -> str:
        return self._push(vm, me, "payload", f"writes slot and offset, page {me.gfn}", gfn=me.gfn)

    def _push_flag(self, vm: Vm, me: VcpuFrame) -> str:
        return self._push(vm, me, "flag", "publishes it, flags = DIRTY", flags=DIRTY)

    def _push(self, vm: Vm, me: VcpuFrame, part: str, did: str, **change: int) -> str:
        """One of the two stores of a push; dirty_index, which is KVM's own, moves with the last."""
        number, at = self._number, self._at(vm)
        ring = vm.rings[number]
        vm.rings = put(vm.rings, number, put(ring, at, ring[at]._replace(**change)))
        if part == self._rules.push_order[-1]:
            vm.pushed = put(vm.pushed, number, vm.pushed[number] + 1)
        me.todo = me.todo[1:]
        return self._then(vm, me, f"ring entry {at}: {did}")

    def _at(self, vm: Vm) -> int:
        return vm.pushed[self._number] % len(vm.rings[self._number])

    def _used(self, vm: Vm) -> int:
        return vm.pushed[self._number] - vm.reset[self._number]
