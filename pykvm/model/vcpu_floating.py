"""x87, SSE and extended state of a vCPU (api.rst 4.22, 4.23, 4.42 to 4.45)."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final

from pykvm.errors import KvmError, UsageError
from pykvm.model.cpu import fpu_state
from pykvm.model.cpu.xstate import X87, supported_xcr0
from pykvm.model.vcpu_registers import VcpuPart, check_width
from pykvm.x86.fpu import FloatingPoint

MAX_XCRS: Final = 16
_XSTATE_BV: Final = 512
_COMPONENTS: Final = 19
"""How many state components are known (SDM vol. 1, 13.1)."""
_SCALARS: Final = {
    "fcw": 16, "fsw": 16, "ftwx": 8, "last_opcode": 16, "last_ip": 64, "last_dp": 64, "mxcsr": 32,
}  # fmt: skip


class VcpuFloating(VcpuPart):
    """Floating-point and extended state."""

    def get_fpu(self) -> FloatingPoint:
        """KVM_GET_FPU (api.rst 4.22) with MXCSR."""
        with self.use("KVM_GET_FPU") as cpu:
            return fpu_state.get_fpu(cpu)

    def set_fpu(self, value: FloatingPoint) -> None:
        """KVM_SET_FPU (api.rst 4.23).  Raises UsageError for values that do not fit."""
        for name, bits in _SCALARS.items():
            check_width(name, getattr(value, name), bits)
        with self.use("KVM_SET_FPU") as cpu:
            fpu_state.set_fpu(cpu, value)

    def get_xsave(self) -> bytes:
        """KVM_GET_XSAVE (api.rst 4.42): the area in the standard format, 4096 bytes."""
        with self.use("KVM_GET_XSAVE") as cpu:
            return fpu_state.get_xsave(cpu)

    def set_xsave(self, area: bytes) -> None:
        """KVM_SET_XSAVE (api.rst 4.43) with what ``get_xsave`` gave, here or on KVM.

        A longer area is taken if the rest is zero.  Raises UsageError for a shorter one, KvmError (EINVAL)
        for components or MXCSR bits that the model lacks.
        """
        size = fpu_state.XSAVE_BYTES
        if len(area) < size or any(area[size:]):
            raise UsageError(f"This host's XSAVE area has {size} bytes, not {len(area)}.")
        with self.use("KVM_SET_XSAVE") as cpu:
            present = int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little")
            try:
                if present >> _COMPONENTS:
                    raise UsageError("XSTATE_BV names components that no processor has.")
                fpu_state.set_xsave(cpu, area[:size])
            except UsageError as error:
                raise KvmError(errno.EINVAL, "KVM_SET_XSAVE", str(error)) from None

    def get_xcrs(self) -> dict[int, int]:
        """KVM_GET_XCRS (api.rst 4.44): 0 is XCR0."""
        with self.use("KVM_GET_XCRS") as cpu:
            return {0: cpu.xcr0}

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_XCRS (api.rst 4.45).  Raises UsageError, KvmError (EINVAL)."""
        if len(values) > MAX_XCRS:
            raise UsageError(f"KVM knows at most {MAX_XCRS} XCRs.")
        with self.use("KVM_SET_XCRS") as cpu:
            value = values.get(0)
            if value is None:
                return
            if not value & X87 or value & ~(supported_xcr0(cpu) | X87):
                raise KvmError(
                    errno.EINVAL,
                    "KVM_SET_XCRS",
                    "XCR0 needs bit 0, and only bits that the guest's CPUID leaf 0xd and the model have.",
                )
            cpu.xcr0 = value
