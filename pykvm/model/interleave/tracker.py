"""The other actors: write-tracking of a page, deletion of the slot, a write without a vCPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pykvm.model.interleave.explorer import Actor, Record, Step
from pykvm.model.interleave.rules import Rules
from pykvm.model.interleave.state import NO_SPTE, Slot, Vm, put


@dataclass
class PhaseFrame(Record):
    """``todo`` are the phases to come."""

    todo: tuple[str, ...]
    cursor: int = 0
    flush: bool = False


class Phases(Actor[Vm, PhaseFrame]):
    """An actor that goes through phases and ends; a phase whose step moves ``todo`` on is over."""

    phases: dict[str, tuple[Step[Vm, PhaseFrame], ...]]

    def steps(self, frame: PhaseFrame) -> Sequence[Step[Vm, PhaseFrame]]:
        return self.phases[frame.todo[0]] if frame.todo else ()

    def flush(self, vm: Vm, me: PhaseFrame) -> str:
        """One vCPU a step; under mmu_lock, which the last one releases if this actor holds it."""
        did = f"flushes the TLB of vCPU {me.cursor}"
        vm.flush(me.cursor)
        me.cursor += 1
        if me.cursor == len(vm.mode):
            me.todo, me.cursor = me.todo[1:], 0
            did += self.release(vm)
        return did

    def release(self, vm: Vm) -> str:
        """Give mmu_lock back if this actor has it."""
        if vm.mmu_lock != self.name:
            return ""
        vm.mmu_lock = ""
        return ", releases mmu_lock"


class Tracker(Phases):
    """kvm_write_track_add_gfn for one page; with ``remove`` its removal follows (kvm-mmu.md 9)."""

    def __init__(self, gfn: int, rules: Rules, *, remove: bool = False) -> None:
        super().__init__("tracker", PhaseFrame((*rules.track_order, *(("remove",) if remove else ()))))
        self._gfn = gfn
        self._rules = rules
        self.phases = {
            "count": (self._count,),
            "protect": (self._protect,),
            "flush": (self._flush,),
            "return": (self._return,),
            "remove": (self._remove,),
        }

    def _count(self, vm: Vm, me: PhaseFrame) -> str | None:
        if not vm.lock(self.name):
            return None
        vm.tracked = put(vm.tracked, self._gfn, vm.tracked[self._gfn] + 1)
        me.todo = me.todo[1:]
        did = f"add: takes mmu_lock, counts page {self._gfn} as tracked"
        return did + (self.release(vm) if me.todo[0] == "return" else "")

    def _protect(self, vm: Vm, me: PhaseFrame) -> str | None:
        if not vm.lock(self.name):
            return None
        gfn, rules = self._gfn, self._rules
        old = vm.spte[gfn]
        new = old._replace(writable=False, dirty=False)
        if rules.track_clears_mmu_writable:
            new = new._replace(mmu_writable=False)
        vm.set_spte(gfn, new)
        me.flush = old.mmu_writable if rules.track_flush_by_mmu_writable else old.writable
        did = f"add: clears {'W and MMU-writable' if rules.track_clears_mmu_writable else 'W'} in SPTE {gfn}"
        if old == new:
            did = f"add: finds SPTE {gfn} protected already"
        me.todo = me.todo[1:]
        if not me.flush:
            me.todo = tuple(phase for phase in me.todo if phase != "flush")
            did += ", no flush is due"
        if me.todo[0] == "return":
            did += self.release(vm)
        return did

    def _flush(self, vm: Vm, me: PhaseFrame) -> str:
        return "add: " + self.flush(vm, me)

    def _return(self, vm: Vm, me: PhaseFrame) -> str:
        vm.promised = put(vm.promised, self._gfn, True)
        me.todo = me.todo[1:]
        return f"add returns: from now on it is to be told of every store to page {self._gfn}"

    def _remove(self, vm: Vm, me: PhaseFrame) -> str | None:
        if vm.mmu_lock or vm.sharers:
            return None
        vm.promised = put(vm.promised, self._gfn, False)
        vm.tracked = put(vm.tracked, self._gfn, vm.tracked[self._gfn] - 1)
        me.todo = me.todo[1:]
        return f"remove: page {self._gfn} is tracked no more"


class Remover(Phases):
    """Deletion of the slot (kvm-mmu.md 2), its leaf SPTEs zapped one by one."""

    def __init__(self, rules: Rules) -> None:
        super().__init__("delete slot", PhaseFrame(rules.remove_order))
        self.phases = {
            "invalidate": (self._invalidate,),
            "wait": (self._wait,),
            "zap": (self._zap,),
            "flush": (self.flush,),
            "delete": (self._delete,),
            "free": (self._free,),
        }

    def _publish(self, vm: Vm, me: PhaseFrame, slot: Slot) -> None:
        vm.slot = slot
        vm.memslots += 1
        me.todo = me.todo[1:]

    def _invalidate(self, vm: Vm, me: PhaseFrame) -> str:
        self._publish(vm, me, Slot.INVALID)
        return "publishes the slot as INVALID"

    def _wait(self, vm: Vm, me: PhaseFrame) -> str | None:
        """synchronize_srcu: every read section that began before is over."""
        if any(since is not None and since < vm.memslots for since in vm.readers):
            return None
        me.todo = me.todo[1:]
        return "synchronize_srcu: no reader of the old memslots is left"

    def _zap(self, vm: Vm, me: PhaseFrame) -> str | None:
        did = "" if vm.mmu_lock else "takes mmu_lock, "
        if not vm.lock(self.name):
            return None
        vm.set_spte(me.cursor, NO_SPTE)
        did += f"zaps SPTE {me.cursor}"
        me.cursor += 1
        if me.cursor == len(vm.spte):
            me.todo, me.cursor = me.todo[1:], 0
            if me.todo[0] != "flush":
                did += self.release(vm)
        return did

    def _delete(self, vm: Vm, me: PhaseFrame) -> str:
        self._publish(vm, me, Slot.ABSENT)
        return "publishes memslots without the slot"

    def _free(self, vm: Vm, me: PhaseFrame) -> str:
        vm.slot = Slot.FREED
        me.todo = me.todo[1:]
        return "frees the slot: bitmap, rmap, and userspace takes the memory back"


class OutsideWriter(Phases):
    """A write of KVM itself to guest memory from a VM ioctl: no vCPU is loaded (kvm-mmu.md 3.2, 4.7)."""

    def __init__(self, gfn: int, rules: Rules) -> None:
        super().__init__("VM ioctl", PhaseFrame(("write", "mark")))
        self._gfn = gfn
        self._rules = rules
        self.phases = {"write": (self._write,), "mark": (self._mark,)}

    def _write(self, vm: Vm, me: PhaseFrame) -> str | None:
        if vm.paused:
            me.todo = ()
            return "has nothing to write any more"
        vm.memory = put(vm.memory, self._gfn, vm.memory[self._gfn] + 1)
        vm.outside = True
        me.todo = me.todo[1:]
        return f"writes page {self._gfn}, no vCPU is loaded"

    def _mark(self, vm: Vm, me: PhaseFrame) -> str:
        vm.outside = False
        me.todo = me.todo[1:]
        if vm.rings:
            return f"page {self._gfn} has no ring to go to, and there is no bitmap: not marked"
        if not self._rules.marks_without_vcpu:
            return f"no vCPU is loaded: the mark of page {self._gfn} is dropped"
        did = f"marks page {self._gfn} in the bitmap"
        vm.mark(self._gfn, did)
        return did
