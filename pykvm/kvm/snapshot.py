"""Saving and loading the whole state of a vCPU and of a VM.

The order matters, since parts depend on each other.

Saving: first an entry that ends at once (immediate_exit) completes the instruction whose I/O the last exit
was for: until then the registers may still show it as not executed (api.rst section 5; on AMD an OUT leaves
RIP behind, docs/reference/hosts.md C.3).  Then the MP state, since asking for it takes a pending INIT or
SIPI, which changes registers.  The rest in any order, as the vCPU stands still.

Loading: CPUID first, which decides what everything else may hold; the TSC's frequency before its value; the
special registers, whose APIC base sets the LAPIC's mode and whose EFER and CR4 others are checked against;
the general registers; XCRs and the XSAVE area; debug registers; the LAPIC before the MSRs, as
IA32_TSC_DEADLINE only counts in a LAPIC in that mode; the events after all that could raise or drop one; and
the MP state last, as SIPI needs the LAPIC.

MSRs: all that the host lists (KVM_GET_MSR_INDEX_LIST) and can read for this guest.  Loading writes only those
that differ from what the vCPU has.  So a read-only or unsupported register that agrees is no obstacle, and
paravirtual ones that a guest never enabled are not written, which would dirty its memory (hosts.md E).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pykvm.abi import lib
from pykvm.errors import KvmError, PendingExitError, UsageError
from pykvm.kvm.capabilities import Capability
from pykvm.kvm.clock import VcpuClock, VmClock
from pykvm.kvm.cpuid import VcpuCpuid
from pykvm.kvm.events import VcpuEventState
from pykvm.kvm.floating import VcpuFloating
from pykvm.kvm.interrupts import VmInterrupts
from pykvm.kvm.msrs import VcpuMsrs
from pykvm.kvm.pit import VmPit
from pykvm.kvm.registers import VcpuRegisters
from pykvm.machine.state import MachineState, Msr, VcpuState, Xcr
from pykvm.x86.bits import Cr0, Cr4, Efer

if TYPE_CHECKING:
    from pykvm.abi.library import CData
    from pykvm.kvm.vm import KvmVm
    from pykvm.machine.exits import Exit
    from pykvm.x86.registers import SpecialRegisters

_TSC_DEADLINE = 0x6E0


class VcpuSnapshot(VcpuRegisters, VcpuCpuid, VcpuMsrs, VcpuFloating, VcpuEventState, VcpuClock):
    """save_state and load_state of a vCPU."""

    if TYPE_CHECKING:
        vm: KvmVm
        _page: CData | None
        _state: CData
        _answer: tuple[int, int] | None

        def _slow(self, code: int, page: CData) -> Exit: ...

    def complete_io(self) -> Exit | None:
        """Complete the instruction of the last IoOut, IoIn, MmioWrite or MmioRead without going on.

        KVM_RUN with immediate_exit (api.rst section 5, KVM_CAP_IMMEDIATE_EXIT).  None, or another exit that
        the same instruction needs (the next part of a wide or string access): handle it, then ask again.  A
        kick that arrives meanwhile still ends the next run.  Raises UsageError while an IoIn or MmioRead
        waits for its answer.
        """
        page = self._page
        if page is None:
            raise self._closed_error()
        if self._answer is not None:
            raise UsageError(f"{self.name} waits for the answer to its last exit; call reply first.")
        entries = self._state.entries
        code = lib.PYKVM_RUN_INTERRUPTED
        # A signal for Python keeps it from entering KVM, which has then completed nothing: once more, after
        # the interpreter has handled the signal between two turns.
        while code == lib.PYKVM_RUN_INTERRUPTED and self._state.entries == entries:
            # SAFETY: the struct and the page are held by this frame and object for the length of the call.
            page.immediate_exit = 1
            code = lib.pykvm_vcpu_run(self._state, page)
        if code == lib.PYKVM_RUN_INTERRUPTED:
            return None
        if code == lib.PYKVM_RUN_KICKED:
            lib.pykvm_vcpu_kick(self._state, page)
            return None
        # immediate_exit stays set: a kick may have set it too, and it costs the next run one silent turn.
        return self._slow(lib.KVM_EXIT_IO if code > lib.PYKVM_RUN_PACKED_IO else code, page)

    def save_state(self) -> VcpuState:
        """The whole state, in the order that the module describes; the vCPU can go on afterwards.

        Raises PendingExitError where the last instruction needs its host once more (see ``complete_io``),
        UsageError where an exit waits for its answer, BusyError while it runs, ClosedError, KvmError.
        """
        exit = self.complete_io()
        if exit is not None:
            raise PendingExitError(
                f"{self.name} is amid an instruction that needs {exit!r} handled; do so, then save again.",
                exit,
            )
        mp_state = int(self.get_mp_state())
        special = self.get_special_registers()
        if _uses_pae_pointers(special) and self.vm.check_extension(Capability.SREGS2):
            special.pdptrs = self.get_special_registers2().pdptrs
        return VcpuState(
            cpuid=self.get_cpuid(),
            registers=self.get_registers(),
            special=special,
            xsave=self.get_xsave(),
            xcrs=tuple(Xcr(index, value) for index, value in self.get_xcrs().items()),
            msrs=tuple(Msr(*pair) for pair in self.get_readable_msrs(self.vm.msr_indices).items()),
            events=self.get_events(),
            mp_state=mp_state,
            debug=self.get_debug_registers(),
            lapic=self._lapic(),
            tsc_khz=self._tsc_khz(),
        )

    def load_state(self, state: VcpuState) -> None:
        """Make this vCPU go on from ``state``; best a fresh one, as CPUID is fixed by the first run.

        Raises UsageError where one of both has a LAPIC in the kernel and the other has not; MsrError or
        KvmError where this host cannot take over a part, after which the vCPU is of no use.
        """
        if (state.lapic is None) != (self._lapic() is None):
            raise UsageError(
                "The state comes from a vCPU "
                + ("without" if state.lapic is None else "with")
                + f" a LAPIC in the kernel, and {self.name} is different; "
                "create both VMs alike (create_irqchip)."
            )
        if self.get_cpuid() != state.cpuid:
            self.set_cpuid(state.cpuid)
        if state.tsc_khz is not None and state.tsc_khz != self._tsc_khz():
            self.set_tsc_khz(state.tsc_khz)
        if state.special.pdptrs is None:
            self.set_special_registers(state.special)
        else:
            self.vm.require(Capability.SREGS2, "A saved state in PAE mode")
            self.set_special_registers2(state.special)
        self.set_registers(state.registers)
        self.set_xcrs({xcr.index: xcr.value for xcr in state.xcrs})
        self.set_xsave(state.xsave)
        self.set_debug_registers(state.debug)
        if state.lapic is not None:
            self.set_lapic(state.lapic)
        self._load_msrs({msr.index: msr.value for msr in state.msrs})
        self.set_events(state.events)
        self.set_mp_state(state.mp_state)

    def _load_msrs(self, values: dict[int, int]) -> None:
        current = self.get_readable_msrs(values)
        # One that this host does not know and that was 0 belongs to a feature that the guest never used.
        changed = {index: value for index, value in values.items() if current.get(index, 0) != value}
        if _TSC_DEADLINE in changed:
            changed[_TSC_DEADLINE] = changed.pop(_TSC_DEADLINE)  # to the end: it counts in terms of the TSC
        self.set_msrs(changed)

    def _lapic(self) -> bytes | None:
        try:
            return self.get_lapic()
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise
            return None

    def _tsc_khz(self) -> int | None:
        try:
            return self.get_tsc_khz()
        except KvmError as error:
            if error.errno not in (errno.EIO, errno.ENOTTY):
                raise
            return None


def _uses_pae_pointers(special: SpecialRegisters) -> bool:
    return bool(special.cr0 & Cr0.PG and special.cr4 & Cr4.PAE and not special.efer & Efer.LMA)


class VmSnapshot(VmInterrupts, VmPit, VmClock):
    """save_state and load_state of a VM: what belongs to no vCPU, and is no memory."""

    def save_state(self) -> MachineState:
        """kvmclock, and the interrupt controllers and the timer where they were created.

        With the vCPUs stopped and saved.  Raises KvmError, ClosedError.
        """
        return MachineState(
            clock=self.get_clock(),
            irqchips=self.get_irqchips() if self.has_irqchip else None,
            pit=self.get_pit() if self.has_pit else None,
        )

    def load_state(self, state: MachineState) -> None:
        """Take over ``state``; after the vCPUs.  kvmclock goes on from the saved value, as the TSCs do.

        Raises UsageError unless this VM has the same controllers; KvmError, ClosedError.
        """
        for what, saved, here in (
            ("interrupt controllers", state.irqchips, self.has_irqchip),
            ("a timer", state.pit, self.has_pit),
        ):
            if (saved is not None) != here:
                raise UsageError(
                    f"The state comes from a VM {'with' if saved else 'without'} {what} in the kernel, and "
                    "this one is different; create both alike (create_irqchip, create_pit)."
                )
        if state.irqchips is not None:
            self.set_irqchips(state.irqchips)
        if state.pit is not None:
            self.set_pit(state.pit)
        if state.clock is not None:
            self.set_clock(state.clock.clock)
