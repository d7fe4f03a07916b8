"""Exceptions on a host: when the guest gets one, and what becomes of a delivery that fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.machine.exits import InternalError
from pykvm.model.cpu import gates, interrupts
from pykvm.model.cpu.faults import Fault, NeedInput, TripleFault
from pykvm.model.mmu import outcomes
from pykvm.model.profiled import kvm_pvm
from pykvm.model.profiled.access import HostAccess
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.profiles import Profile

_DELIVERY: Final = 3  # KVM_INTERNAL_ERROR_DELIVERY_EV
_NO_SECOND: Final = frozenset({Vector.PF, Vector.DF})
"""Exceptions during whose delivery a page fault is not delivered for itself (SDM vol. 3, table 6-5)."""
MOST_REFAULTS: Final = 1 << 14
"""An instruction that faults so often never completes: its host would hang, too."""


class HostDelivery(HostAccess):
    """The part of a host's processor that enters handlers."""

    _profile: Profile
    left: bool
    batch: int
    _was_native: bool
    _undelivered: Fault | None
    spins = False
    """KVM emulates the same instruction for ever."""

    def _deliver(self, fault: Fault) -> None:
        """Enter the handler of a fault of the instruction at RIP: with the next entry, after its requests."""
        self.left = True
        self.replies.clear()
        try:
            if not self.mmu.enter():
                self._undelivered = fault  # until the ring is no longer full
                return
        except outcomes.TripleFault:
            raise TripleFault from None
        self._deliver_now(fault)

    def _deliver_now(self, fault: Fault) -> None:
        interrupts.deliver_fault(self, fault)
        if self._profile.emulates_all_but_user:
            # The handler runs before requests are looked at again, be the ring full by what was pushed.
            self.left, self._was_native = False, False
            self.batch = self._profile.emulation_batch

    def enter_handler(self, event: gates.Event) -> None:
        if self._profile.emulates_all_but_user:
            self.emulating, before = True, self.emulating
            self.untracked = True
            try:
                kvm_pvm.enter_handler(self, event)
                self.commit()
            except kvm_pvm.EndlessDelivery:
                self.commit()
                self.spins = True
            finally:
                self.emulating, self.untracked = before, False
            return
        for _ in range(MOST_REFAULTS):
            try:
                super().enter_handler(event)
            except outcomes.Refault:
                self.rollback()
                self.begin()
                self.mmu.enter()
            except outcomes.EmulateInstruction:
                # Tables or stack without memory: a delivery cannot be emulated (12.3, DELIVERY_EV).
                raise NeedInput(InternalError(_DELIVERY, ())) from None
            except Fault as fault:
                if fault.vector != Vector.PF or self.mmu.tdp is not None or event.vector not in _NO_SECOND:
                    raise
                # KVM makes it a double fault or a shutdown, and drops the second fault's address with it.
                raise Fault(Vector.PF, fault.error, address=self.cr2) from None
            else:
                return
