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
    and their logs and statistics are exactly what it would report.  ``gathers`` False: one thread runs all
    vCPUs of a machine, one after the other, so none waits for the others to begin.
    """

    backend = "model"

    def __init__(
        self,
        seed: int = 0,
        *,
        translate: bool = True,
        profile: Profile | None = None,
        gathers: bool = True,
    ) -> None:
        self.seed = seed
        self.gathers = gathers
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
        machine: ModelMachine
        if self.profile is not None:
            machine = ProfiledMachine(self.supported_cpuid, self.seed, self.profile)
        else:
            machine = ModelMachine(self.supported_cpuid, self.seed, translate=self.translate)
        machine.schedule.gathers = self.gathers
        return machine

    def close(self) -> None:
        """No further machines; those that exist go on."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
