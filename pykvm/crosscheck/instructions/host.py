"""Cases on the host's own processor."""

from __future__ import annotations

from pykvm.crosscheck.instructions.case import InstructionCase, Outcome
from pykvm.observe import HostCase, HostCpu
from pykvm.observe.refusals import refusal


class HostExecutor:
    """The traced child; CPL 3 of 64- and 32-bit code."""

    name = "host"

    def __init__(self, mode: int) -> None:
        self._cpu = HostCpu(mode)

    def accepts(self, case: InstructionCase) -> bool:
        return case.mode == self._cpu.bits and case.cpl == 3 and refusal(case.code, case.mode) is None

    def execute(self, case: InstructionCase) -> Outcome:
        done = self._cpu.execute(
            HostCase(case.code, case.registers, case.floating, case.memory, case.fs_base, case.gs_base)
        )
        return Outcome(
            done.registers, done.memory, done.floating, done.vector, error=None, address=done.address
        )

    def close(self) -> None:
        self._cpu.close()
