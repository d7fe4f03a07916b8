"""CPUID of the host and of vCPUs (api.rst 4.46, 4.88)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import KvmError, UsageError
from pykvm.kvm.capabilities import Capability, Extensions
from pykvm.kvm.fields import fill
from pykvm.x86.cpuid import CpuidEntry

if TYPE_CHECKING:
    from pykvm.abi.library import CData

MAX_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES (arch/x86/include/asm/kvm_host.h)
_FIELDS = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
_REFUSALS: Refusals = {
    errno.EINVAL: (
        KvmError,
        "the vCPU ran already, after which its CPUID is fixed, or a leaf asks for what the host lacks "
        "(e.g. more physical or linear address bits); set CPUID before the first run.",
    ),
}


def _new(capacity: int) -> CData:
    # SAFETY: the array has room for ``nent`` entries, which is what KVM reads or fills at most.
    return ffi.new("struct pykvm_cpuid2 *", {"nent": capacity, "entries": capacity})


_UNTOUCHED = 0xFFFFFFFF
"""As the flags of an entry: KVM has not filled it (it knows three flags)."""


def _read(owner: Managed, request: int, operation: str) -> tuple[CpuidEntry, ...]:
    """All leaves that an ioctl gives, with a buffer as large as KVM ever fills.

    Older kernels' KVM_GET_CPUID2 (6.1) leaves ``nent`` as it was, so what it did not fill is told by a mark.
    """
    table = _new(MAX_ENTRIES)
    for entry in table.entries:
        entry.flags = _UNTOUCHED
    owner.ioctl(request, table, operation)
    filled = (table.entries[i] for i in range(table.nent))
    return tuple(
        CpuidEntry(*(getattr(entry, field) for field in _FIELDS))
        for entry in filled
        if entry.flags != _UNTOUCHED
    )


class SystemCpuid(Extensions):
    """What the host can give a guest."""

    @cached_property
    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_SUPPORTED_CPUID (api.rst 4.46, KVM_CAP_EXT_CPUID): what KVM and the processor support.

        Topology and APIC ids in it are those of the host CPU that asked.
        """
        return _read(self, lib.KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID")

    def get_emulated_cpuid(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_EMULATED_CPUID (api.rst 4.88, KVM_CAP_EXT_EMUL_CPUID): features KVM emulates though the
        processor lacks them.  Raises CapabilityError.
        """
        self.require(Capability.EXT_EMUL_CPUID, "KVM_GET_EMULATED_CPUID")
        return _read(self, lib.KVM_GET_EMULATED_CPUID, "KVM_GET_EMULATED_CPUID")


class VcpuCpuid(Managed):
    """CPUID of a vCPU (KVM_CAP_EXT_CPUID)."""

    def get_cpuid(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_CPUID2 (api.rst 4.46): the leaves as the guest sees them.

        They may differ from what was set: KVM keeps bits that mirror control registers up to date
        (OSXSAVE, OSPKE, the size of the XSAVE area).
        """
        return _read(self, lib.KVM_GET_CPUID2, "KVM_GET_CPUID2")

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """KVM_SET_CPUID2 (api.rst 4.20, 4.46); before the first run.

        Raises UsageError for more than 256 leaves or a field beyond 32 bits, KvmError where KVM refuses.
        """
        if len(entries) > MAX_ENTRIES:
            raise UsageError(f"{len(entries)} CPUID leaves are too many; KVM takes at most {MAX_ENTRIES}.")
        table = _new(len(entries))
        for i, entry in enumerate(entries):
            fill(table.entries[i], **{field: getattr(entry, field) for field in _FIELDS})
        self.ioctl(lib.KVM_SET_CPUID2, table, "KVM_SET_CPUID2", _REFUSALS)
