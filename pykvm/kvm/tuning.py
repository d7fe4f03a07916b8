"""Switches of a VM: quirks, the shadow-page budget, Intel's real-mode pages (api.rst 4.36, 4.40, 7.31)."""

from __future__ import annotations

import errno
from enum import IntFlag

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Refusals
from pykvm.errors import CapabilityError, KvmError, UsageError
from pykvm.kvm.capabilities import Capability, Extensions, Switches


class Quirk(IntFlag):
    """Deviations from the architecture that KVM keeps for old guests (KVM_X86_QUIRK_*, up to Linux 7.2)."""

    LINT0_REENABLED = 1 << 0
    CD_NW_CLEARED = 1 << 1
    LAPIC_MMIO_HOLE = 1 << 2
    OUT_7E_INC_RIP = 1 << 3
    MISC_ENABLE_NO_MWAIT = 1 << 4
    FIX_HYPERCALL_INSN = 1 << 5
    MWAIT_NEVER_UD_FAULTS = 1 << 6
    SLOT_ZAP_ALL = 1 << 7
    STUFF_FEATURE_MSRS = 1 << 8
    IGNORE_GUEST_PAT = 1 << 9
    VMCS12_ALLOW_FREEZE_IN_SMM = 1 << 10
    NESTED_SVM_SHARED_PAT = 1 << 11


class VmTuning(Extensions, Switches):
    """Switches of a VM."""

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES (KVM_CAP_MMU_SHADOW_CACHE_CONTROL): at most so many shadow pages, from 64 on.

        Not in api.rst; matters for shadow paging, where 2 % of the slots' pages is the default.  Raises
        UsageError for no unsigned 32-bit number, KvmError (EINVAL) below 64.
        """
        if not 0 <= pages < 1 << 32:
            raise UsageError(f"{pages} shadow pages: use an unsigned 32-bit number.")
        refusals: Refusals = {errno.EINVAL: (KvmError, "KVM wants at least 64 shadow pages.")}
        self.ioctl_int(lib.KVM_SET_NR_MMU_PAGES, pages, "KVM_SET_NR_MMU_PAGES", refusals)

    @property
    def quirks(self) -> Quirk:
        """The quirks that this host can switch off (KVM_CAP_DISABLE_QUIRKS2, api.rst 7.31)."""
        return Quirk(self.check_extension(Capability.DISABLE_QUIRKS2))

    def disable_quirks(self, quirks: Quirk) -> None:
        """KVM_CAP_DISABLE_QUIRKS2 (api.rst 7.31): switch these off; before the first vCPU.

        They replace an earlier choice.  Raises CapabilityError for one that the host does not know.
        """
        unknown = int(quirks) & ~int(self.quirks)
        if unknown:
            raise CapabilityError(
                f"This host cannot switch off {Quirk(unknown)!r}; ask 'quirks' for those it can."
            )
        self.enable_cap(Capability.DISABLE_QUIRKS2, int(quirks))

    def set_tss_address(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR (api.rst 4.36, KVM_CAP_SET_TSS_ADDR): three pages for real mode on Intel.

        No slot may lie there.  Raises KvmError (EINVAL) for an address too high.
        """
        if not 0 <= gpa < 1 << 64:
            raise UsageError(f"Address {gpa:#x} is not an unsigned 64-bit number.")
        refusals: Refusals = {errno.EINVAL: (KvmError, "the three pages must lie below 4 GiB.")}
        self.ioctl_int(lib.KVM_SET_TSS_ADDR, gpa, "KVM_SET_TSS_ADDR", refusals)

    def set_identity_map_address(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR (api.rst 4.40): one page for Intel's real mode; 0 is KVM's default.

        Before the first vCPU; no slot may lie there.  Raises KvmError (EINVAL) afterwards.
        """
        address = ffi.new("__u64 *")
        try:
            address[0] = gpa
        except OverflowError:
            raise UsageError(f"Address {gpa:#x} is not an unsigned 64-bit number.") from None
        refusals: Refusals = {errno.EINVAL: (KvmError, "it must be set before the first vCPU.")}
        self.ioctl(lib.KVM_SET_IDENTITY_MAP_ADDR, address, "KVM_SET_IDENTITY_MAP_ADDR", refusals)
