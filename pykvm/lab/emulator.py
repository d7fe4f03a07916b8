"""What a lab needs of an emulator: a command line that boots a kernel with layers and leaves two files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pykvm.lab.kernels import PreparedKernel


@dataclass(frozen=True)
class Boot:
    """One boot: the kernel, its layers in order (the first has /init), its command line, RAM in MiB.

    ``folder`` belongs to this boot alone.
    """

    folder: Path
    kernel: PreparedKernel
    layers: tuple[Path, ...]
    append: tuple[str, ...]
    memory: int


@dataclass(frozen=True)
class Launch:
    """A process to start; ``console`` and ``wire`` are files that it appends to while the guest runs."""

    argv: tuple[str, ...]
    console: Path
    wire: Path


class Emulator(Protocol):
    """QEMU or Bochs, as found on this machine."""

    @property
    def name(self) -> str:
        """For people: ``QEMU 10.0.13, TCG``."""
        ...

    @property
    def slug(self) -> str:
        """For programs: ``qemu-tcg``, ``qemu-kvm`` or ``bochs``."""
        ...

    @property
    def wire_device(self) -> str:
        """The wire's device in the guest."""
        ...

    @property
    def modules(self) -> tuple[str, ...]:
        """Kernel modules that the guest needs for the wire."""
        ...

    @property
    def parameters(self) -> Mapping[str, str]:
        """Parameters of modules that this emulator needs besides those of the kind."""
        ...

    @property
    def default_memory(self) -> int:
        """RAM of the guest in MiB if nobody says otherwise."""
        ...

    @property
    def boot_timeout(self) -> float:
        """Seconds after which a guest that has not started its command is taken for dead."""
        ...

    def launch(self, boot: Boot) -> Launch:
        """Prepare ``boot.folder`` and say what to start."""
        ...
