"""The experiment: a fast page fault for shadow paging (kvm-mmu.md 9.2 and 11.2, locking.rst 2.1).

One gPTE translates the address X.  KVM shadows it with one SPTE, and remembers beside it which gfn that is.
KVM fixes write faults on such an SPTE by a walk of the guest's tables under mmu_lock.  Here a vCPU may skip
both (``Rules.shadow_repair``), while around it the guest changes the gPTE, the host gives the page frame to
another gfn, and KVM begins to shadow the gfn as a page table.

What lies under mmu_lock or belongs to one guest instruction is one step here: the question is what happens
between the steps of the lockless path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pykvm.model.interleave.explorer import Actor, BrokenProperty, Record, Step
from pykvm.model.interleave.rules import Repair, Rules
from pykvm.model.interleave.state import pages_of, put, words

NO_FRAME = -1
FRESH = 8
"""The page frame that gfn 0 gets at a fault if it has none; the next one is for gfn 1."""


class Gpte(NamedTuple):
    """The guest's entry: where it leads, R/W and D."""

    gfn: int
    writable: bool = True
    dirty: bool = True


class ShadowSpte(NamedTuple):
    """The shadow SPTE; a page frame of -1 means that it is not present."""

    frame: int
    mmu_writable: bool
    writable: bool


NOT_PRESENT = ShadowSpte(NO_FRAME, False, False)


@dataclass
class Shadow(Record):
    """``gfn`` is what KVM remembers of the SPTE; ``backing`` and what follows are by gfn, ``tlb`` by vCPU."""

    gpte: Gpte
    spte: ShadowSpte
    gfn: int
    backing: tuple[int, ...]
    memory: tuple[int, ...]
    copied: tuple[int, ...]
    tlb: tuple[int, ...]  # the gfn of a cached writable translation, or -1
    recent: frozenset[Gpte]  # what the gPTE was since the guest last flushed
    bitmap: int = 0
    pins: int = 0
    shadowed: bool = False  # gfn 0 is a page table that KVM shadows: nobody writes it unnoticed
    collecting: bool = False  # mmu_lock is held by the collector
    inside: int = 0  # vCPUs that are handling an exit
    paused: bool = False

    @classmethod
    def create(cls, vcpus: int, backing: tuple[int, ...], *, dirty: bool = True) -> Shadow:
        """X leads to gfn 0 and was log-protected; ``dirty`` is D of the gPTE."""
        gpte = Gpte(0, dirty=dirty)
        none = (0,) * len(backing)
        return cls(
            gpte=gpte,
            spte=ShadowSpte(backing[0], True, False),
            gfn=0,
            backing=backing,
            memory=none,
            copied=none,
            tlb=(-1,) * vcpus,
            recent=frozenset({gpte}),
        )

    def flush(self) -> None:
        self.tlb = (-1,) * len(self.tlb)

    def drop(self) -> None:
        """Zap the SPTE and flush."""
        self.spte = NOT_PRESENT
        self.flush()


@dataclass
class ShadowFrame(Record):
    """``program`` is what the guest does, ``todo`` the host's next steps for it."""

    program: tuple[str, ...]
    todo: tuple[str, ...] = ()
    old: ShadowSpte = NOT_PRESENT
    gfn: int = 0
    pinned: bool = False


class Faulter(Actor[Shadow, ShadowFrame]):
    """A vCPU whose guest stores to X, lets X lead elsewhere, or forbids writes to it."""

    def __init__(self, number: int, program: tuple[str, ...], rules: Rules) -> None:
        super().__init__(f"vCPU {number}", ShadowFrame(program))
        self._number = number
        self._rules = rules
        self._table: dict[str, tuple[Step[Shadow, ShadowFrame], ...]] = {
            "store": (self._store,),
            "lead to 0": (self._lead_to_0,),
            "lead to 1": (self._lead_to_1,),
            "forbid": (self._forbid,),
            "flush": (self._flush,),
            "read": (self._read,),
            "pin": (self._pin,),
            "cmpxchg": (self._compare_and_exchange,),
            "mark": (self._mark,),
            "again": (self._mark_again,),
            "slow": (self._slow,),
        }

    def steps(self, frame: ShadowFrame) -> Sequence[Step[Shadow, ShadowFrame]]:
        label = (*frame.todo, *frame.program, "")[0]
        return self._table[label] if label else ()

    def may_wait(self, frame: ShadowFrame) -> bool:
        return not frame.todo  # paused in the guest

    # --- the guest -----------------------------------------------------------------------------------

    def _store(self, vm: Shadow, me: ShadowFrame) -> str | None:
        if vm.paused:
            return None
        if vm.tlb[self._number] >= 0:
            return self._through(vm, me, vm.tlb[self._number])
        if vm.spte.writable:
            vm.tlb = put(vm.tlb, self._number, vm.gfn)
            return f"walks: the SPTE has W=1, caches it (gfn {vm.gfn} in frame {vm.spte.frame})"
        vm.inside += 1
        me.todo = ("slow",) if self._rules.shadow_repair is Repair.SLOW else ("read",)
        return "walks for a store to X: the SPTE is not writable, exits"

    def _through(self, vm: Shadow, me: ShadowFrame, gfn: int) -> str:
        did = f"stores to X through its TLB: gfn {gfn}"
        me.program = me.program[1:]
        if not any(gpte.writable and gpte.gfn == gfn for gpte in vm.recent):
            raise BrokenProperty(did, "the guest took this translation back and flushed, and yet it was used")
        if not vm.gpte.dirty:
            raise BrokenProperty(did, "the gPTE's D flag is clear: the guest itself loses the write")
        if vm.shadowed and gfn == 0:
            raise BrokenProperty(did, "gfn 0 is a shadowed page table, and KVM does not learn of the write")
        vm.memory = put(vm.memory, gfn, vm.memory[gfn] + 1)
        return did

    def _lead_to_0(self, vm: Shadow, me: ShadowFrame) -> str | None:
        return self._change(vm, me, Gpte(0), "guest writes the gPTE: X leads to gfn 0")

    def _lead_to_1(self, vm: Shadow, me: ShadowFrame) -> str | None:
        return self._change(vm, me, Gpte(1), "guest writes the gPTE: X leads to gfn 1")

    def _forbid(self, vm: Shadow, me: ShadowFrame) -> str | None:
        return self._change(vm, me, vm.gpte._replace(writable=False), "guest writes the gPTE: R/W=0")

    @staticmethod
    def _change(vm: Shadow, me: ShadowFrame, gpte: Gpte, did: str) -> str | None:
        if vm.paused:
            return None
        vm.gpte = gpte
        vm.recent |= {gpte}
        me.program = me.program[1:]
        return did

    def _flush(self, vm: Shadow, me: ShadowFrame) -> str | None:
        """The guest's flush on all its vCPUs: KVM syncs the SPTE under mmu_lock."""
        if vm.paused or vm.collecting:
            return None
        me.program = me.program[1:]
        vm.recent = frozenset({vm.gpte})
        did = "guest flushes all TLBs; KVM syncs: "
        if vm.spte == NOT_PRESENT or (vm.gfn == vm.gpte.gfn and vm.gpte.writable and vm.gpte.dirty):
            vm.flush()
            return did + "nothing to change"
        if vm.gfn != vm.gpte.gfn:
            vm.drop()
            return did + "X leads elsewhere, zaps the SPTE"
        vm.spte = vm.spte._replace(mmu_writable=False, writable=False)
        vm.flush()
        return did + "clears W and MMU-writable in the SPTE"

    # --- the lockless path -----------------------------------------------------------------------------

    def _read(self, vm: Shadow, me: ShadowFrame) -> str:
        if not vm.spte.mmu_writable:
            me.todo = ("slow",)
            return "fast page fault: the SPTE is not MMU-writable, takes the slow path"
        if vm.spte.writable:
            return f"fast page fault: W=1 by now, spurious{self._enter(vm, me)}"
        me.old, me.gfn = vm.spte, vm.gfn
        repair = self._rules.shadow_repair
        me.todo = {
            Repair.PIN: ("pin", "cmpxchg", "mark"),
            Repair.LOOK_AGAIN: ("cmpxchg", "mark", "again"),
        }.get(repair, ("cmpxchg", "mark"))
        return f"fast page fault: reads the SPTE, frame {me.old.frame}, W=0 MMU-writable=1, of gfn {me.gfn}"

    def _pin(self, vm: Shadow, me: ShadowFrame) -> str:
        if vm.backing[me.gfn] != me.old.frame:
            me.todo = ("slow",)
            return f"fast page fault: gfn {me.gfn} has another frame by now, takes the slow path"
        vm.pins += 1
        me.pinned = True
        me.todo = me.todo[1:]
        return f"fast page fault: pins frame {me.old.frame} of gfn {me.gfn}"

    def _compare_and_exchange(self, vm: Shadow, me: ShadowFrame) -> str:
        same = vm.spte == me.old and (self._rules.shadow_repair is not Repair.TAG or vm.gfn == me.gfn)
        if self._rules.shadow_compares and not same:
            me.todo = ("slow",)
            self._unpin(vm, me)
            return "fast page fault: the SPTE has changed, takes the slow path"
        vm.spte = me.old._replace(writable=True)
        me.todo = me.todo[1:]
        how = "compare-and-exchange" if self._rules.shadow_compares else "plain store"
        return f"fast page fault: {how} sets W=1"

    def _mark(self, vm: Shadow, me: ShadowFrame) -> str:
        vm.bitmap |= 1 << me.gfn
        me.todo = me.todo[1:]
        self._unpin(vm, me)
        return f"fast page fault: marks gfn {me.gfn}{'' if me.todo else self._enter(vm, me)}"

    def _mark_again(self, vm: Shadow, me: ShadowFrame) -> str:
        gfn = vm.gfn
        vm.bitmap |= 1 << gfn
        return f"fast page fault: looks again, marks gfn {gfn}{self._enter(vm, me)}"

    @staticmethod
    def _unpin(vm: Shadow, me: ShadowFrame) -> None:
        vm.pins -= me.pinned
        me.pinned = False

    @staticmethod
    def _enter(vm: Shadow, me: ShadowFrame) -> str:
        vm.inside -= 1
        me.todo, me.old, me.gfn = (), NOT_PRESENT, 0
        return "; enters the guest"

    # --- the slow path: a walk, and everything else under mmu_lock ----------------------------------------

    def _slow(self, vm: Shadow, me: ShadowFrame) -> str | None:
        if vm.collecting:
            return None
        if not vm.gpte.writable:
            me.program = me.program[1:]
            return f"slow page fault: the gPTE forbids it, the guest gets #PF{self._enter(vm, me)}"
        gfn = vm.gpte.gfn
        if vm.shadowed and gfn == 0:
            vm.memory = put(vm.memory, gfn, vm.memory[gfn] + 1)
            vm.bitmap |= 1 << gfn
            me.program = me.program[1:]
            return f"slow page fault: gfn {gfn} is a page table, emulates the store{self._enter(vm, me)}"
        if not vm.gpte.dirty:
            vm.gpte = vm.gpte._replace(dirty=True)
            vm.recent |= {vm.gpte}
        if vm.backing[gfn] == NO_FRAME:
            vm.backing = put(vm.backing, gfn, FRESH + gfn)
        vm.spte = ShadowSpte(vm.backing[gfn], True, True)
        vm.gfn = gfn
        vm.bitmap |= 1 << gfn
        did = f"slow page fault: walks to gfn {gfn}, marks it, SPTE has frame {vm.spte.frame} W=1"
        return did + self._enter(vm, me)


class Around(Actor[Shadow, ShadowFrame]):
    """What happens around: the host moves page frames, KVM shadows a gfn, userspace collects."""

    def __init__(self, name: str, program: tuple[str, ...], rules: Rules) -> None:
        super().__init__(name, ShadowFrame(program))
        self._rules = rules
        self._table: dict[str, tuple[Step[Shadow, ShadowFrame], ...]] = {
            "swap out": (self._swap_out,),
            "reuse": (self._reuse,),
            "shadow": (self._shadow,),
            "xchg": (self._xchg,),
            "protect": (self._protect,),
            "pause": (self._pause,),
            "compare": (self._compare,),
        }

    def steps(self, frame: ShadowFrame) -> Sequence[Step[Shadow, ShadowFrame]]:
        return self._table[frame.program[0]] if frame.program else ()

    def may_wait(self, frame: ShadowFrame) -> bool:
        return frame.program[:1] not in (("xchg",), ("protect",), ("pause",), ("compare",))

    def _swap_out(self, vm: Shadow, me: ShadowFrame) -> str | None:
        """The MMU notifier: under mmu_lock, and only if nobody holds the frame."""
        if vm.collecting or vm.pins:
            return None
        me.program = me.program[1:]
        frame = vm.backing[0]
        vm.backing = put(vm.backing, 0, NO_FRAME)
        if vm.spte.frame == frame:
            vm.drop()
        return f"gfn 0 is swapped out: frame {frame} is free, the SPTE of it zapped"

    def _reuse(self, vm: Shadow, me: ShadowFrame) -> str | None:
        me.program = me.program[1:]
        if vm.backing[1] != NO_FRAME or 7 in vm.backing:
            return "frame 7 goes elsewhere"
        vm.backing = put(vm.backing, 1, 7)
        return "frame 7 is given to gfn 1"

    def _shadow(self, vm: Shadow, me: ShadowFrame) -> str | None:
        if vm.collecting:
            return None
        me.program = me.program[1:]
        vm.shadowed = True
        bits = "W and MMU-writable" if self._rules.shadowing_clears_mmu_writable else "W"
        if vm.gfn == 0:
            mmu_writable = vm.spte.mmu_writable and not self._rules.shadowing_clears_mmu_writable
            vm.spte = vm.spte._replace(writable=False, mmu_writable=mmu_writable)
            vm.flush()
        return f"account_shadowed: gfn 0 becomes a page table, {bits} of its SPTE cleared, TLBs flushed"

    def _xchg(self, vm: Shadow, me: ShadowFrame) -> str:
        me.program = me.program[1:]
        me.gfn, vm.bitmap = vm.bitmap, 0
        if me.gfn:
            vm.collecting = True
        else:
            me.program = me.program[1:]
        return f"exchanges the word with 0: {words(pages_of(me.gfn))}"

    def _protect(self, vm: Shadow, me: ShadowFrame) -> str:
        """Protect, flush and copy in one step: what may go wrong between them is another case."""
        me.program = me.program[1:]
        if me.gfn >> vm.gfn & 1:
            vm.spte = vm.spte._replace(writable=False)
        vm.flush()
        for gfn in pages_of(me.gfn):
            vm.copied = put(vm.copied, gfn, vm.memory[gfn])
        vm.collecting = False
        return f"protects, flushes, copies {words(pages_of(me.gfn))}"

    def _pause(self, vm: Shadow, me: ShadowFrame) -> str | None:
        if vm.inside:
            return None
        me.program = me.program[1:]
        vm.paused = True
        return "pauses all vCPUs: KVM_RUN has returned"

    def _compare(self, vm: Shadow, me: ShadowFrame) -> str:
        me.program = me.program[1:]
        did = "compares its copy with memory"
        for gfn, (copied, contents) in enumerate(zip(vm.copied, vm.memory, strict=True)):
            if copied != contents:
                raise BrokenProperty(
                    did, f"gfn {gfn} has contents {contents}, the copy has {copied}: a lost write"
                )
        return f"{did}: they are equal"
