"""A virtual machine (api.rst 4.2, 4.7)."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pykvm.abi import lib
from pykvm.abi.managed import Refusals
from pykvm.errors import CapabilityError, KvmError, UsageError
from pykvm.kvm.capabilities import Capability
from pykvm.kvm.ioevents import VmIoEvents
from pykvm.kvm.rings import VmRings
from pykvm.kvm.snapshot import VmSnapshot
from pykvm.kvm.statistics import Measured
from pykvm.kvm.tuning import VmTuning
from pykvm.kvm.vcpu import KvmVcpu

if TYPE_CHECKING:
    from pykvm.kvm.system import KvmSystem
    from pykvm.x86.cpuid import CpuidEntry


class KvmVm(VmRings, VmSnapshot, VmIoEvents, VmTuning, Measured):
    """A VM of the real KVM; see pykvm.machine.Machine.  Closing it closes its vCPUs first."""

    backend = "kvm"

    def __init__(self, system: KvmSystem, fd: int) -> None:
        super().__init__(fd)
        self.system = system
        self._vcpus: list[KvmVcpu] = []
        # Asked now, since the system may be closed first.
        self._vcpu_mmap_size = system.vcpu_mmap_size
        self._supported_cpuid = system.supported_cpuid
        self.msr_indices = system.msr_indices
        """See KvmSystem.msr_indices."""

    @property
    def name(self) -> str:
        return "The VM"

    @property
    def vcpus(self) -> Sequence[KvmVcpu]:
        """The vCPUs in order of creation."""
        return tuple(self._vcpus)

    @property
    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """See KvmSystem.supported_cpuid."""
        return self._supported_cpuid

    def _ring_vcpus(self) -> Sequence[KvmVcpu]:
        return self._vcpus

    def create_vcpu(self, vcpu_id: int | None = None) -> KvmVcpu:
        """KVM_CREATE_VCPU (api.rst 4.7); the id (APIC id) defaults to the number of vCPUs so far.

        Raises KvmError: EEXIST for an id in use, EINVAL beyond KVM_CAP_MAX_VCPU_ID.
        """
        with self._slots_lock:
            vcpu_id = len(self._vcpus) if vcpu_id is None else vcpu_id
            if not 0 <= vcpu_id < 1 << 32:
                raise UsageError(f"A vCPU id of {vcpu_id} is not an unsigned 32-bit number.")
            refusals: Refusals = {
                errno.EEXIST: (KvmError, f"this VM has a vCPU {vcpu_id} already."),
                errno.EINVAL: (KvmError, f"vCPU id {vcpu_id} is beyond KVM_CAP_MAX_VCPU_ID."),
            }
            fd = self.ioctl_int(lib.KVM_CREATE_VCPU, vcpu_id, "KVM_CREATE_VCPU", refusals)
            vcpu = KvmVcpu(self, vcpu_id, fd, self._vcpu_mmap_size, self.ring_entries)
            self._vcpus.append(vcpu)
            return vcpu

    def enable_manual_protect(self, initially_set: bool = False) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (api.rst 7.18): GET only reads, CLEAR re-protects.

        ``initially_set``: new bitmaps start all ones and nothing is protected until its first CLEAR.
        Raises CapabilityError where the host lacks it.
        """
        flags = lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
        if initially_set:
            flags |= lib.KVM_DIRTY_LOG_INITIALLY_SET
        offered = self.check_extension(Capability.MANUAL_DIRTY_LOG_PROTECT2)
        if offered & flags != flags:
            raise CapabilityError(
                "This kernel lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"
                + (" with INITIALLY_SET" if initially_set and offered else "")
                + "; use the bitmap tracker."
            )
        self.enable_cap(Capability.MANUAL_DIRTY_LOG_PROTECT2, flags)

    def close(self) -> None:
        """Close the VM and its vCPUs, kicking those that run; its slots let their memory go."""
        super().close()
        with self._slots_lock:
            vcpus = list(self._vcpus)  # no further one can be made
        for vcpu in vcpus:
            vcpu.close()
        # The guest must be out before its memory goes.  It was kicked, so this takes microseconds.
        deadline = time.monotonic() + 5
        while any(vcpu.occupied for vcpu in vcpus) and time.monotonic() < deadline:
            time.sleep(20e-6)
        self.close_statistics()
        with self._ring_lock:
            for vcpu in vcpus:
                if vcpu.ring is not None:
                    vcpu.ring.close()
        if any(vcpu.occupied for vcpu in vcpus):
            return  # memory that a guest still reaches stays mapped, rather than become somebody else's
        with self._slots_lock:
            for slot in self._slots.values():
                slot.retire()
            self._slots.clear()
