"""x87, SSE and extended state of a vCPU (api.rst 4.22, 4.23, 4.42 to 4.45, 4.134)."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import KvmError, UsageError
from pykvm.kvm.capabilities import Capability
from pykvm.kvm.fields import fill
from pykvm.x86.fpu import FloatingPoint

if TYPE_CHECKING:
    from pykvm.kvm.vm import KvmVm

_XSAVE_BYTES = 4096  # sizeof(struct kvm_xsave) without the extra part
_X87_SCALARS = ("fcw", "fsw", "ftwx", "last_opcode", "last_ip", "last_dp")
_XSTATE_BV = 512  # of the XSAVE header: components that are not in their initial state (SDM vol. 1, 13.4.2)
_MXCSR = slice(24, 28)  # of the legacy region (SDM vol. 1, table 10-2)
_X87, _SSE = 1, 2
_XSAVE_REFUSALS: Refusals = {
    errno.EINVAL: (KvmError, "the area names components (XSTATE_BV) or MXCSR bits that host or guest lack.")
}
_XCR_REFUSALS: Refusals = {
    errno.EINVAL: (KvmError, "XCR0 needs bit 0, and only bits that the guest's CPUID leaf 0xd offers.")
}


class VcpuFloating(Managed):
    """Floating-point and extended state."""

    if TYPE_CHECKING:
        vm: KvmVm

    def get_fpu(self) -> FloatingPoint:
        """KVM_GET_FPU (api.rst 4.22) as the guest sees it.

        The ioctl copies what lies in memory, which is stale for a part in its initial state (the processor
        does not write such parts out); XSTATE_BV tells which are, and those read as initial here.  Nor does
        it know MXCSR, which comes from the XSAVE area.
        """
        fpu = ffi.new("struct kvm_fpu *")
        self.ioctl(lib.KVM_GET_FPU, fpu, "KVM_GET_FPU")
        area = self.get_xsave()
        in_use = area[_XSTATE_BV]
        value = FloatingPoint(mxcsr=int.from_bytes(area[_MXCSR], "little"))
        if in_use & _X87:
            value.fpr = tuple(bytes(ffi.buffer(register)) for register in fpu.fpr)
            for name in _X87_SCALARS:
                setattr(value, name, getattr(fpu, name))
        if in_use & _SSE:
            value.xmm = tuple(bytes(ffi.buffer(register)) for register in fpu.xmm)
        return value

    def set_fpu(self, value: FloatingPoint) -> None:
        """KVM_SET_FPU (api.rst 4.23); leaves the extended components alone.

        The ioctl alone is without effect on a part in its initial state, as that of a fresh vCPU, and on
        MXCSR: KVM_SET_XSAVE marks the parts as in use first.  Raises UsageError for values that do not fit,
        KvmError (EINVAL) for reserved bits of MXCSR.
        """
        fpu = ffi.new("struct kvm_fpu *")
        fill(fpu, mxcsr=value.mxcsr)
        fill(fpu, **{name: getattr(value, name) for name in _X87_SCALARS})
        for target, registers in ((fpu.fpr, value.fpr), (fpu.xmm, value.xmm)):
            if len(registers) != len(target) or any(len(register) != 16 for register in registers):
                raise UsageError("There are 8 x87 and 16 XMM registers of 16 bytes each.")
            for slot, register in zip(target, registers, strict=True):
                ffi.memmove(slot, register, 16)
        area = bytearray(self.get_xsave())
        area[_XSTATE_BV] |= _X87 | _SSE
        area[_MXCSR] = value.mxcsr.to_bytes(4, "little")
        self.set_xsave(bytes(area))
        self.ioctl(lib.KVM_SET_FPU, fpu, "KVM_SET_FPU")

    def get_xsave(self) -> bytes:
        """KVM_GET_XSAVE2 (api.rst 4.134) or, without KVM_CAP_XSAVE2, KVM_GET_XSAVE (4.42): the XSAVE area.

        In the standard (not compacted) form that CPUID leaf 0xd describes; at least 4096 bytes.
        """
        size = self.vm.check_extension(Capability.XSAVE2)
        # SAFETY: KVM writes as many bytes as KVM_CAP_XSAVE2 of this VM says, or 4096 without it.
        area = ffi.new("__u8[]", size or _XSAVE_BYTES)
        if size:
            self.ioctl(lib.KVM_GET_XSAVE2, area, "KVM_GET_XSAVE2")
        else:
            self.ioctl(lib.KVM_GET_XSAVE, area, "KVM_GET_XSAVE")
        return bytes(ffi.buffer(area))

    def set_xsave(self, area: bytes) -> None:
        """KVM_SET_XSAVE (api.rst 4.43, KVM_CAP_XSAVE) with what ``get_xsave`` gave, here or elsewhere.

        A longer area than this host's is taken if the rest is zero.  Raises UsageError for a shorter one,
        KvmError (EINVAL) for components that the host or the guest's CPUID lacks.
        """
        size = self.vm.check_extension(Capability.XSAVE2) or _XSAVE_BYTES
        if len(area) < size or any(area[size:]):
            raise UsageError(f"This host's XSAVE area has {size} bytes, not {len(area)}.")
        # SAFETY: KVM reads exactly ``size`` bytes.
        self.ioctl(lib.KVM_SET_XSAVE, ffi.new("__u8[]", area[:size]), "KVM_SET_XSAVE", _XSAVE_REFUSALS)

    def get_xcrs(self) -> dict[int, int]:
        """KVM_GET_XCRS (api.rst 4.44, KVM_CAP_XCRS): extended control registers by index; 0 is XCR0."""
        xcrs = ffi.new("struct kvm_xcrs *")
        self.ioctl(lib.KVM_GET_XCRS, xcrs, "KVM_GET_XCRS")
        return {xcrs.xcrs[i].xcr: xcrs.xcrs[i].value for i in range(xcrs.nr_xcrs)}

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_XCRS (api.rst 4.45, KVM_CAP_XCRS).  Raises UsageError, KvmError (EINVAL)."""
        if len(values) > lib.KVM_MAX_XCRS:
            raise UsageError(f"KVM knows at most {lib.KVM_MAX_XCRS} XCRs.")
        xcrs = ffi.new("struct kvm_xcrs *", {"nr_xcrs": len(values)})
        for i, (index, value) in enumerate(values.items()):
            fill(xcrs.xcrs[i], xcr=index, value=value)
        self.ioctl(lib.KVM_SET_XCRS, xcrs, "KVM_SET_XCRS", _XCR_REFUSALS)
