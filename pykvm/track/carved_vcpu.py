"""A vCPU whose writes to tracked pages are applied and reported before anybody sees their exits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pykvm.errors import PendingExitError
from pykvm.machine import CpuidEntry, Exit, MmioWrite, Registers, SpecialRegisters, Statistics, Vcpu

if TYPE_CHECKING:
    from pykvm.machine.state import VcpuState
    from pykvm.track.carved import CarvedMachine


class CarvedVcpu:
    """See pykvm.machine.Vcpu; what a real vCPU has beyond the Protocol is passed through.

    ``run`` returns Kicked, too, when a change of the tracked pages needed the vCPU outside for a moment.
    """

    def __init__(self, machine: CarvedMachine, real: Vcpu) -> None:
        self.vm = machine
        self.real = real

    @property
    def id(self) -> int:
        return self.real.id

    @property
    def running(self) -> bool:
        return self.real.running

    def run(self) -> Exit:
        """Run to an exit that is not a write to memory of a slot; see pykvm.machine.Vcpu.run.

        What a node raises comes through, after the write was applied and all nodes were told.
        """
        gate, run = self.vm.gate, self.real.run
        while True:
            gate.enter(self.real)
            try:
                exit = run()
            finally:
                gate.leave()
            if not (isinstance(exit, MmioWrite) and self.vm.guest_wrote(self.id, exit)):
                return exit

    def save_state(self) -> VcpuState:
        """As pykvm.machine.Vcpu.save_state, with the writes of the instruction that is completed first."""
        while True:
            try:
                return self.real.save_state()
            except PendingExitError as pending:
                exit = pending.exit
                if not (isinstance(exit, MmioWrite) and self.vm.guest_wrote(self.id, exit)):
                    raise

    def reply(self, data: bytes) -> None:
        self.real.reply(data)

    def kick(self, wait: float | None = None) -> None:
        self.real.kick(wait)

    def listen(self, ports: Iterable[int] | None) -> None:
        self.real.listen(ports)

    def get_registers(self) -> Registers:
        return self.real.get_registers()

    def set_registers(self, registers: Registers) -> None:
        self.real.set_registers(registers)

    def get_special_registers(self) -> SpecialRegisters:
        return self.real.get_special_registers()

    def set_special_registers(self, registers: SpecialRegisters) -> None:
        self.real.set_special_registers(registers)

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        self.real.set_cpuid(entries)

    def load_state(self, state: VcpuState) -> None:
        self.real.load_state(state)

    def statistics(self) -> Statistics:
        return self.real.statistics()

    def close(self) -> None:
        self.real.close()

    def __getattr__(self, name: str) -> Any:
        if name == "real":  # not set yet
            raise AttributeError(name)
        return getattr(self.real, name)

    def __repr__(self) -> str:
        return f"<CarvedVcpu around {self.real!r}>"
