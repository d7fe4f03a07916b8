"""Page write-tracking for a machine that has none: read-only memslots carved around the tracked pages.

A store to a READONLY slot reaches nobody's memory.  It leaves the guest as an MMIO write with its address
and bytes (api.rst 4.35, section 5), which is all that KVM's own page track tells its users, too.  Here it is
written to memory, noted as dirty where the slot logs, and reported, and then the guest goes on: reads of the
page, and everything on other pages, run at full speed all along.

What is made of a machine here is a machine again, with the slots and vCPUs that were asked for, so guests,
trackers and migrations run on it as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pykvm.machine import CpuidEntry, Machine, MmioWrite, Statistics
from pykvm.memory import PAGE_SIZE
from pykvm.track.carved_log import CarvedLog
from pykvm.track.carved_vcpu import CarvedVcpu

if TYPE_CHECKING:
    from pykvm.machine.state import MachineState


class CarvedMachine(CarvedLog):
    """``machine`` with page tracking; see pykvm.machine.TrackingMachine.

    Use this one's slots and vCPUs from now on.  What it has beyond the Protocol is passed through.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._vcpus = [CarvedVcpu(self, vcpu) for vcpu in machine.vcpus]

    @property
    def backend(self) -> str:
        return self.real.backend

    @property
    def vcpus(self) -> Sequence[CarvedVcpu]:
        return tuple(self._vcpus)

    @property
    def supported_cpuid(self) -> Sequence[CpuidEntry]:
        return self.real.supported_cpuid

    def create_vcpu(self, vcpu_id: int | None = None) -> CarvedVcpu:
        """See pykvm.machine.Machine.create_vcpu."""
        with self._lock:
            vcpu = CarvedVcpu(self, self.real.create_vcpu(vcpu_id))
            self._vcpus.append(vcpu)
            return vcpu

    def guest_wrote(self, vcpu_id: int, exit: MmioWrite) -> bool:
        """Apply and report a write that came out of the guest; False if it is none to a slot's memory.

        It may be to a page that is not tracked any more, when the instruction that it belongs to began
        earlier: then it is applied all the same, and not reported.
        """
        gpa, data = exit
        with self._lock:
            slot = self.slot_at(gpa // PAGE_SIZE)
            if slot is None or slot.readonly:
                return False
            at = gpa - slot.gpa
            slot.bytes[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)
            page = at // PAGE_SIZE
            if slot.logs:
                if self.ring_entries:
                    self._marks.setdefault(vcpu_id, {})[slot, page] = None
                else:
                    slot.dirty.mark(page)
            if page in slot.counts:
                self._tell_write(gpa, data)
            return True

    def _tell_write(self, gpa: int, data: bytes) -> None:
        failed: BaseException | None = None
        for node in tuple(self._nodes):
            try:
                node.track_write(gpa, data)
            except BaseException as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def statistics(self) -> Statistics:
        return self.real.statistics()

    def save_state(self) -> MachineState:
        return self.real.save_state()

    def load_state(self, state: MachineState) -> None:
        self.real.load_state(state)

    def close(self) -> None:
        """Close the machine; its slots are gone."""
        self.real.close()
        with self._lock:
            for slot in self._slots.values():
                slot.owner = None
            self._slots.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name == "real":  # not set yet
            raise AttributeError(name)
        return getattr(self.real, name)

    def __repr__(self) -> str:
        return f"<CarvedMachine around {self.real!r}>"
