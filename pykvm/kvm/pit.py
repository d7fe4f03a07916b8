"""The i8254 timer in the kernel (api.rst 4.71 to 4.73)."""

from __future__ import annotations

import errno
from dataclasses import fields

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import KvmError, UsageError
from pykvm.kvm.fields import fill
from pykvm.machine.state import PitChannel, PitState

_CHANNEL = tuple(field.name for field in fields(PitChannel))
_ABSENT: Refusals = {errno.ENXIO: (KvmError, "this VM has no timer in the kernel; call create_pit first.")}


class VmPit(Managed):
    """The timer of a VM (KVM_CAP_PIT2, KVM_CAP_PIT_STATE2)."""

    has_pit = False
    """Whether ``create_pit`` was called."""

    def create_pit(self, *, speaker: bool = False) -> None:
        """KVM_CREATE_PIT2 (api.rst 4.71): ports 0x40 to 0x43, interrupt on GSI 0; ``speaker``: port 0x61 too.

        Raises KvmError: EEXIST when there is one, ENOENT without the interrupt controllers in the kernel.
        """
        config = ffi.new("struct kvm_pit_config *", {"flags": int(speaker)})
        refusals: Refusals = {
            errno.EEXIST: (KvmError, "this VM has its timer already."),
            errno.ENOENT: (KvmError, "call create_irqchip first, whose GSI 0 the timer drives."),
        }
        self.ioctl(lib.KVM_CREATE_PIT2, config, "KVM_CREATE_PIT2", refusals)
        self.has_pit = True

    def get_pit(self) -> PitState:
        """KVM_GET_PIT2 (api.rst 4.72).  Raises KvmError (ENXIO) without a timer in the kernel."""
        state = ffi.new("struct kvm_pit_state2 *")
        self.ioctl(lib.KVM_GET_PIT2, state, "KVM_GET_PIT2", _ABSENT)
        channels = tuple(PitChannel(*(getattr(c, name) for name in _CHANNEL)) for c in state.channels)
        return PitState(channels, state.flags)

    def set_pit(self, value: PitState) -> None:
        """KVM_SET_PIT2 (api.rst 4.73).  Raises UsageError for fields out of range, KvmError as get_pit."""
        if len(value.channels) != 3:
            raise UsageError(f"The timer has 3 channels, not {len(value.channels)}.")
        state = ffi.new("struct kvm_pit_state2 *")
        fill(state, flags=value.flags)
        for i, channel in enumerate(value.channels):
            fill(state.channels[i], **{name: getattr(channel, name) for name in _CHANNEL})
        self.ioctl(lib.KVM_SET_PIT2, state, "KVM_SET_PIT2", _ABSENT)
