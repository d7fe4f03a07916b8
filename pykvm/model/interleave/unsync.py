"""A guest page table that is written while other vCPUs synchronize its shadow (kvm-mmu.md 10.5).

One page table of the guest with one entry that matters, the gPTE; KVM's shadow page of it with one SPTE.
Values are versions: the gPTE counts how often it was written, the SPTE holds the version that it was built
from.  Each vCPU writes the gPTE, flushes its TLB as a guest must, and uses the translation.  It may then
meet any version that the gPTE has had since its flush began, and no older one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pykvm.model.interleave.explorer import Actor, BrokenProperty, Record, Start, Step
from pykvm.model.interleave.rules import Rules
from pykvm.model.interleave.state import put


@dataclass
class Table(Record):
    """``writable`` is W of the SPTE that maps the table's page; tuples are indexed by vCPU."""

    cached: tuple[bool, ...]  # a writable translation of the table's page
    oldest: tuple[int, ...]  # the version of the gPTE when the vCPU's last flush began
    gpte: int = 0
    spte: int = 0
    writable: bool = False
    unsync: bool = False  # as the root tells: unsync_children
    mmu_lock: str = ""


@dataclass
class WriterFrame(Record):
    """``program`` is what the guest does next, ``todo`` what the host does for it."""

    program: tuple[str, ...]
    todo: tuple[str, ...] = ()


class Writer(Actor[Table, WriterFrame]):
    """A vCPU whose guest goes through ``program``: write, flush, use."""

    def __init__(self, number: int, program: tuple[str, ...], rules: Rules) -> None:
        super().__init__(f"vCPU {number}", WriterFrame(program))
        self._number = number
        self._rules = rules
        self._table: dict[str, tuple[Step[Table, WriterFrame], ...]] = {
            "write": (self._write,),
            "flush": (self._flush,),
            "use": (self._use,),
            "fault": (self._fault,),
            "unsync": (self._unsync,),
            "writable": (self._writable,),
            "check": (self._check,),
            "lock": (self._lock,),
            "protect": (self._protect,),
            "flush all": (self._flush_all,),
            "copy": (self._copy,),
            "clear": (self._clear,),
        }

    def steps(self, frame: WriterFrame) -> Sequence[Step[Table, WriterFrame]]:
        label = (*frame.todo, *frame.program, "")[0]
        return self._table[label] if label else ()

    # --- the guest ---------------------------------------------------------------------------------

    def _write(self, vm: Table, me: WriterFrame) -> str:
        if vm.cached[self._number]:
            vm.gpte += 1
            me.program = me.program[1:]
            return f"guest writes the gPTE: version {vm.gpte}"
        if vm.writable:
            vm.cached = put(vm.cached, self._number, True)
            return "walks: the table's page has W=1, caches it"
        me.todo = ("fault",)
        return "walks for a store to the gPTE: the table's page has W=0, exits"

    def _flush(self, vm: Table, me: WriterFrame) -> str:
        vm.oldest = put(vm.oldest, self._number, vm.gpte)
        vm.cached = put(vm.cached, self._number, False)
        me.program = me.program[1:]
        me.todo = ("check",)
        return "guest flushes its TLB with MOV to CR3, exits"

    def _use(self, vm: Table, me: WriterFrame) -> str:
        me.program = me.program[1:]
        did = f"guest uses the translation: the SPTE has version {vm.spte}"
        if vm.spte < vm.oldest[self._number]:
            raise BrokenProperty(
                did,
                f"the gPTE had version {vm.oldest[self._number]} before the guest flushed, "
                "and the guest still reaches the old page",
            )
        return did

    # --- a write fault on the table's page ------------------------------------------------------------

    def _fault(self, vm: Table, me: WriterFrame) -> str | None:
        if vm.mmu_lock:
            return None
        if vm.writable:
            me.todo = ()
            return "page fault: W=1 by now, enters the guest"
        vm.mmu_lock = self.name
        me.todo = self._rules.unsync_order
        return "page fault on the table's page: takes mmu_lock"

    def _unsync(self, vm: Table, me: WriterFrame) -> str:
        vm.unsync = True
        return f"sets unsync, up to the root{self._done(vm, me)}"

    def _writable(self, vm: Table, me: WriterFrame) -> str:
        vm.writable = True
        return f"sets W=1 in the SPTE of the table's page{self._done(vm, me)}"

    def _done(self, vm: Table, me: WriterFrame) -> str:
        me.todo = me.todo[1:]
        if me.todo:
            return ""
        vm.mmu_lock = ""
        return ", releases mmu_lock"

    # --- the sync at a flush -----------------------------------------------------------------------------

    def _check(self, vm: Table, me: WriterFrame) -> str:
        if not vm.unsync:
            me.todo = ()
            return "sync: reads unsync without mmu_lock, not set: nothing to do"
        me.todo = ("lock",)
        return "sync: reads unsync without mmu_lock, set"

    def _lock(self, vm: Table, me: WriterFrame) -> str | None:
        if vm.mmu_lock:
            return None
        if not vm.unsync:
            me.todo = ()
            return "sync: under mmu_lock nothing is unsync any more"
        vm.mmu_lock = self.name
        me.todo = tuple("flush all" if part == "flush" else part for part in self._rules.sync_order)
        return "sync: takes mmu_lock"

    def _protect(self, vm: Table, me: WriterFrame) -> str:
        vm.writable = False
        return f"sync: clears W in the SPTE of the table's page{self._done(vm, me)}"

    def _flush_all(self, vm: Table, me: WriterFrame) -> str:
        vm.cached = (False,) * len(vm.cached)
        return f"sync: flushes the TLBs of all vCPUs{self._done(vm, me)}"

    def _copy(self, vm: Table, me: WriterFrame) -> str:
        vm.spte = vm.gpte
        return f"sync: builds the SPTE from the gPTE, version {vm.spte}{self._done(vm, me)}"

    def _clear(self, vm: Table, me: WriterFrame) -> str:
        vm.unsync = False
        return f"sync: clears unsync{self._done(vm, me)}"


def start(vcpus: int) -> list[Start[Table]]:
    """The shadow page is in step and protected, or unsync already."""
    synced = Table(cached=(False,) * vcpus, oldest=(0,) * vcpus)
    unsync = synced.copy()
    unsync.writable = unsync.unsync = True
    return [
        Start("the table's page is protected and in step", synced),
        Start("the table's page is unsync (W=1)", unsync),
    ]
