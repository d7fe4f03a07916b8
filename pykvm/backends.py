"""Opening a source of machines by the name of its backend."""

from __future__ import annotations

from pykvm.errors import BackendError, HostError, KvmError, UsageError
from pykvm.kvm import KvmSystem
from pykvm.machine import System

BACKENDS = ("auto", "kvm", "model")


def open_system(backend: str = "auto", *, device: str = "/dev/kvm") -> System:
    """The system behind ``backend``: ``kvm``, ``model``, or ``auto`` (kvm where it can create a VM).

    ``device`` is the KVM device node.  Raises DeviceMissingError, DevicePermissionError, BackendError,
    and UsageError for another name.
    """
    if backend == "kvm":
        return KvmSystem(device)
    if backend == "model":
        raise BackendError("The reference machine is not part of this version; use --backend kvm.")
    if backend != "auto":
        raise UsageError(f"Backend {backend!r} does not exist; use one of: {', '.join(BACKENDS)}.")
    system = KvmSystem(device)
    try:
        system.create_machine().close()
    except KvmError as error:
        system.close()
        raise HostError(f"{device} cannot create a VM: {error}") from error
    system.description += " (chosen because it can create a VM)"
    return system
