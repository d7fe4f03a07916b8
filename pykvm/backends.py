"""Opening a source of machines by the name of its backend."""

from __future__ import annotations

from pykvm.errors import HostError, KvmError, UsageError
from pykvm.kvm import KvmSystem
from pykvm.machine import System
from pykvm.model.system import ModelSystem
from pykvm.profiles import Profile

BACKENDS = ("auto", "kvm", "model")


def open_system(backend: str = "auto", *, device: str = "/dev/kvm", profile: Profile | None = None) -> System:
    """The system behind ``backend``: ``kvm``, ``model``, or ``auto`` (kvm where it can create a VM).

    ``device`` is the KVM device node.  ``profile`` gives the model KVM's MMU of such a host (see
    ModelSystem); a real KVM has that of its own.  ``description`` of what comes back tells which it is, and
    why.  Raises DeviceMissingError and DevicePermissionError for ``kvm``, UsageError for another name.
    """
    if backend == "kvm":
        return KvmSystem(device)
    if backend == "model":
        return ModelSystem(profile=profile)
    if backend != "auto":
        raise UsageError(f"Backend {backend!r} does not exist; use one of: {', '.join(BACKENDS)}.")
    try:
        return _usable_kvm(device)
    except (HostError, KvmError) as error:
        model = ModelSystem(profile=profile)
        model.description += f" (chosen since there is no usable KVM: {str(error).rstrip('.')})"
        return model


def _usable_kvm(device: str) -> System:
    system = KvmSystem(device)
    try:
        system.create_machine().close()
    except BaseException:
        system.close()
        raise
    system.description += " (chosen because it can create a VM)"
    return system
