"""Running a scenario on a machine: a trace that says after each step what can be seen of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pykvm.crosscheck import snippets
from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.abilities import Debuggable, can_single_step, marks_reads
from pykvm.crosscheck.counters import Counters, Peeking
from pykvm.crosscheck.rig import MemoryPool, Rig
from pykvm.crosscheck.scenario import CodeGuest, Scenario
from pykvm.crosscheck.steps import SlotPlan, Step
from pykvm.crosscheck.trace import Page, StepTrace, Trace, VcpuView
from pykvm.crosscheck.watchdog import WATCHDOG
from pykvm.errors import PykvmError
from pykvm.guest.boot import change_level
from pykvm.machine import (
    DebugStop,
    DirtyPages,
    DirtyRingFull,
    Exit,
    InternalError,
    IoIn,
    IoOut,
    Machine,
    MmioRead,
    MmioWrite,
    Registers,
    RingHarvest,
    Shutdown,
    SlotFlags,
    System,
    Vcpu,
)
from pykvm.memory import PAGE_SIZE
from pykvm.x86.bits import Rflags
from pykvm.x86.cpuid import CpuidEntry

TIME_LIMIT: Final = 10.0
"""Seconds that a scenario may take by default."""
_WORD_BITS: Final = 64
_PASSING: Final = (IoOut, MmioWrite)
"""Exits after which a guest goes on by itself."""
_MOST_EXITS: Final = 64
"""Exits of one Access: a REP that stores to MMIO makes one for each element."""


@runtime_checkable
class Translating(Protocol):
    """A vCPU with KVM_TRANSLATE (api.rst 4.15)."""

    def translate(self, linear: int) -> int | None: ...


class Watch(NamedTuple):
    """What is looked at: ``pages`` after each step (else the memories at the end), and KVM's ``counters`` and
    ring entries after each step."""

    pages: bool = True
    counters: bool = False


PAGES: Final = Watch()
COUNTERS: Final = Watch(pages=False, counters=True)
EVERYTHING: Final = Watch(counters=True)


def run(
    scenario: Scenario,
    system: System,
    *,
    cpuid: Sequence[CpuidEntry] | None = None,
    seconds: float = TIME_LIMIT,
    watch: Watch = PAGES,
    pool: MemoryPool | None = None,
    inspect: Callable[[Machine, int], None] = lambda machine, step: None,
) -> Trace:
    """Run ``scenario`` on a fresh machine of ``system``.

    What the machine refuses becomes part of the trace.  ``cpuid``, ``pool``: see Rig.  After ``seconds`` the
    vCPUs are kicked and the trace ends.  ``inspect`` is called with the machine before the first step (-1)
    and after each.  Raises UsageError for a guest that cannot be built, HostError and KvmError for a machine
    that cannot be made.
    """
    with Rig(scenario, system, cpuid, pool) as rig:
        return _Run(scenario, rig, system, watch, inspect).run(seconds)


def _copies_roots(system: System) -> bool:
    """Whether the system is the model of a host that copies roots (docs/kvm-findings.md, copied-root)."""
    return bool(getattr(getattr(system, "profile", None), "copies_root_entries", False))


class _Run:
    """One run; what the step at hand did is gathered in the attributes."""

    def __init__(
        self,
        scenario: Scenario,
        rig: Rig,
        system: System,
        watch: Watch,
        inspect: Callable[[Machine, int], None],
    ) -> None:
        self._scenario = scenario
        self._rig = rig
        self._system = system
        self._watch = watch
        self._inspect = inspect
        self._overdue = False
        self._before = [memory.view().copy() for memory in rig.memories] if watch.pages else []
        self._read_counters = Counters(rig.machine).read if watch.counters else dict
        self._levels: dict[int, int] = {}
        """The CPL of each vCPU after the last step."""
        self._peeked = [0] * len(rig.machine.vcpus)
        self._taken = DirtyPages()
        """What was harvested because a ring was full, for the next Harvest."""
        self._begin_step()

    def _begin_step(self) -> None:
        self._exits: list[Exit] = []
        self._impossible = ""
        self._dirty: DirtyPages | None = None
        self._ring: list[tuple[int, int, int]] = []
        self._statistics: dict[str, int] = {}
        self._pushed: list[tuple[int, int, int]] = []
        self._translated: int | None = None

    def run(self, seconds: float) -> Trace:
        start = self._slots()
        counters = self._read_counters()
        self._inspect(self._rig.machine, -1)
        done: list[StepTrace] = []
        with self._watchdog(seconds):
            for number, step in enumerate(self._scenario.steps):
                done.append(self._step(number, step))
                self._inspect(self._rig.machine, number)
                if done[-1].ends or (self._watch.counters and self._is_over()):
                    break
        return Trace(
            self._rig.machine.backend,
            self._scenario,
            start,
            tuple(done),
            copies_roots=_copies_roots(self._system),
            marks_reads=not self._watch.counters and marks_reads(self._system, *self._mode()),
            counters=counters,
            final=tuple(bytes(memory.view()) for memory in self._rig.memories)
            if self._watch.counters
            else (),
        )

    def _final(self) -> tuple[bytes, ...]:
        if not self._watch.counters:
            return ()
        return tuple(bytes(memory.view()) for memory in self._rig.memories)

    def _is_over(self) -> bool:
        """Whether a vCPU is dead: what one can do yet after a shutdown or an internal error differs."""
        return any(isinstance(reason, Shutdown | InternalError) for reason in self._exits)

    def _mode(self, vcpu: int = 0) -> tuple[str, int]:
        """The mode and CPL that a vCPU started in."""
        guest = self._scenario.guest
        if isinstance(guest, CodeGuest):
            return guest.vcpus[vcpu].mode, guest.vcpus[vcpu].cpl
        return "long", guest.cpl

    @contextmanager
    def _watchdog(self, seconds: float) -> Iterator[None]:
        """Kick the vCPUs, again and again, once the time is over."""

        def overdue() -> None:
            self._overdue = True
            for vcpu in self._rig.machine.vcpus:
                with suppress(PykvmError):
                    vcpu.kick(wait=0)

        with WATCHDOG.watch(seconds, overdue):
            yield

    def _step(self, number: int, step: Step) -> StepTrace:
        self._begin_step()
        refused = message = ""
        try:
            _DO[type(step)](self, step)
        except PykvmError as error:
            refused, message = type(error).__name__, str(error)
        if self._watch.counters:
            self._peek()
        views = tuple(
            VcpuView(vcpu.get_registers(), vcpu.get_special_registers()) for vcpu in self._rig.machine.vcpus
        )
        self._levels = {vcpu: view.special.ss.dpl for vcpu, view in enumerate(views)}
        return StepTrace(
            number=number,
            step=step,
            exits=tuple(self._exits),
            refused=refused,
            message=message,
            impossible=self._impossible,
            overdue=self._overdue,
            dirty=self._dirty,
            ring=tuple(self._ring),
            vcpus=views,
            changed=self._changes() if self._watch.pages else {},
            slots=self._slots(),
            statistics=self._statistics,
            pushed=tuple(self._pushed),
            counters=self._read_counters(),
            translated=self._translated,
        )

    # --- looking ---------------------------------------------------------------------------------

    def _changes(self) -> dict[Page, bytes]:
        """The pages that differ from the last look, with their contents."""
        found = {}
        for number, memory in enumerate(self._rig.memories):
            now, old = memory.view(), self._before[number]
            differ = (now.view(np.uint64) != old.view(np.uint64)).reshape(-1, PAGE_SIZE // 8).any(axis=1)
            for page in np.flatnonzero(differ).tolist():
                part = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                old[part] = now[part]
                found[number, page] = bytes(old[part])
        return found

    def _slots(self) -> tuple[SlotPlan, ...]:
        return tuple(
            SlotPlan(
                slot.id,
                slot.gpa,
                self._rig.memory_number(slot.memory),
                slot.memory_offset,
                slot.size,
                slot.flags,
            )
            for _, slot in sorted(self._rig.machine.slots.items())
        )

    # --- running the guest -----------------------------------------------------------------------

    def _vcpu(self, number: int) -> Vcpu:
        return self._rig.machine.vcpus[number]

    def _next_exit(self, vcpu: Vcpu) -> Exit:
        """The next exit but DirtyRingFull, for which the rings are harvested."""
        while True:
            reason = vcpu.run()
            if isinstance(reason, DirtyRingFull) and not self._overdue:
                if self._watch.counters:
                    self._exits.append(reason)
                    self._peek()
                self._note(self._rig.machine.collect_rings())
                continue
            return reason

    def _note(self, harvest: RingHarvest) -> None:
        for entries in harvest.entries:
            pairs = zip(entries.slots.tolist(), entries.offsets.tolist(), strict=True)
            self._ring += [(entries.vcpu, slot, offset) for slot, offset in pairs]
        self._taken |= harvest.pages

    def _peek(self) -> None:
        """Note what the vCPUs pushed since the last look."""
        if not self._rig.machine.ring_entries:
            return
        for number, vcpu in enumerate(self._rig.machine.vcpus):
            if isinstance(vcpu, Peeking):
                entries, self._peeked[number] = vcpu.peek_ring(self._peeked[number])
                if entries is not None:
                    pairs = zip(entries.slots.tolist(), entries.offsets.tolist(), strict=True)
                    self._pushed += [(number, slot, offset) for slot, offset in pairs]

    def _answered(self, vcpu: Vcpu, reason: Exit, fill: int | None) -> bool:
        """Whether the exit was a question and has its answer now."""
        if fill is None or not isinstance(reason, IoIn | MmioRead):
            return False
        vcpu.reply(bytes([fill]) * reason.size * getattr(reason, "repeat", 1))
        return True

    def _do_run(self, step: plan.Run) -> None:
        vcpu = self._vcpu(step.vcpu)
        goes_on = False
        while (goes_on or len(self._exits) < step.exits) and not self._overdue:
            reason = self._next_exit(vcpu)
            self._exits.append(reason)
            goes_on = self._answered(vcpu, reason, step.fill)
            if not goes_on and not isinstance(reason, _PASSING):
                return

    def _do_single_step(self, step: plan.SingleStep) -> None:
        vcpu = self._vcpu(step.vcpu)
        cpl = vcpu.get_special_registers().ss.dpl
        mode, _ = self._mode(step.vcpu)
        if not isinstance(vcpu, Debuggable) or not can_single_step(self._system, mode, cpl):
            self._impossible = f"this machine cannot stop after each instruction in mode {mode} at CPL {cpl}"
            return
        vcpu.set_guest_debug(single_step=True)
        try:
            left = step.instructions
            while left and not self._overdue:
                reason = self._next_exit(vcpu)
                self._exits.append(reason)
                left -= isinstance(reason, DebugStop)
                if not isinstance(reason, DebugStop) and not self._answered(vcpu, reason, step.fill):
                    return
        finally:
            vcpu.clear_guest_debug()

    def _do_answer(self, step: plan.Answer) -> None:
        self._vcpu(step.vcpu).reply(step.data)

    def _do_set_registers(self, step: plan.SetRegisters) -> None:
        self._vcpu(step.vcpu).set_registers(step.registers)

    def _do_set_controls(self, step: plan.SetControls) -> None:
        vcpu = self._vcpu(step.vcpu)
        special = vcpu.get_special_registers()
        for name in ("cr0", "cr3", "cr4", "efer"):
            value = getattr(step, name)
            if value is not None:
                setattr(special, name, value)
        vcpu.set_special_registers(special)

    def _do_access(self, step: plan.Access) -> None:
        guest = self._scenario.guest
        assert isinstance(guest, CodeGuest), "the scenario was checked"
        assert guest.snippets is not None, "the scenario was checked"
        vcpu = self._vcpu(step.vcpu)
        if self._levels.get(step.vcpu) != step.cpl:
            special = vcpu.get_special_registers()
            change_level(special, step.cpl)
            vcpu.set_special_registers(special)
        vcpu.set_registers(
            Registers(
                rip=guest.snippets + snippets.place(step.snippet),
                rdi=step.address,
                rax=step.value,
                rcx=step.count,
                rsi=step.second,
                rflags=Rflags.FIXED | (Rflags.IF if step.cpl else 0),
            )
        )
        while len(self._exits) < _MOST_EXITS and not self._overdue:
            reason = self._next_exit(vcpu)
            self._exits.append(reason)
            if not self._answered(vcpu, reason, 0) and not isinstance(reason, MmioWrite):
                return

    def _do_translate(self, step: plan.Translate) -> None:
        vcpu = self._vcpu(step.vcpu)
        if not isinstance(vcpu, Translating):
            self._impossible = "this machine has no KVM_TRANSLATE"
            return
        self._translated = vcpu.translate(step.linear)

    # --- the log ---------------------------------------------------------------------------------

    def _do_logging(self, step: plan.Logging) -> None:
        slot = self._rig.slot(step.slot)
        flag = SlotFlags.LOG_DIRTY_PAGES
        slot.set_flags(slot.flags | flag if step.on else slot.flags & ~flag)

    def _do_collect(self, step: plan.Collect) -> None:
        slot = self._rig.slot(step.slot)
        self._dirty = DirtyPages({slot.id: self._rig.machine.get_dirty_log(slot)})

    def _do_clear(self, step: plan.Clear) -> None:
        words = -(-step.pages // _WORD_BITS)
        marks = b"\xff" * (8 * words) if step.marks is None else step.marks.ljust(8 * words, b"\0")
        bitmap: npt.NDArray[np.uint64] = np.frombuffer(marks, dtype=np.uint64, count=words)
        self._rig.machine.clear_dirty_log(self._rig.slot(step.slot), step.first_page, step.pages, bitmap)

    def _do_harvest(self, step: plan.Harvest) -> None:
        self._note(self._rig.machine.collect_rings())
        self._dirty, self._taken = self._taken, DirtyPages()

    # --- the host --------------------------------------------------------------------------------

    def _do_host_write(self, step: plan.HostWrite) -> None:
        self._rig.memories[step.memory].write(step.offset, step.data)

    def _do_add_slot(self, step: plan.AddSlot) -> None:
        self._rig.add_slot(step.plan)

    def _do_move_slot(self, step: plan.MoveSlot) -> None:
        self._rig.slot(step.slot).move(step.gpa)

    def _do_delete_slot(self, step: plan.DeleteSlot) -> None:
        self._rig.slot(step.slot).delete()

    def _do_reflag_slot(self, step: plan.ReflagSlot) -> None:
        self._rig.slot(step.slot).set_flags(step.flags)

    def _do_statistics(self, step: plan.ReadStatistics) -> None:
        machine = self._rig.machine
        for prefix, statistics in (
            ("machine", machine.statistics()),
            *((f"vcpu{vcpu.id}", vcpu.statistics()) for vcpu in machine.vcpus),
        ):
            self._statistics |= {f"{prefix}.{name}": statistics.value(name) for name in statistics}

    def _do_save_load(self, step: plan.SaveLoad) -> None:
        if step.fresh:
            self._rig.move()
            self._taken = DirtyPages()
        else:
            self._rig.reload()


_DO: Final[dict[type[Any], Callable[[_Run, Any], None]]] = {
    plan.Run: _Run._do_run,
    plan.SingleStep: _Run._do_single_step,
    plan.Answer: _Run._do_answer,
    plan.SetRegisters: _Run._do_set_registers,
    plan.SetControls: _Run._do_set_controls,
    plan.Access: _Run._do_access,
    plan.Translate: _Run._do_translate,
    plan.Logging: _Run._do_logging,
    plan.Collect: _Run._do_collect,
    plan.Clear: _Run._do_clear,
    plan.Harvest: _Run._do_harvest,
    plan.HostWrite: _Run._do_host_write,
    plan.AddSlot: _Run._do_add_slot,
    plan.MoveSlot: _Run._do_move_slot,
    plan.DeleteSlot: _Run._do_delete_slot,
    plan.ReflagSlot: _Run._do_reflag_slot,
    plan.ReadStatistics: _Run._do_statistics,
    plan.SaveLoad: _Run._do_save_load,
}
