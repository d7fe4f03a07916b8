"""QEMU as a lab's emulator: TCG, which emulates SVM, or KVM where the host lets its guests have VMX or SVM.

One processor: under TCG with two a guest kernel was seen to crash while patching its own text, and time
under emulation is no more parallel for it.  The wire is a virtio-serial port backed by a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pykvm.lab.cpio import join
from pykvm.lab.emulator import Boot, Launch
from pykvm.lab.kinds import Kind, Vendor

Accel = Literal["tcg", "kvm"]

_PORT = "pykvm.wire"


def nested_vendor(
    cpuinfo: Path = Path("/proc/cpuinfo"), modules: Path = Path("/sys/module")
) -> Vendor | None:
    """Whose virtualization a KVM guest of this machine could have, or None.

    /dev/kvm must be usable, the processor have the flag, the vendor's module nest.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return None
    try:
        flags = set(
            next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "").split()
        )
    except OSError:
        return None
    vendors: tuple[tuple[str, Vendor], ...] = (("svm", "amd"), ("vmx", "intel"))
    for flag, vendor in vendors:
        nested = modules / f"kvm_{vendor}" / "parameters" / "nested"
        if flag in flags and nested.is_file() and nested.read_text().strip() in ("1", "Y"):
            return vendor
    return None


def why_not_kvm(kind: Kind) -> str:
    """Why QEMU cannot run a lab of that kind on this machine's own KVM; empty if it can."""
    vendor = nested_vendor()
    if vendor is None:
        return "this machine has no usable /dev/kvm with nested virtualization"
    if vendor != kind.vendor:
        return f"this machine's nested virtualization is {vendor}'s and {kind.name} needs {kind.vendor}'s"
    return ""


@dataclass(frozen=True)
class Qemu:
    """``argv`` starts qemu-system-x86_64 with its data folders; ``version`` is like 10.0.13."""

    argv: tuple[str, ...]
    version: str
    accel: Accel

    @property
    def name(self) -> str:
        return f"QEMU {self.version}, {'KVM' if self.accel == 'kvm' else 'TCG'}"

    @property
    def slug(self) -> str:
        return f"qemu-{self.accel}"

    @property
    def wire_device(self) -> str:
        return "/dev/vport0p1"

    @property
    def modules(self) -> tuple[str, ...]:
        return ("virtio_pci", "virtio_console")

    @property
    def parameters(self) -> Mapping[str, str]:
        return {}

    @property
    def boot_timeout(self) -> float:
        return 180.0

    @property
    def default_memory(self) -> int:
        return 3072

    def launch(self, boot: Boot) -> Launch:
        """QEMU takes one initrd, so the layers are joined in the run's folder."""
        initrd, console, wire = (boot.folder / name for name in ("initrd", "console.log", "wire"))
        join(boot.layers, initrd)
        wire.touch()
        processor = "host" if self.accel == "kvm" else "max,+svm"
        argv = (
            *self.argv, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
            "-machine", f"pc,accel={self.accel},usb=off", "-cpu", processor, "-smp", "1",
            "-m", f"{boot.memory}M",
            "-kernel", str(boot.kernel.image), "-initrd", str(initrd), "-append", " ".join(boot.append),
            "-chardev", f"file,id=console,path={_escaped(console)}", "-serial", "chardev:console",
            "-device", "virtio-serial-pci", "-chardev", f"file,id=wire,path={_escaped(wire)}",
            "-device", f"virtserialport,chardev=wire,name={_PORT}",
        )  # fmt: skip
        return Launch(argv, console, wire)


def _escaped(path: Path) -> str:
    """A path within a comma-separated option."""
    return str(path).replace(",", ",,")
