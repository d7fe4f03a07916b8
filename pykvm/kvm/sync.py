"""Register sets shared through the kvm_run page, which saves ioctls (api.rst 6.74)."""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING

from pykvm.abi import ffi
from pykvm.abi.managed import Managed
from pykvm.errors import CapabilityError, UsageError
from pykvm.kvm.capabilities import Capability
from pykvm.kvm.events import fill_events, read_events
from pykvm.kvm.registers import fill_general, fill_sregs, read_general, read_sregs

if TYPE_CHECKING:
    from pykvm.abi.library import CData
    from pykvm.kvm.vm import KvmVm
    from pykvm.machine.state import VcpuEvents
    from pykvm.x86.registers import Registers, SpecialRegisters


class SyncSet(IntFlag):
    """The register sets that can be shared (KVM_SYNC_X86_*); KVM_CAP_SYNC_REGS tells which are."""

    REGISTERS = 1
    SPECIAL = 2
    EVENTS = 4


class VcpuSync(Managed):
    """KVM copies the chosen sets into the kvm_run page at each exit, and takes changed ones from it at entry.

    The values belong to the last exit: read or put them between two runs, on the thread that runs.
    """

    if TYPE_CHECKING:
        vm: KvmVm
        _page: CData | None

    def share_registers(self, sets: SyncSet) -> None:
        """Have these sets copied out at each exit from the next run on (KVM_CAP_SYNC_REGS, api.rst 6.74).

        Raises CapabilityError where the host cannot share one of them.
        """
        page, offered = self._sync_page(), self.vm.check_extension(Capability.SYNC_REGS)
        if sets & ~offered:
            raise CapabilityError(
                f"This host shares only {SyncSet(offered)!r} through kvm_run (KVM_CAP_SYNC_REGS); read the "
                "others with their own methods."
            )
        page.kvm_valid_regs = int(sets)

    def shared_registers(self) -> Registers:
        """The general registers at the last exit.  Raises UsageError unless REGISTERS are shared."""
        return read_general(ffi.addressof(self._shared(SyncSet.REGISTERS), "regs"))

    def shared_special_registers(self) -> SpecialRegisters:
        """The special registers at the last exit.  Raises UsageError unless SPECIAL are shared."""
        return read_sregs(self._shared(SyncSet.SPECIAL).sregs)

    def shared_events(self) -> VcpuEvents:
        """The events at the last exit.  Raises UsageError unless EVENTS are shared."""
        return read_events(self._shared(SyncSet.EVENTS).events)

    def put_shared(
        self,
        registers: Registers | None = None,
        special: SpecialRegisters | None = None,
        events: VcpuEvents | None = None,
    ) -> None:
        """Let the next run start with these.  Raises UsageError as the methods that set them.

        A value that KVM refuses makes that run raise KvmError (EINVAL).
        """
        page = self._sync_page()
        shared = ffi.cast("struct pykvm_sync_regs *", page.sync)
        dirty = SyncSet(0)
        if registers is not None:
            fill_general(ffi.addressof(shared, "regs"), registers)
            dirty |= SyncSet.REGISTERS
        if special is not None:
            fill_sregs(shared.sregs, special)
            dirty |= SyncSet.SPECIAL
        if events is not None:
            fill_events(shared.events, events)
            dirty |= SyncSet.EVENTS
        page.kvm_dirty_regs |= int(dirty)

    def _sync_page(self) -> CData:
        page = self._page
        if page is None:
            raise self._closed_error()
        return page

    def _shared(self, wanted: SyncSet) -> CData:
        page = self._sync_page()
        if not page.kvm_valid_regs & wanted:
            raise UsageError(f"{wanted!r} is not shared; call share_registers and run first.")
        # SAFETY: the sync area is part of the kvm_run page; reading happens while ``page`` keeps it mapped,
        # and only plain values leave this class.
        return ffi.cast("struct pykvm_sync_regs *", page.sync)
