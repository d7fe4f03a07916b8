"""What a change of control registers does to a vCPU's roots and translations (kvm-mmu.md 13.5)."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from pykvm.model.mmu.roles import root_role
from pykvm.model.paging import Control
from pykvm.x86.bits import Cr0, Cr4

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

_ROLE_CR0: Final = int(Cr0.PG | Cr0.WP)
_ROLE_CR4: Final = int(Cr4.PSE | Cr4.PAE | Cr4.LA57 | Cr4.SMEP | Cr4.SMAP | Cr4.PKE)
_PGE, _PCIDE = int(Cr4.PGE), int(Cr4.PCIDE)
_NOFLUSH: Final = 1 << 63


class ControlChange(Enum):
    """Who changed control registers: the paths differ in what they flush and when they synchronise."""

    HOST = "KVM_SET_SREGS"
    MOV_CR3 = "MOV to CR3"
    OTHER = "MOV to CR0 or CR4, WRMSR of EFER"


def apply_change(vcpu: VcpuMmu, old: Control, change: ControlChange) -> None:
    """The vCPU's control registers were ``old`` until now."""
    if vcpu.tdp is not None:
        vcpu.root = root_role(vcpu.control, vcpu.mmu.profile)
        vcpu.tdp.flush()
        vcpu.requests.flush_guest |= _flushes_nested(vcpu, old, change)
    elif change is ControlChange.HOST:
        if not _same(old, vcpu.control):
            _reset_context(vcpu)
            vcpu.requests.flush_guest |= vcpu.mmu.profile.flushes_first_root
    elif change is ControlChange.MOV_CR3:
        _mov_cr3(vcpu, old)
    else:
        _mode_changed(vcpu, old)


def _same(old: Control, new: Control) -> bool:
    return (old.cr0, old.cr3, old.cr4, old.efer) == (new.cr0, new.cr3, new.cr4, new.efer)


def _flushes_nested(vcpu: VcpuMmu, old: Control, change: ControlChange) -> bool:
    """Whether KVM has a vCPU with nested paging flush: the guest's own MOV to CR3 is no exit."""
    new = vcpu.control
    if change is ControlChange.HOST:
        return not _same(old, new) and vcpu.mmu.profile.flushes_first_root
    if change is ControlChange.MOV_CR3:
        return False
    cr4 = old.cr4 ^ new.cr4
    return bool(cr4 & _PGE or (cr4 & _PCIDE and not new.cr4 & _PCIDE) or old.cr0 & ~new.cr0 & Cr0.PG)


def _reset_context(vcpu: VcpuMmu) -> None:
    """``kvm_mmu_reset_context``."""
    vcpu.roots.free_all()
    vcpu.root = root_role(vcpu.control, vcpu.mmu.profile)
    vcpu.flush_tlb()


def _mov_cr3(vcpu: VcpuMmu, old: Control) -> None:
    new = vcpu.control
    pgd = new.cr3 & ~_NOFLUSH
    if vcpu.root.levels == 3 and new.pdptrs != old.pdptrs:
        vcpu.roots.free_all()
    elif pgd != old.cr3 & ~_NOFLUSH or vcpu.root.levels == 3:
        vcpu.roots.switch(pgd)
    vcpu.forget_mmio()
    vcpu.flush_tlb()
    if not (new.cr4 & _PCIDE and new.cr3 & _NOFLUSH):
        vcpu.requests.sync = True
        vcpu.requests.flush_current = True


def _mode_changed(vcpu: VcpuMmu, old: Control) -> None:
    new = vcpu.control
    requests = vcpu.requests
    cr0, cr4 = old.cr0 ^ new.cr0, old.cr4 ^ new.cr4
    if cr0 & Cr0.PG and not new.cr0 & Cr0.PG:
        requests.flush_guest = True
    if cr0 & _ROLE_CR0 or cr4 & _ROLE_CR4 or old.efer != new.efer:
        if not (cr0 == Cr0.WP and not cr4 and not new.cr0 & Cr0.PG):
            _reset_context(vcpu)
    elif new.pdptrs != old.pdptrs and vcpu.root.levels == 3:
        vcpu.roots.free_all()
    if cr4 & _PCIDE and new.cr4 & _PCIDE:
        vcpu.roots.free_all()
    if cr4 & _PGE or (cr4 & _PCIDE and not new.cr4 & _PCIDE):
        requests.flush_guest = True
    elif cr4 & Cr4.PAE or (cr4 & Cr4.SMEP and new.cr4 & Cr4.SMEP):
        requests.flush_current = True
    vcpu.flush_tlb()
