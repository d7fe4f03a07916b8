"""Time of a VM and of a vCPU: kvmclock and the TSC (api.rst 4.29, 4.30, 4.55, 4.56, 4.70)."""

from __future__ import annotations

import errno

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import KvmError, UsageError
from pykvm.kvm.fields import fill
from pykvm.machine.state import ClockState

_TSC_REFUSALS: Refusals = {
    errno.EIO: (KvmError, "this host's TSC is not stable, so the guest's has no frequency to tell."),
    errno.EINVAL: (
        KvmError,
        "the frequency is 0 or below the host's, and this host cannot scale the TSC (KVM_CAP_TSC_CONTROL).",
    ),
    errno.ENOTTY: (KvmError, "setting it for a VM needs KVM_CAP_VM_TSC_CONTROL and a newer kernel."),
}


class _Tsc(Managed):
    """The two ioctls exist for a vCPU and, as the default of its vCPUs to come, for a VM."""

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (api.rst 4.56, KVM_CAP_GET_TSC_KHZ; for a VM KVM_CAP_VM_TSC_CONTROL).

        Raises KvmError: EIO where the host's TSC is unstable.
        """
        return self.ioctl_int(lib.KVM_GET_TSC_KHZ, 0, "KVM_GET_TSC_KHZ", _TSC_REFUSALS)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (api.rst 4.55, KVM_CAP_TSC_CONTROL unless it is the host's; VM: VM_TSC_CONTROL).

        Without scaling KVM imitates a faster TSC by leaps and refuses a slower one.  Raises UsageError beyond
        32 bits, KvmError (EINVAL).
        """
        if not 0 <= khz < 1 << 32:
            raise UsageError(f"A TSC frequency of {khz} kHz is not an unsigned 32-bit number.")
        self.ioctl_int(lib.KVM_SET_TSC_KHZ, khz, "KVM_SET_TSC_KHZ", _TSC_REFUSALS)


class VmClock(_Tsc):
    """kvmclock of a VM (KVM_CAP_ADJUST_CLOCK)."""

    def get_clock(self) -> ClockState:
        """KVM_GET_CLOCK (api.rst 4.29): what the guest's kvmclock shows now."""
        data = ffi.new("struct pykvm_clock_data *")
        self.ioctl(lib.KVM_GET_CLOCK, data, "KVM_GET_CLOCK")
        return ClockState(data.clock, data.flags, data.realtime, data.host_tsc)

    def set_clock(self, clock: int, *, realtime: int | None = None) -> None:
        """KVM_SET_CLOCK (api.rst 4.30): let kvmclock show ``clock`` nanoseconds now.

        With ``realtime`` (nanoseconds since the epoch) it was that then, and what passed since is added;
        the hosts' clocks must agree.  A guest with kvmclock on gets its page written (and dirtied) at the
        next run.  Raises UsageError; KvmError (EINVAL) where the kernel does not know realtime (5.16).
        """
        data = ffi.new("struct pykvm_clock_data *")
        flags = 0 if realtime is None else lib.KVM_CLOCK_REALTIME
        fill(data, clock=clock, flags=flags, realtime=realtime or 0)
        refusals: Refusals = {
            errno.EINVAL: (KvmError, "this kernel does not take the real time; leave it out.")
        }
        self.ioctl(lib.KVM_SET_CLOCK, data, "KVM_SET_CLOCK", refusals)


class VcpuClock(_Tsc):
    """The TSC of a vCPU, and kvmclock's pause notice."""

    def notify_paused(self) -> None:
        """KVM_KVMCLOCK_CTRL (api.rst 4.70, KVM_CAP_KVMCLOCK_CTRL): tell the guest that it was stopped, so
        that its watchdogs stay quiet.  Raises KvmError (EINVAL) while the guest does not use kvmclock."""
        refusals: Refusals = {errno.EINVAL: (KvmError, "the guest has not switched kvmclock on.")}
        self.ioctl_int(lib.KVM_KVMCLOCK_CTRL, 0, "KVM_KVMCLOCK_CTRL", refusals)
