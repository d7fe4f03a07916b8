"""Where machines of the model come from."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from pykvm.errors import ClosedError
from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.machine import ModelMachine
from pykvm.model.profiled.machine import ProfiledMachine

if TYPE_CHECKING:
    from pykvm.profiles import Profile
    from pykvm.x86.cpuid import CpuidEntry


class ModelSystem:
    """A source of machines that need no /dev/kvm; see pykvm.machine.System.

    ``seed`` decides how the vCPUs of a machine take turns; without ``translate`` their processors are plain
    interpreters, which only takes longer.  With a ``profile`` the machines have the MMU of such a KVM host,
    and their logs and statistics are exactly what it would report.
    """

    backend = "model"

    def __init__(self, seed: int = 0, *, translate: bool = True, profile: Profile | None = None) -> None:
        self.seed = seed
        self.translate = translate
        self.profile = profile
        self.description = "reference machine in pure Python"
        if profile is not None:
            self.description += f" on KVM's MMU of {profile.name}@{profile.era}"
        self._closed = False

    @property
    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """The leaves of the reference processor."""
        return supported_cpuid()

    def create_machine(self) -> ModelMachine:
        """A fresh machine without memory and vCPUs.  Raises ClosedError."""
        if self._closed:
            raise ClosedError("The system is closed; open a new one.")
        if self.profile is not None:
            return ProfiledMachine(self.supported_cpuid, self.seed, self.profile)
        return ModelMachine(self.supported_cpuid, self.seed, translate=self.translate)

    def close(self) -> None:
        """No further machines; those that exist go on."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
