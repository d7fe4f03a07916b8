"""Prefetching SPTEs: mapping what nobody asked for yet, without counting faults (kvm-mmu.md 7.2, 7.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.mmu import roles, spte
from pykvm.model.mmu.memslots import INVALID, LOG_DIRTY_PAGES, READONLY, Memslot
from pykvm.model.mmu.shadow_page import ShadowPage

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

GROUP: Final = 8
"""PTE_PREFETCH_NUM: an aligned group of so many neighbours is looked at."""


def _slot_for(vcpu: VcpuMmu, gfn: int, access: int) -> Memslot | None:
    """``gfn_to_memslot_dirty_bitmap``: nothing writable is prefetched into a slot that logs."""
    slot = vcpu.mmu.memslots.lookup(gfn)
    if slot is None or slot.flags & (INVALID | READONLY):
        return None
    if access & roles.ACC_WRITE and slot.flags & LOG_DIRTY_PAGES:
        return None
    return slot


def prefetch_leaf(
    vcpu: VcpuMmu, sp: ShadowPage, index: int, gfn: int, access: int, *, logs_too: bool = False
) -> bool:
    """``kvm_mmu_prefetch_sptes`` of one entry: False ends the run.  ``logs_too``: a slot that logs may get a
    writable SPTE, which marks its page."""
    slot = _slot_for(vcpu, gfn, 0 if logs_too else access)
    if slot is None or not slot.host.writable(gfn - slot.base_gfn, write_fault=False):
        return False
    vcpu.mmu.shadow.set_spte(sp, index, slot, access, gfn, write=False, prefetch=True, host_writable=True)
    return True


def prefetch_direct(vcpu: VcpuMmu, sp: ShadowPage, index: int) -> None:
    """``direct_pte_prefetch``: runs of absent neighbours; one that has no slot ends it.

    Without A bits a prefetched SPTE could not be told from an accessed one: then there is none (7.2).
    """
    if sp.role & roles.AD_DISABLED:
        return
    first = index & -GROUP
    run: list[int] = []
    for number in range(first, first + GROUP + 1):
        if number < first + GROUP and number != index and not sp.spt.get(number, 0) & spte.MMU_PRESENT:
            run.append(number)
            continue
        if run and not _prefetch_run(vcpu, sp, run):
            return
        run = []


def _prefetch_run(vcpu: VcpuMmu, sp: ShadowPage, run: list[int]) -> bool:
    gfn = sp.leaf_gfn(run[0])
    slot = _slot_for(vcpu, gfn, sp.access)
    if slot is None or not slot.contains(gfn + len(run) - 1):
        return False
    return all(prefetch_leaf(vcpu, sp, number, sp.leaf_gfn(number), sp.access) for number in run)
