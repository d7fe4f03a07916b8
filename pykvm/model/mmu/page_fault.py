"""The fault pipeline: what KVM does about a fault that it took (``kvm_mmu_page_fault``, kvm-mmu.md 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.mmu import roles
from pykvm.model.mmu.fast_page_fault import fast_page_fault
from pykvm.model.mmu.guest_walk import walk
from pykvm.model.mmu.memslots import INVALID, READONLY
from pykvm.model.mmu.outcomes import EmulateInstruction, GuestPageFault, RetPf
from pykvm.model.mmu.prefetch import prefetch_direct
from pykvm.model.mmu.shadow_fault import (
    Fault,
    host_writable,
    no_slot,
    set_mmio_spte,
    shadow_page_fault,
    stays_split,
)
from pykvm.model.mmu.shadow_page import ShadowPage
from pykvm.model.paging import Access
from pykvm.x86.bits import PageFault

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

GUEST_PAGE: Final = 1 << 33
"""PFERR_GUEST_PAGE: the access was one of the guest's page walk."""
GUEST_FINAL: Final = 1 << 32
_P, _W, _U, _RSVD = int(PageFault.P), int(PageFault.WR), int(PageFault.US), int(PageFault.RSVD)
_RULE: Final = "kvm-mmu.md 7.1"


def page_fault(vcpu: VcpuMmu, address: int, error: int) -> None:
    """Handle a fault at ``address`` (linear with shadow paging of a paged guest, else guest-physical).

    Returns when the guest shall try again.  Raises EmulateInstruction and GuestPageFault.
    """
    mmu = vcpu.mmu
    counters = vcpu.counters
    if error & _RSVD and vcpu.handle_mmio(address):
        raise EmulateInstruction(address)
    counters.pf_taken += 1
    if mmu.journal is not None:
        mmu.journal.note(f"page fault at {address:#x}, error code {_words(error)}", _RULE)
    direct = vcpu.direct
    fault = Fault(address, error)
    try:
        result = _handle(vcpu, fault, direct=direct)
    except GuestPageFault as delivered:
        vcpu.inject_page_fault(delivered)
        raise
    profile = mmu.profile
    allow_retry = False
    if result is RetPf.WRITE_PROTECTED:
        if profile.counts_emulate_before_retry:
            result = RetPf.EMULATE
        else:
            result, allow_retry = _write_protect_fault(vcpu, fault, direct=direct)
    if mmu.journal is not None:
        mmu.journal.note(f"the fault ends as RET_PF_{result.name}", "kvm-mmu.md 7.6")
    if result is RetPf.FIXED:
        counters.pf_fixed += 1
    elif result is RetPf.EMULATE:
        counters.pf_emulate += 1
        if profile.counts_emulate_before_retry:
            if direct and error & (_P | _W | GUEST_PAGE) == _P | _W | GUEST_PAGE:
                mmu.shadow.unprotect_gfn(address >> 12)
                return
            allow_retry = not vcpu.is_mmio(address)
        raise EmulateInstruction(
            address,
            gpa=address if direct else None,
            allow_retry=allow_retry,
            write_pf_to_sp=fault.write_to_own_table,
        )
    elif result is RetPf.SPURIOUS:
        counters.pf_spurious += 1


def _handle(vcpu: VcpuMmu, fault: Fault, *, direct: bool) -> RetPf:
    if not direct:
        return shadow_page_fault(vcpu, fault)
    if vcpu.tdp is not None and vcpu.mmu.tdp is not None:
        return vcpu.tdp.page_fault(fault.address, fault.error)
    return direct_page_fault(vcpu, fault)


def direct_page_fault(vcpu: VcpuMmu, fault: Fault) -> RetPf:
    """A fault on direct shadow pages: an unpaged guest, or nested paging without the TDP MMU."""
    mmu = vcpu.mmu
    gfn = fault.gfn = fault.address >> 12
    slot = fault.slot = mmu.memslots.lookup(gfn)
    tracked = fault.write and fault.error & _P and not fault.error & _RSVD
    if tracked and mmu.page_track.is_tracked(slot, gfn):
        return RetPf.WRITE_PROTECTED
    result = fast_page_fault(vcpu, fault.address, fault.error)
    if result is not RetPf.INVALID:
        return result
    if slot is None:
        return _map_mmio(vcpu, fault)
    if slot.flags & INVALID:
        return RetPf.RETRY
    writable = host_writable(slot, gfn, write=fault.write)
    if writable is None:
        return RetPf.EMULATE
    mmu.shadow.make_available()
    return _direct_map(vcpu, fault, writable)


def _map_mmio(vcpu: VcpuMmu, fault: Fault) -> RetPf:
    """The gfn has no slot."""
    result = no_slot(vcpu, fault)
    if result is not RetPf.CONTINUE:
        return result
    sp = vcpu.top_page(fault.address)
    if sp is None:
        return RetPf.RETRY
    vcpu.mmu.shadow.make_available()
    sp, index = _descend(vcpu, fault, sp, 1)
    set_mmio_spte(vcpu, sp, index, fault.gfn)
    return RetPf.EMULATE


def _descend(vcpu: VcpuMmu, fault: Fault, sp: ShadowPage, goal: int) -> tuple[ShadowPage, int]:
    """Direct pages down to a level, made where there are none: the last one and the index in it."""
    shadow = vcpu.mmu.shadow
    while True:
        index = fault.address >> 3 + 9 * sp.level & 511
        child = sp.children.get(index)
        goal = stays_split(child, sp.level, goal)
        if sp.level == goal:
            return sp, index
        if child is None:
            shift = 9 * (sp.level - 1)
            child = shadow.get_page(
                vcpu,
                fault.gfn >> shift << shift,
                roles.child_role(sp.role, roles.ACC_ALL, index, direct=True),
            )
            shadow.link(sp, index, child)
            if fault.huge_page_disallowed:
                shadow.account_nx_huge_page(child, possible=fault.req_level >= sp.level)
        sp = child


def _direct_map(vcpu: VcpuMmu, fault: Fault, writable: bool) -> RetPf:
    """``direct_map``: direct pages down to the goal level, then the leaf and its neighbours."""
    mmu = vcpu.mmu
    shadow = mmu.shadow
    slot = fault.slot
    assert slot is not None
    if not mmu.profile.tdp:
        fault.max_level = 2
    goal = 1 if slot.logs else fault.adjust_level(vcpu, slot)
    sp = vcpu.top_page(fault.address)
    if sp is None:
        return RetPf.RETRY
    sp, index = _descend(vcpu, fault, sp, goal)
    level = sp.level
    shift = 9 * (level - 1)
    result = shadow.set_spte(
        sp,
        index,
        slot,
        roles.ACC_ALL,
        fault.gfn >> shift << shift,
        write=fault.write,
        prefetch=False,
        host_writable=writable,
    )
    if result is not RetPf.SPURIOUS and level == 1:
        prefetch_direct(vcpu, sp, index)
    return result


def _write_protect_fault(vcpu: VcpuMmu, fault: Fault, *, direct: bool) -> tuple[RetPf, bool]:
    """``kvm_mmu_write_protect_fault`` (7.4): the result, and whether emulation may still be retried."""
    pair = vcpu.rip, fault.address
    if vcpu.last_retry == pair:
        return RetPf.EMULATE, False
    vcpu.last_retry = None
    table_write = direct and fault.error & (GUEST_PAGE | _W | _P) == GUEST_PAGE | _W | _P
    if table_write and unprotect_and_retry(vcpu, fault.address, gfn=fault.address >> 12):
        return RetPf.RETRY, False
    return RetPf.EMULATE, True


def unprotect_and_retry(vcpu: VcpuMmu, address: int, *, gfn: int | None = None, always: bool = False) -> bool:
    """``__kvm_mmu_unprotect_gfn_and_retry`` (10.7): whether the guest shall try the access natively.

    A linear address is walked for a write first, which sets A and D in the guest's tables; nothing is walked
    where no table is shadowed.  ``always``: the guest tries again even if nothing was zapped.
    """
    mmu = vcpu.mmu
    zapped = False
    if mmu.shadow.indirect_pages:
        if gfn is None:
            gfn = address >> 12 if vcpu.direct else _written_gfn(vcpu, address)
        zapped = gfn is not None and mmu.shadow.unprotect_gfn(gfn)
    if not (zapped or always):
        return False
    if mmu.journal is not None:
        what = f"gfn {gfn:#x} is unprotected" if zapped else "nothing is unprotected"
        mmu.journal.note(f"{what}, the guest tries again", "kvm-mmu.md 10.7")
    vcpu.last_retry = vcpu.rip, address
    return True


def retry_failed(vcpu: VcpuMmu, address: int, *, own_table: bool) -> bool:
    """``kvm_unprotect_and_retry_on_failure`` (12.3): whether the guest shall try an access natively whose
    instruction the emulator lacks.  ``own_table``: EMULTYPE_WRITE_PF_TO_SP.
    """
    mmu = vcpu.mmu
    if not mmu.profile.retries_always:
        return not own_table and unprotect_and_retry(vcpu, address, always=True)
    # [6.1] ``reexecute_instruction``: unmapped memory has the processor fault; without memory it is hopeless.
    gfn = address >> 12 if vcpu.direct else _written_gfn(vcpu, address)
    if gfn is None:
        return True
    slot = mmu.memslots.visible(gfn)
    if slot is None or slot.flags & READONLY:
        return False
    mmu.shadow.unprotect_gfn(gfn)
    return vcpu.direct or not own_table


def _written_gfn(vcpu: VcpuMmu, linear: int) -> int | None:
    """``kvm_mmu_gva_to_gpa_write``: what a supervisor's write would reach; None where it would fault."""
    try:
        return walk(vcpu, linear, int(Access.WRITE)).gfn
    except GuestPageFault:
        return None


def _words(error: int) -> str:
    names = [bit.name or "" for bit in PageFault if error & bit]
    return f"{error & 0xFFFF:#x} ({' '.join(names) or 'read of an absent page'})"


__all__ = [
    "GUEST_FINAL",
    "GUEST_PAGE",
    "direct_page_fault",
    "page_fault",
    "retry_failed",
    "unprotect_and_retry",
]
