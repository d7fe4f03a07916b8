"""Faults that are fixed by one exchange of an SPTE, without the MMU lock (kvm-mmu.md 11.2).

Only direct maps have this path: the leaf of a gfn says itself whether MMU_WRITABLE permits to set W again.
For shadow paging it was proposed in 2012 and never merged, since the guest's own entry has a say there: the
interleaving explorer (``pykvm.model.interleave``) shows what goes wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pykvm.model.mmu.direct_fault import DirectFault
from pykvm.model.mmu.outcomes import RetPf
from pykvm.model.mmu.spte import ACCESS_TRACKED, MMU_PRESENT, MMU_WRITABLE, P, W

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu
    from pykvm.model.mmu.vm import Mmu


class LastSpte(Protocol):
    """Where the SPTE is that the lockless walk of a direct map ends with."""

    def __getitem__(self, key: int) -> int: ...

    def __setitem__(self, key: int, spte: int) -> None: ...


def page_fault_can_be_fast(fault: DirectFault, *, ad_bits: bool) -> bool:
    """Whether the fault may be one of write protection or of access tracking.

    A fault on a present translation qualifies if it is a write.  One on an absent translation does only where
    the tables have no A bits: its rights may have been taken to learn of the access.
    """
    if fault.rsvd:
        return False
    if not fault.present:
        return not ad_bits
    return fault.write


def fixed_spte(fault: DirectFault, spte: int, level: int) -> int | None:
    """What the fast path makes of a present leaf; None where it must not or need not decide."""
    new = spte
    if spte & ACCESS_TRACKED:
        new = spte & ~ACCESS_TRACKED | P
    if fault.write and spte & MMU_WRITABLE:
        if level > 1 and fault.slot is not None and fault.slot.flags & 1:
            return None  # the log wants to know which of its pages: the slow path splits it
        new |= W
    if new == spte or not fault.allowed_by(new):
        return None
    return new


def fast_page_fault(vcpu: VcpuMmu, address: int, error_code: int) -> RetPf:
    """``fast_page_fault`` of a direct map: FIXED, SPURIOUS, or INVALID (take the slow path).

    FIXED and SPURIOUS count as pf_fast.  Setting W marks the page; D is left to the processor.
    """
    gfn = address >> 12
    mmu = vcpu.mmu
    fault = DirectFault(gfn, error_code, mmu.memslots.lookup(gfn, vcpu.load_as_id))
    if mmu.tdp is not None:
        return fix_tdp(vcpu, fault)
    if not page_fault_can_be_fast(fault, ad_bits=not mmu.profile.tdp or mmu.profile.walks_write_tables):
        return RetPf.INVALID
    sp = vcpu.top_page(address)
    if sp is None:
        return RetPf.INVALID
    while True:
        index = address >> 3 + 9 * sp.level & 511
        child = sp.children.get(index)
        if child is None:
            break
        sp = child
    if not sp.spt.get(index, 0) & MMU_PRESENT:
        return RetPf.INVALID
    return exchange(vcpu, fault, sp.spt, index, sp.level)


def fix_tdp(vcpu: VcpuMmu, fault: DirectFault) -> RetPf:
    """The same on the TDP MMU's tables."""
    tdp = vcpu.mmu.tdp
    assert tdp is not None
    if not page_fault_can_be_fast(fault, ad_bits=tdp.ad_bits):
        return RetPf.INVALID
    root = tdp.root(vcpu.load_as_id)
    gfn = fault.gfn
    spte, level = root.leaf(gfn)
    if not spte:
        return RetPf.INVALID
    return exchange(vcpu, fault, root.leaves[level], gfn >> 9 * (level - 1), level)


def exchange(vcpu: VcpuMmu, fault: DirectFault, leaves: LastSpte, key: int, level: int) -> RetPf:
    """The loop around the compare-and-exchange of a leaf, which here succeeds at once."""
    spte = leaves[key]
    if fault.allowed_by(spte):
        vcpu.counters.pf_fast += 1
        return RetPf.SPURIOUS
    new = fixed_spte(fault, spte, level)
    if new is None:
        return RetPf.INVALID
    leaves[key] = new
    if new & W and not spte & W and fault.slot is not None:
        vcpu.mmu.mark_page_dirty(fault.slot, fault.gfn)
    vcpu.counters.pf_fast += 1
    _note(vcpu.mmu, fault)
    return RetPf.FIXED


def _note(mmu: Mmu, fault: DirectFault) -> None:
    if mmu.journal is not None:
        what = "writable" if fault.write else "accessible"
        mmu.journal.note(f"the fast path made gfn {fault.gfn:#x} {what} again", "kvm-mmu.md 11.2")
