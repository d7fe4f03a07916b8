"""/dev/kvm itself (api.rst 4.1 to 4.5)."""

from __future__ import annotations

import errno
import os
from functools import cached_property
from typing import Final, Self

from pykvm.abi import lib
from pykvm.abi.managed import Refusals
from pykvm.errors import DeviceMissingError, DevicePermissionError, HostError, KvmError
from pykvm.kvm.cpuid import SystemCpuid
from pykvm.kvm.msrs import SystemMsrs
from pykvm.kvm.vm import KvmVm

_NEW_VM: Refusals = {
    errno.EBUSY: (KvmError, "another hypervisor uses the processor's virtualization; stop it first."),
    errno.EOPNOTSUPP: (KvmError, "the processor's virtualization is off; enable it in the firmware."),
    errno.EINVAL: (KvmError, "this host does not know the VM type; KVM_CAP_VM_TYPES lists the known ones."),
}

IDENTITY_MAP: Final = 0xFEFFC000
TSS: Final = IDENTITY_MAP + 0x1000
"""Where create_machine puts them: four pages below the last 16 MiB before 4 GiB, which firmware may take."""


class KvmSystem(SystemCpuid, SystemMsrs):
    """The system file descriptor: capabilities of the host, and the source of VMs.

    Raises DeviceMissingError, DevicePermissionError, or HostError where the API is not version 12.
    """

    backend = "kvm"

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DeviceMissingError(
                f"{path} does not exist: load the kvm module (kvm_intel or kvm_amd), enable virtualization "
                "in the firmware, or enable nested virtualization for this machine."
            ) from None
        except PermissionError:
            raise DevicePermissionError(
                f"No permission to open {path}: join the group that owns it "
                "('sudo usermod -aG kvm $USER', then log in again) or run as root."
            ) from None
        except OSError as error:
            raise DeviceMissingError(f"{path} cannot be opened: {error.strerror}.") from None
        super().__init__(self.new_handle(fd))
        self.description = f"real KVM at {path}"
        try:
            version = self.ioctl_int(lib.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")
        except OSError:
            self.close()
            raise DeviceMissingError(f"{path} is not a KVM device.") from None
        if version != lib.KVM_API_VERSION:
            self.close()
            raise HostError(f"KVM's API version is {version}; only {lib.KVM_API_VERSION} is known.")

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> Self:
        """Same as the constructor; reads better in a with statement."""
        return cls(path)

    @property
    def api_version(self) -> int:
        """KVM_GET_API_VERSION (api.rst 4.1); always 12."""
        return self.ioctl_int(lib.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")

    @cached_property
    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE in bytes (api.rst 4.5); the dirty ring is not part of it."""
        return self.ioctl_int(lib.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")

    def create_machine(self, vm_type: int = 0) -> KvmVm:
        """KVM_CREATE_VM (api.rst 4.2).  ``vm_type`` 0 is the ordinary one (KVM_CAP_VM_TYPES)."""
        fd = self.ioctl_int(lib.KVM_CREATE_VM, vm_type, "KVM_CREATE_VM", _NEW_VM)
        vm = KvmVm(self, fd)
        # Intel processors without unrestricted guest emulate real mode with pages that KVM puts somewhere:
        # not over the guest's, as the default of gpa 0 would (api.rst, KVM_SET_TSS_ADDR).
        vm.set_identity_map_address(IDENTITY_MAP)
        vm.set_tss_address(TSS)
        return vm
