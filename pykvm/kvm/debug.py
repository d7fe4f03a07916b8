"""Debugging a guest and looking in from outside (api.rst 4.15, 4.21, 4.87)."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import KvmError, UsageError
from pykvm.kvm.fields import fill
from pykvm.x86.breakpoints import BreakKind, Breakpoint, encode_dr7

_LAST_SIGNAL = 64


class VcpuDebug(Managed):
    """Debugging of a vCPU."""

    def set_guest_debug(
        self,
        *,
        single_step: bool = False,
        breakpoints: Sequence[Breakpoint] = (),
        catch_int3: bool = False,
        block_interrupts: bool = False,
    ) -> None:
        """KVM_SET_GUEST_DEBUG (api.rst 4.87, KVM_CAP_SET_GUEST_DEBUG): make ``run`` return DebugStop.

        ``single_step`` after each instruction; ``breakpoints`` (KVM_CAP_GUEST_DEBUG_HW_BPS) instead of the
        guest's own; ``catch_int3``: INT3 stops instead of reaching the guest; ``block_interrupts``
        (KVM_GUESTDBG_BLOCKIRQ in KVM_CAP_SET_GUEST_DEBUG2): none is delivered meanwhile.  Replaces earlier
        settings, and is needed again after ``set_registers`` on some hosts.  Hosts that run user code
        natively but interpret supervisor code (kvm_pvm) can only do this at CPL 0.  Raises UsageError;
        KvmError: EBUSY while an exception is pending, EINVAL for a flag the host does not know.
        """
        debug = ffi.new("struct pykvm_guest_debug *")
        control = lib.KVM_GUESTDBG_ENABLE
        if single_step:
            control |= lib.KVM_GUESTDBG_SINGLESTEP
        if catch_int3:
            control |= lib.KVM_GUESTDBG_USE_SW_BP
        if block_interrupts:
            control |= lib.KVM_GUESTDBG_BLOCKIRQ
        if breakpoints:
            control |= lib.KVM_GUESTDBG_USE_HW_BP
            fill(debug, debugreg=[point.address for point in breakpoints])
            debug.debugreg[7] = encode_dr7(breakpoints)
        debug.control = control
        self._debug(debug)

    def clear_guest_debug(self) -> None:
        """KVM_SET_GUEST_DEBUG (api.rst 4.87) with nothing asked for: the guest has its registers back."""
        self._debug(ffi.new("struct pykvm_guest_debug *"))

    def _debug(self, debug: object) -> None:
        refusals: Refusals = {
            errno.EBUSY: (KvmError, "an exception is pending in the guest; run it once, then try again."),
            errno.EINVAL: (KvmError, "this host does not know one of the flags (KVM_CAP_SET_GUEST_DEBUG2)."),
        }
        self.ioctl(lib.KVM_SET_GUEST_DEBUG, debug, "KVM_SET_GUEST_DEBUG", refusals)

    def translate(self, linear: int) -> int | None:
        """KVM_TRANSLATE (api.rst 4.15): the guest-physical address behind a linear one, None if unmapped.

        Follows the guest's tables as they are now, as a supervisor read.  The walk sets accessed bits, so
        the tables may get dirty.  KVM's ``writeable`` and ``usermode`` are constants and not given.
        """
        request = ffi.new("struct kvm_translation *")
        fill(request, linear_address=linear)
        self.ioctl(lib.KVM_TRANSLATE, request, "KVM_TRANSLATE")
        return int(request.physical_address) if request.valid else None

    def set_signal_mask(self, blocked: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK (api.rst 4.21): signals blocked while in the guest; None: the thread's mask.

        A signal that the thread blocks and this mask does not ends KVM_RUN and stays pending.  Raises
        UsageError for a number beyond 1 to 64 or for the signal that ``kick`` uses.
        """
        if blocked is None:
            self.ioctl(lib.KVM_SET_SIGNAL_MASK, None, "KVM_SET_SIGNAL_MASK")
            return
        kick = lib.pykvm_kick_signal()
        bits = 0
        for number in blocked:
            if not 1 <= number <= _LAST_SIGNAL:
                raise UsageError(f"Signal {number} is not in 1 to {_LAST_SIGNAL}.")
            if number == kick:
                raise UsageError(f"Signal {kick} must stay open: kick uses it.")
            bits |= 1 << number - 1
        mask = ffi.new("struct pykvm_signal_mask *", {"len": 8, "sigset": list(bits.to_bytes(8, "little"))})
        self.ioctl(lib.KVM_SET_SIGNAL_MASK, mask, "KVM_SET_SIGNAL_MASK")


__all__ = ["BreakKind", "Breakpoint", "VcpuDebug", "encode_dr7"]
