"""Which emulator carries a kind of KVM on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pykvm.errors import HostError
from pykvm.lab.cache import Cache
from pykvm.lab.emulator import Emulator
from pykvm.lab.kinds import Kind
from pykvm.lab.qemu import Qemu, why_not_kvm
from pykvm.lab.toolbox import qemu

Accel = Literal["auto", "emulate", "kvm"]


def choose(cache: Cache, kind: Kind, accel: Accel, note: Callable[[str], None]) -> Emulator:
    """The emulator for ``kind``, prepared if it was not.

    ``auto`` takes the machine's own KVM where that lets a guest have the vendor's virtualization, and
    emulates elsewhere: AMD's under QEMU's TCG, Intel's under Bochs.  HostError if ``kvm`` is asked for and
    not to be had.
    """
    why = why_not_kvm(kind)
    if accel == "kvm" and why:
        raise HostError(f"The lab cannot run on KVM: {why}; use --accel emulate.")
    if accel == "kvm" or (accel == "auto" and not why):
        return _qemu(cache, "kvm", note)
    if kind.vendor == "amd":
        return _qemu(cache, "tcg", note)
    from pykvm.lab.bochs import bochs  # only Intel's kinds need it

    return bochs(cache, note)


def _qemu(cache: Cache, accel: Literal["tcg", "kvm"], note: Callable[[str], None]) -> Qemu:
    argv, version = qemu(cache, note)
    return Qemu(argv, version, accel)
