"""Debugging of a vCPU from outside, and looking in (api.rst 4.15, 4.87)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pykvm.machine.exits import DebugStop, Exit
from pykvm.model import paging
from pykvm.model.cpu.faults import Fault, NeedInput
from pykvm.model.cpu.processor import Processor
from pykvm.model.paging import Access
from pykvm.model.vcpu_registers import VcpuPart, check_width
from pykvm.x86.bits import Cr0
from pykvm.x86.breakpoints import BreakKind, Breakpoint, encode_dr7
from pykvm.x86.exceptions import Vector

_DR6_ONES: Final = 0xFFFF0FF0
_DR6_STEP: Final = 1 << 14
_INT3: Final = b"\xcc"
_HITS: Final = 0xF


class VcpuDebug(VcpuPart):
    """Single step, breakpoints, translation."""

    def __init__(self) -> None:
        self.debugging = False
        self._single_step = False
        self._catch_int3 = False
        self._block_interrupts = False
        self._points: tuple[Breakpoint, ...] = ()
        super().__init__()

    def set_guest_debug(
        self,
        *,
        single_step: bool = False,
        breakpoints: Sequence[Breakpoint] = (),
        catch_int3: bool = False,
        block_interrupts: bool = False,
    ) -> None:
        """KVM_SET_GUEST_DEBUG (api.rst 4.87): make ``run`` return DebugStop.

        ``single_step`` after each instruction; ``breakpoints`` instead of the guest's own; ``catch_int3``:
        INT3 stops instead of reaching the guest; ``block_interrupts``: none is delivered meanwhile.  Replaces
        earlier settings.  Raises UsageError.
        """
        encode_dr7(breakpoints)
        with self.use("KVM_SET_GUEST_DEBUG"):
            self.debugging = True
            self._single_step = single_step
            self._points = tuple(breakpoints)
            self._catch_int3 = catch_int3
            self._block_interrupts = block_interrupts

    def clear_guest_debug(self) -> None:
        """KVM_SET_GUEST_DEBUG with nothing asked for: the guest has its registers back."""
        with self.use("KVM_SET_GUEST_DEBUG"):
            self.debugging = False

    def debug_step(self) -> Exit | None:
        """One instruction, and whether the host wanted to see it."""
        cpu = self.cpu
        pc = cpu.code_window.base + cpu.rip
        for number, point in enumerate(self._points):
            if point.kind is BreakKind.EXECUTE and point.address == pc:
                return self._stop(Vector.DB, _DR6_ONES | 1 << number)
        if self._catch_int3 and self._at_int3():
            return self._stop(Vector.BP, 0)
        exit = self._data_step(cpu) if self._points else self._quiet_step(cpu)
        hits = cpu.pending_debug & _HITS if self._points else 0
        if exit is None and (hits or self._single_step):
            cpu.pending_debug &= ~_HITS if self._points else -1
            return self._stop(Vector.DB, _DR6_ONES | hits | (_DR6_STEP if self._single_step else 0))
        return exit

    def answered_step(self) -> Exit | None:
        """The stop behind an instruction that waited for the host's answer.  As in KVM there is none behind
        one that only told the host something: that exit was its stop."""
        return self._stop(Vector.DB, _DR6_ONES | _DR6_STEP) if self._single_step else None

    def _data_step(self, cpu: Processor) -> Exit | None:
        """With the host's breakpoints on data in the debug registers, unless the guest writes them."""
        guests = cpu.dr, cpu.dr7
        watched = [point for point in self._points if point.kind is not BreakKind.EXECUTE]
        host_dr = [point.address for point in watched] + [0] * (4 - len(watched))
        host_dr7 = encode_dr7(watched)
        cpu.dr, cpu.dr7 = list(host_dr), host_dr7
        try:
            return self._quiet_step(cpu)
        finally:
            if (cpu.dr, cpu.dr7) == (host_dr, host_dr7):
                cpu.dr, cpu.dr7 = guests

    def _quiet_step(self, cpu: Processor) -> Exit | None:
        if not self._block_interrupts:
            return cpu.run(1)
        waiting = cpu.injected_interrupt, cpu.pending_nmi
        cpu.injected_interrupt, cpu.pending_nmi = None, False
        try:
            return cpu.run(1)
        finally:
            cpu.injected_interrupt, cpu.pending_nmi = waiting

    def _at_int3(self) -> bool:
        cpu = self.cpu
        try:
            return cpu.fetch_bytes(cpu.code_window.base + cpu.rip, 1) == _INT3
        except (Fault, NeedInput):
            return False

    def _stop(self, vector: int, dr6: int) -> DebugStop:
        cpu = self.cpu
        dr7 = encode_dr7(self._points) if self._points else cpu.dr7
        return DebugStop(vector, cpu.code_window.base + cpu.rip, dr6, dr7)

    def translate(self, linear: int) -> int | None:
        """KVM_TRANSLATE (api.rst 4.15): the guest-physical address behind a linear one, None if unmapped.

        As a supervisor read through the tables as they are now, setting accessed bits.
        """
        check_width("linear_address", linear, 64)
        with self.use("KVM_TRANSLATE") as cpu, self.vm.schedule.visit():
            if not cpu.cr0 & Cr0.PG:
                return linear
            found = paging.walk(cpu._read_entry, cpu.paging_control(), linear, Access.READ)
            if found.error is not None:
                return None
            for update in found.updates:
                cpu.bus.set_entry(update.gpa, update.size, update.new)
            return found.gpa
