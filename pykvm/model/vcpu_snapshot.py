"""Saving and loading the whole state of a vCPU, in the form that real KVM's has.

A state goes from one to the other as long as the guest uses what both have: the model has no LAPIC, no
paravirtual registers and no state components beyond SSE and PKRU.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Final

from pykvm.errors import PendingExitError, UsageError
from pykvm.machine.state import Msr, VcpuState, Xcr
from pykvm.model.cpu.msrs import supported_msrs
from pykvm.model.vcpu_events import VcpuEventState
from pykvm.model.vcpu_floating import VcpuFloating
from pykvm.model.vcpu_registers import VcpuRegisters

if TYPE_CHECKING:
    from pykvm.machine.exits import Exit

_HOST_FACTS: Final = frozenset({0x8B, 0xCE, 0x10A, 0x345, 0x4B564D05})
"""What tells a guest about its host and is the host's: microcode revision, platform information,
architectural and performance capabilities, and KVM's offer to poll for halted guests."""


class VcpuSnapshot(VcpuRegisters, VcpuFloating, VcpuEventState):
    """save_state and load_state."""

    @abstractmethod
    def complete_io(self) -> Exit | None:
        """Complete the instruction of the last exit; another exit where it needs one."""

    def save_state(self) -> VcpuState:
        """The whole state; the vCPU can go on afterwards.

        Raises PendingExitError where the last instruction needs its host once more, UsageError where an
        exit waits for its answer, BusyError while it runs, ClosedError.
        """
        exit = self.complete_io()
        if exit is not None:
            raise PendingExitError(
                f"{self.name} is amid an instruction that needs {exit!r} handled; do so, then save again.",
                exit,
            )
        special = self.get_special_registers()
        special.pdptrs = self.get_special_registers2().pdptrs
        return VcpuState(
            cpuid=self.get_cpuid(),
            registers=self.get_registers(),
            special=special,
            xsave=self.get_xsave(),
            xcrs=tuple(Xcr(index, value) for index, value in self.get_xcrs().items()),
            msrs=tuple(Msr(*pair) for pair in self.get_readable_msrs(supported_msrs()).items()),
            events=self.get_events(),
            mp_state=self.get_mp_state(),
            debug=self.get_debug_registers(),
        )

    def load_state(self, state: VcpuState) -> None:
        """Make this vCPU go on from ``state``; best a fresh one, as CPUID is fixed by the first run.

        Raises UsageError for a state with a LAPIC; MsrError or KvmError where the model cannot take over a
        part, after which the vCPU is of no use.
        """
        if state.lapic is not None:
            raise UsageError(
                f"The state comes from a vCPU with a LAPIC in the kernel, and {self.name} is different; the "
                "model has none."
            )
        if self.get_cpuid() != state.cpuid:
            self.set_cpuid(state.cpuid)
        if state.special.pdptrs is None:
            self.set_special_registers(state.special)
        else:
            self.set_special_registers2(state.special)
        self.set_registers(state.registers)
        self.abandon_io()
        self.set_xcrs({xcr.index: xcr.value for xcr in state.xcrs})
        self.set_xsave(state.xsave)
        self.set_debug_registers(state.debug)
        self._load_msrs({msr.index: msr.value for msr in state.msrs})
        self.set_events(state.events)
        self.set_mp_state(state.mp_state)

    def _load_msrs(self, values: dict[int, int]) -> None:
        current = self.get_readable_msrs(values)
        # One that the model does not know and that was 0 belongs to a feature that the guest never used.
        self.set_msrs(
            {
                index: value
                for index, value in values.items()
                if current.get(index, 0) != value and index not in _HOST_FACTS
            }
        )
