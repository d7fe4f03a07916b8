"""Turning a machine's dirty logging on and off: what all trackers share."""

from __future__ import annotations

from pykvm.errors import GuestTimeoutError, UsageError
from pykvm.machine import Machine, Slot, SlotFlags

KICK_TIMEOUT = 10.0


class SlotLogging:
    """Logging on the writable slots of one machine, as long as it is armed."""

    def __init__(self) -> None:
        self._machine: Machine | None = None
        self._armed: list[Slot] = []

    @property
    def machine(self) -> Machine:
        """The armed machine.  Raises UsageError before ``arm``."""
        if self._machine is None:
            raise UsageError("The tracker is not armed; call arm(machine) first.")
        return self._machine

    @property
    def slots(self) -> list[Slot]:
        """The slots that log and still exist."""
        return [slot for slot in self._armed if slot.alive]

    def arm(self, machine: Machine) -> None:
        """Set LOG_DIRTY_PAGES on every writable slot (KVM never reports writes to READONLY ones)."""
        if self._machine is not None:
            raise UsageError("The tracker is armed already; disarm it first.")
        self._machine = machine
        self._armed = [slot for slot in machine.slots.values() if not slot.flags & SlotFlags.READONLY]
        try:
            for slot in self._armed:
                slot.set_flags(slot.flags | SlotFlags.LOG_DIRTY_PAGES)
        except BaseException:
            self.disarm()
            raise

    def disarm(self) -> None:
        """Clear the flag again; harmless when not armed."""
        for slot in self.slots:
            slot.set_flags(slot.flags & ~SlotFlags.LOG_DIRTY_PAGES)
        self._machine = None
        self._armed = []

    def kick_vcpus(self) -> None:
        """Have every running vCPU leave the guest once, which flushes the processor's log (PML)."""
        running = [vcpu for vcpu in self.machine.vcpus if vcpu.running]
        for vcpu in running:
            try:
                vcpu.kick(wait=KICK_TIMEOUT)
            except GuestTimeoutError as error:
                raise GuestTimeoutError(f"{error} The last dirty pages cannot be collected.") from error
