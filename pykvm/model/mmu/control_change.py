"""What a change of control registers does to a vCPU's roots and translations (kvm-mmu.md 13.5)."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from pykvm.model.mmu.roles import root_role
from pykvm.model.paging import Control
from pykvm.profiles import Paging
from pykvm.x86.bits import Cr0, Cr4, Efer

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

_ROLE_CR0: Final = int(Cr0.PG | Cr0.WP)
_ROLE_CR4: Final = int(Cr4.PSE | Cr4.PAE | Cr4.LA57 | Cr4.SMEP | Cr4.SMAP | Cr4.PKE)
_ROLE_EFER: Final = int(Efer.LME | Efer.LMA | Efer.NXE)
_PG: Final = int(Cr0.PG)
_PGE, _PCIDE = int(Cr4.PGE), int(Cr4.PCIDE)
_PCID: Final = 0xFFF


class ControlChange(Enum):
    """Who changed control registers: the paths differ in what they flush and when they synchronise."""

    HOST = "KVM_SET_SREGS"
    MOV_CR3 = "MOV to CR3"
    MOV_CR3_NO_FLUSH = "MOV to CR3 with bit 63, which keeps the translations of its PCID"
    OTHER = "MOV to CR0 or CR4, WRMSR of EFER"


def apply_change(vcpu: VcpuMmu, old: Control, change: ControlChange) -> None:
    """The vCPU's control registers were ``old`` until now."""
    if vcpu.tdp is not None:
        vcpu.root = root_role(vcpu.control, vcpu.mmu.profile)
        vcpu.tdp.flush()
        vcpu.requests.flush_guest |= _flushes_nested(vcpu, old, change)
        vcpu.requests.flush_current |= change is ControlChange.OTHER and _flushes_current(old, vcpu.control)
    elif change is ControlChange.HOST:
        if _host_resets(old, vcpu.control):
            _reset_context(vcpu)
            vcpu.requests.flush_guest |= vcpu.mmu.profile.flushes_first_root
    elif change in (ControlChange.MOV_CR3, ControlChange.MOV_CR3_NO_FLUSH):
        _mov_cr3(vcpu, old, flush=change is ControlChange.MOV_CR3)
    else:
        _mode_changed(vcpu, old)


def _host_resets(old: Control, new: Control) -> bool:
    """Whether KVM_SET_SREGS ends in a new context: registers differ, or PDPTEs are read again (PAE)."""
    if new.cr0 & _PG and new.cr4 & Cr4.PAE and not new.efer & Efer.LMA:
        return True
    return (old.cr0, old.cr3, old.cr4, old.efer) != (new.cr0, new.cr3, new.cr4, new.efer)


def _flushes_nested(vcpu: VcpuMmu, old: Control, change: ControlChange) -> bool:
    """Whether KVM has a vCPU with nested paging flush: the guest's own MOV to CR3 is no exit."""
    new = vcpu.control
    if change is ControlChange.HOST:
        return _host_resets(old, new) and vcpu.mmu.profile.flushes_first_root
    if change is not ControlChange.OTHER:
        return False
    # With EPT the guest owns CR4.PGE: its change is no exit either.
    cr4 = (old.cr4 ^ new.cr4) & ~(_PGE if vcpu.mmu.profile.paging is Paging.EPT else 0)
    return bool(cr4 & _PGE or (cr4 & _PCIDE and not new.cr4 & _PCIDE) or old.cr0 & ~new.cr0 & Cr0.PG)


def _flushes_current(old: Control, new: Control) -> bool:
    """CR4 changes that flush the current PCID, where they do not flush all: PAE, and SMEP 0 to 1."""
    cr4 = old.cr4 ^ new.cr4
    if cr4 & _PGE or (cr4 & _PCIDE and not new.cr4 & _PCIDE):
        return False
    return bool(cr4 & Cr4.PAE or (cr4 & Cr4.SMEP and new.cr4 & Cr4.SMEP))


def _reset_context(vcpu: VcpuMmu) -> None:
    """``kvm_mmu_reset_context``."""
    vcpu.roots.free_all()
    vcpu.root = root_role(vcpu.control, vcpu.mmu.profile)
    vcpu.flush_tlb()


def _mov_cr3(vcpu: VcpuMmu, old: Control, *, flush: bool) -> None:
    new = vcpu.control
    if vcpu.root.levels == 3 and new.pdptrs != old.pdptrs:
        vcpu.roots.free_all()
    elif new.cr3 != old.cr3:
        vcpu.roots.switch(new.cr3)
    vcpu.forget_mmio()
    vcpu.flush_tlb()
    if flush:
        _invalidate_pcid(vcpu, pcid_of(new, new.cr3))


def pcid_of(control: Control, pgd: int) -> int:
    """The PCID of a CR3 value; 0 for all without CR4.PCIDE."""
    return pgd & _PCID if control.cr4 & _PCIDE else 0


def _invalidate_pcid(vcpu: VcpuMmu, pcid: int) -> None:
    """``kvm_invalidate_pcid``: the current tables are synchronised if it is theirs, cached roots of it go.

    Without PCIDs these may stay: each load of CR3 synchronises.
    """
    control = vcpu.control
    if pcid == pcid_of(control, control.cr3):
        vcpu.requests.sync = True
        vcpu.requests.flush_current = True
    if control.cr4 & _PCIDE:
        vcpu.roots.free_previous(lambda root: root.pgd & _PCID == pcid)


def invpcid(vcpu: VcpuMmu, kind: int, pcid: int, address: int) -> None:
    """``kvm_handle_invpcid``: INVPCID, which is intercepted without nested paging.

    Type 0, one address of one PCID, counts as invlpg; 1, one PCID; 2 and 3, everything: KVM's own tables
    have no global pages.
    """
    if kind == 0:
        control = vcpu.control
        roots = [vcpu.roots.current] if pcid == pcid_of(control, control.cr3) else []
        roots += [
            root for root in vcpu.roots.previous if root is not None and pcid_of(control, root.pgd) == pcid
        ]
        vcpu.counters.invlpg += 1
        if roots:
            vcpu.invalidate(address, roots)
    elif kind == 1:
        _invalidate_pcid(vcpu, pcid)
    else:
        vcpu.requests.flush_guest = True
    vcpu.flush_tlb()


def _mode_changed(vcpu: VcpuMmu, old: Control) -> None:
    new = vcpu.control
    requests = vcpu.requests
    cr0, cr4 = old.cr0 ^ new.cr0, old.cr4 ^ new.cr4
    if cr0 & Cr0.PG and not new.cr0 & Cr0.PG:
        requests.flush_guest = True
    if cr0 & _ROLE_CR0 or cr4 & _ROLE_CR4 or (old.efer ^ new.efer) & _ROLE_EFER:
        if not (cr0 == Cr0.WP and not cr4 and not new.cr0 & Cr0.PG):
            _reset_context(vcpu)
    elif new.pdptrs != old.pdptrs and vcpu.root.levels == 3:
        vcpu.roots.free_all()
    if cr4 & _PCIDE and new.cr4 & _PCIDE:
        vcpu.roots.free_all()
    if cr4 & _PGE or (cr4 & _PCIDE and not new.cr4 & _PCIDE):
        requests.flush_guest = True
    elif _flushes_current(old, new):
        requests.flush_current = True
    vcpu.flush_tlb()
