"""The machine's clock, and saving and loading what belongs to no vCPU."""

from __future__ import annotations

import time

from pykvm.errors import UsageError
from pykvm.machine.state import ClockState, MachineState


class MachineClock:
    """kvmclock (api.rst 4.29, 4.30): nanoseconds since the machine's creation, or as set."""

    _clock_offset = 0

    def get_clock(self) -> ClockState:
        """KVM_GET_CLOCK."""
        return ClockState(time.monotonic_ns() + self._clock_offset)

    def set_clock(self, clock: int, *, realtime: int | None = None) -> None:
        """KVM_SET_CLOCK: let it show ``clock`` nanoseconds now.

        With ``realtime`` (nanoseconds since the epoch) it was that then, and what passed since is added.
        Raises UsageError for numbers that do not fit 64 bits.
        """
        for name, value in (("clock", clock), ("realtime", realtime or 0)):
            if not 0 <= value < 1 << 64:
                raise UsageError(f"{name} cannot be {value!r}: it does not fit the field's type and width.")
        passed = 0 if realtime is None else max(0, time.time_ns() - realtime)
        self._clock_offset = clock + passed - time.monotonic_ns()

    def save_state(self) -> MachineState:
        """The clock; there are no controllers."""
        return MachineState(clock=self.get_clock())

    def load_state(self, state: MachineState) -> None:
        """Take over ``state``; after the vCPUs.  Raises UsageError for one with controllers."""
        if state.irqchips is not None or state.pit is not None:
            raise UsageError(
                "The state comes from a VM with interrupt controllers or a timer in the kernel, and the "
                "model has none; create the source without them."
            )
        if state.clock is not None:
            self.set_clock(state.clock.clock)
