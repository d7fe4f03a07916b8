"""Faults on guest-physical addresses: ``direct_page_fault`` (kvm-mmu.md 7.2).

They are those of two-dimensional paging, and of unpaged guests on shadow paging, whose maps are direct too.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pykvm.errors import KvmError
from pykvm.model.mmu.direct_fault import DirectFault
from pykvm.model.mmu.fast_page_fault import fix_tdp
from pykvm.model.mmu.memslots import INVALID, READONLY, Memslot
from pykvm.model.mmu.outcomes import RetPf

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

_RULE = "kvm-mmu.md 7.2"


def direct_page_fault(vcpu: VcpuMmu, gpa: int, error_code: int) -> RetPf:
    """Fix a fault at gpa with the TDP MMU: map it, set W again, or say that it must be emulated.

    ``error_code`` as of ``kvm_mmu_page_fault`` (7.1).  Raises KvmError with EFAULT where the host has no
    memory for the access.
    """
    mmu = vcpu.mmu
    assert mmu.tdp is not None
    gfn = gpa >> 12
    slot = mmu.memslots.lookup(gfn, vcpu.load_as_id)
    fault = DirectFault(gfn, error_code, slot)
    intercepted = fault.write and fault.present and not fault.rsvd
    if intercepted and mmu.page_track.is_tracked(slot, gfn):
        _note(vcpu, f"gfn {gfn:#x} is write-tracked: the write is emulated")
        return _write_protected(vcpu)
    result = fix_tdp(vcpu, fault)
    if result is not RetPf.INVALID:
        return result
    if slot is None:
        return handle_noslot(vcpu, fault)
    result = fault_in(vcpu, fault, slot)
    if result is not RetPf.CONTINUE:
        return result
    adjust_level(vcpu, fault, slot)
    return mmu.tdp.map(fault)


def _write_protected(vcpu: VcpuMmu) -> RetPf:
    """A kernel without RET_PF_WRITE_PROTECTED says EMULATE."""
    return RetPf.EMULATE if vcpu.mmu.profile.counts_emulate_before_retry else RetPf.WRITE_PROTECTED


def fault_in(vcpu: VcpuMmu, fault: DirectFault, slot: Memslot) -> RetPf:
    """``kvm_mmu_faultin_pfn`` for a gfn with a slot: CONTINUE with ``map_writable`` known, or the result."""
    if slot.flags & INVALID:
        return RetPf.RETRY
    if slot.flags & READONLY:
        if fault.write:
            _note(vcpu, f"gfn {fault.gfn:#x} lies in a READONLY slot: the write is emulated")
            return RetPf.EMULATE
        if slot.host.writable(fault.gfn - slot.base_gfn, write_fault=False) is None:
            raise no_host_memory(fault.gfn)
        return RetPf.CONTINUE
    writable = slot.host.writable(fault.gfn - slot.base_gfn, write_fault=fault.write)
    if writable is None or (fault.write and not writable):
        raise no_host_memory(fault.gfn)
    fault.map_writable = writable
    return RetPf.CONTINUE


def no_host_memory(gfn: int) -> KvmError:
    """What KVM_RUN fails with when the memory behind a slot cannot be had."""
    return KvmError(
        errno.EFAULT,
        "KVM_RUN",
        f"the host has no memory for the guest's access to gfn {gfn:#x}; map the slot's memory for it.",
    )


def handle_noslot(vcpu: VcpuMmu, fault: DirectFault) -> RetPf:
    """``kvm_handle_noslot_fault``: emulate, having made an MMIO SPTE where the host caches such accesses."""
    mmu = vcpu.mmu
    assert mmu.tdp is not None
    vcpu.remember_mmio(fault.gfn << 12, fault.gfn)
    if not mmu.profile.mmio_caching or fault.gfn >> mmu.profile.physical_bits - 12:
        return RetPf.EMULATE
    as_id = vcpu.load_as_id
    mmu.tdp.map_mmio(as_id, fault.gfn, mmu.memslots.generations[as_id])
    vcpu.counters.pf_mmio_spte_created += 1
    _note(vcpu, f"gfn {fault.gfn:#x} has no slot: an MMIO SPTE remembers it")
    return RetPf.EMULATE


def mmio_spte_is_current(vcpu: VcpuMmu, gfn: int) -> bool | None:
    """What ``handle_mmio_page_fault`` finds in the TDP MMU's tables: whether the gfn's MMIO SPTE is of the
    current memslot generation; None without one."""
    mmu = vcpu.mmu
    assert mmu.tdp is not None
    as_id = vcpu.load_as_id
    generation = mmu.tdp.root(as_id).mmio.get(gfn)
    return None if generation is None else generation == mmu.memslots.generations[as_id]


def adjust_level(vcpu: VcpuMmu, fault: DirectFault, slot: Memslot) -> None:
    """``kvm_mmu_hugepage_adjust``: how large a leaf may be; a logging slot takes small ones only."""
    fault.huge_page_disallowed = fault.fetch and vcpu.mmu.profile.nx_huge_pages
    if slot.logs:
        return
    fault.req_level = vcpu.mmu.shadow.possible_level(slot, fault.gfn)
    if not fault.huge_page_disallowed:
        fault.goal_level = fault.req_level


def _note(vcpu: VcpuMmu, what: str) -> None:
    if vcpu.mmu.journal is not None:
        vcpu.mmu.journal.note(what, _RULE)
