"""The kinds of KVM that a lab can be: a vendor's module and the parameters it is loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pykvm.errors import UsageError

Vendor = Literal["amd", "intel"]


@dataclass(frozen=True)
class Kind:
    """One way to load KVM.

    ``parameters`` maps a module (``kvm``, ``kvm_amd``, ``kvm_intel``) to all parameters that make it this
    kind, also those that are the kernel's default: the running guest is held against them, and KVM clears
    without a word what the processor cannot do (``hardware_setup`` in arch/x86/kvm/vmx/vmx.c, svm/svm.c).
    """

    name: str
    vendor: Vendor
    about: str
    parameters: Mapping[str, str]

    @property
    def module(self) -> str:
        """The vendor's module, as ``insmod`` names it."""
        return f"kvm_{self.vendor}"


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("amd-npt", "amd", "nested paging, TDP MMU", {"kvm": "tdp_mmu=1", "kvm_amd": "npt=1"}),
        Kind("amd-shadow", "amd", "shadow paging (kvm_amd.npt=0)", {"kvm_amd": "npt=0"}),
        Kind(
            "amd-npt-oldmmu",
            "amd",
            "nested paging, older MMU with rmaps (kvm.tdp_mmu=0)",
            {"kvm": "tdp_mmu=0", "kvm_amd": "npt=1"},
        ),
        Kind("intel-ept", "intel", "EPT with A/D bits and PML", {"kvm_intel": "ept=1,eptad=1,pml=1"}),
        Kind(
            "intel-ept-nopml",
            "intel",
            "EPT with A/D bits, no PML (kvm_intel.pml=0)",
            {"kvm_intel": "ept=1,eptad=1,pml=0"},
        ),
        Kind(
            "intel-ept-noad",
            "intel",
            "EPT without A/D bits or PML (kvm_intel.eptad=0)",
            {"kvm_intel": "ept=1,eptad=0"},
        ),
        Kind("intel-shadow", "intel", "shadow paging (kvm_intel.ept=0)", {"kvm_intel": "ept=0"}),
    )
}


def kind(name: str) -> Kind:
    """The kind of that name; UsageError names the ones there are."""
    if name not in KINDS:
        raise UsageError(f"There is no KVM kind '{name}'; choose one of {', '.join(KINDS)}.")
    return KINDS[name]
