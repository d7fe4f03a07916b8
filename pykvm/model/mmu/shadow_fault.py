"""A fault in shadow paging: from the guest's tables to an SPTE (``FNAME(page_fault)``, kvm-mmu.md 7.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.mmu import roles, spte
from pykvm.model.mmu.guest_walk import GuestWalk, read_entry, walk
from pykvm.model.mmu.memslots import INVALID, LOG_DIRTY_PAGES, READONLY, Memslot
from pykvm.model.mmu.outcomes import RetPf
from pykvm.model.mmu.prefetch import GROUP, prefetch_direct, prefetch_leaf
from pykvm.model.mmu.shadow_page import ShadowPage
from pykvm.model.mmu.tdp_fault import no_host_memory
from pykvm.model.mmu.unsync import gpte_access, invalid_for_prefetch
from pykvm.model.paging import Access
from pykvm.model.paging_format import ADDRESS
from pykvm.x86.bits import Cr0, Cr4, PageFault, Pte

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

_PF_P, _PF_W, _PF_U, _PF_F = (int(bit) for bit in (PageFault.P, PageFault.WR, PageFault.US, PageFault.ID))
_PF_RSVD: Final = int(PageFault.RSVD)
_WRITE, _FETCH, _USER = int(Access.WRITE), int(Access.FETCH), int(Access.USER)
_WP: Final = int(Cr0.WP)
_SMEP: Final = int(Cr4.SMEP)
_D: Final = int(Pte.D)
_RULE: Final = "kvm-mmu.md 7.3"


class Fault:
    """``struct kvm_page_fault``: what is asked, and what was found out so far."""

    __slots__ = (
        "address",
        "error",
        "gfn",
        "huge_page_disallowed",
        "max_level",
        "req_level",
        "slot",
        "user",
        "write",
        "write_to_own_table",
    )

    def __init__(self, address: int, error: int) -> None:
        self.address = address
        self.error = error
        self.write = bool(error & _PF_W)
        self.user = bool(error & _PF_U)
        self.gfn = 0
        self.slot: Memslot | None = None
        self.max_level = 3
        self.req_level = 1
        """The largest leaf that guest, host and slot allow."""
        self.huge_page_disallowed = False
        """It executes under the NX mitigation: the leaf is a small one, however large it could be."""
        self.write_to_own_table = False
        """The write targets one of the tables that translate its own address (EMULTYPE_WRITE_PF_TO_SP)."""

    def adjust_level(self, vcpu: VcpuMmu, slot: Memslot) -> int:
        """The level to map at, up to ``max_level``, in a slot that does not log."""
        self.huge_page_disallowed = bool(self.error & _PF_F) and vcpu.mmu.profile.nx_huge_pages
        self.req_level = min(self.max_level, vcpu.mmu.shadow.possible_level(slot, self.gfn))
        return 1 if self.huge_page_disallowed else self.req_level


def access_of(error: int) -> int:
    """The access that a page-fault error code describes."""
    access = _WRITE if error & _PF_W else 0
    if error & _PF_F:
        access |= _FETCH
    return access | _USER if error & _PF_U else access


def shadow_page_fault(vcpu: VcpuMmu, fault: Fault) -> RetPf:
    """Handle an intercepted #PF.  Raises GuestPageFault where the guest's own tables forbid the access."""
    mmu = vcpu.mmu
    found = walk(vcpu, fault.address, access_of(fault.error))
    fault.gfn = found.gfn
    fault.max_level = found.level
    slot = fault.slot = mmu.memslots.lookup(found.gfn)
    if (
        fault.write
        and fault.error & _PF_P
        and not fault.error & _PF_RSVD
        and mmu.page_track.is_tracked(slot, found.gfn)
    ):
        if mmu.journal is not None:
            mmu.journal.note(
                f"gfn {found.gfn:#x} is write-tracked: the write must be emulated", "kvm-mmu.md 9"
            )
        vcpu.clear_flood_counters(fault.address)
        return RetPf.WRITE_PROTECTED
    if slot is None:
        result = no_slot(vcpu, fault)
        if result is RetPf.CONTINUE:
            mmu.shadow.make_available()
            result = _fetch(vcpu, fault, found, found.pte_access, False)
        return result
    if slot.flags & INVALID:
        return RetPf.RETRY
    writable = host_writable(slot, found.gfn, write=fault.write)
    if writable is None:
        return RetPf.EMULATE
    access = found.pte_access
    if fault.write and not access & roles.ACC_WRITE and not vcpu.control.cr0 & _WP and not fault.user:
        # The kernel writes although CR0.WP allows it only to the kernel: a supervisor mapping (10.8).
        access = (access | roles.ACC_WRITE) & ~roles.ACC_USER
        if vcpu.control.cr4 & _SMEP:
            access &= ~roles.ACC_EXEC
    mmu.shadow.make_available()
    return _fetch(vcpu, fault, found, access, writable)


def no_slot(vcpu: VcpuMmu, fault: Fault) -> RetPf:
    """The gfn is MMIO: remember the address, and have the access emulated (7.2)."""
    profile = vcpu.mmu.profile
    vcpu.remember_mmio(fault.address, fault.gfn)
    if not profile.mmio_caching or fault.gfn >> profile.physical_bits - 12:
        return RetPf.EMULATE
    return RetPf.CONTINUE


def host_writable(slot: Memslot, gfn: int, *, write: bool) -> bool | None:
    """Whether the host frame is writable (``kvm_faultin_pfn``); None for a write that the slot forbids,
    which is emulated.  Raises KvmError (EFAULT), with which KVM_RUN fails, where the host has no such memory
    (hosts.md C.3).
    """
    readonly = bool(slot.flags & READONLY)
    if readonly and write:
        return None
    writable = slot.host.writable(gfn - slot.base_gfn, write_fault=write)
    if writable is None or (write and not writable):
        raise no_host_memory(gfn)
    return writable and not readonly


def _unchanged(vcpu: VcpuMmu, found: GuestWalk, number: int, size: int) -> bool:
    """Whether the guest's entry is still what the walk read (``FNAME(gpte_changed)``)."""
    gfn = found.table_gfn[number]
    slot = vcpu.mmu.memslots.lookup(gfn)
    return slot is not None and read_entry(slot, gfn, found.index[number], size) == found.ptes[number]


def _fetch(vcpu: VcpuMmu, fault: Fault, found: GuestWalk, access: int, writable: bool) -> RetPf:
    """``FNAME(fetch)``: shadow pages down to the leaf, then the leaf."""
    mmu = vcpu.mmu
    shadow = mmu.shadow
    replaces = mmu.profile.replaces_linked_child
    size = 4 if vcpu.root.levels == 2 else 8
    sp = vcpu.top_page(fault.address)
    if sp is None:
        root = vcpu.roots.current
        if root is not None and root.is_dummy:
            # The root's gfn got a slot since: a real root is loaded before the guest tries again.
            vcpu.requests.free_obsolete = True
        return RetPf.RETRY
    address = fault.address
    level = sp.level
    if not _unchanged(vcpu, found, min(level, vcpu.root.levels) - 1, size):
        return RetPf.RETRY
    while True:
        sp.write_flooding_count = 0
        index = address >> 3 + 9 * level & 511
        if level == found.level:
            break
        table_gfn = found.table_gfn[level - 2]
        child = sp.children.get(index)
        role = roles.child_role(sp.role, found.pt_access[level - 2], index, direct=False)
        if child is None or (replaces and (child.gfn, child.role) != (table_gfn, role)):
            child = shadow.get_page(vcpu, table_gfn, role)
            if child.unsync_child_bitmap:
                mmu.unsync.sync_children(vcpu, child)
            if not _unchanged(vcpu, found, level - 2, size):
                return RetPf.RETRY
            if index in sp.children:
                shadow.drop_parent(sp.children[index], sp, index)
                mmu.flush_remote_tlbs()
            shadow.link(sp, index, child)
        elif not _unchanged(vcpu, found, level - 2, size):
            return RetPf.RETRY
        if fault.write and table_gfn == fault.gfn:
            fault.write_to_own_table = True
        sp = child
        level -= 1
    slot = fault.slot
    goal = _goal_level(vcpu, fault, slot)
    while True:
        sp.write_flooding_count = 0
        index = address >> 3 + 9 * level & 511
        child = sp.children.get(index)
        goal = stays_split(child, level, goal)
        if level == goal:
            break
        if child is not None and child.access != access:
            # The guest's entry went from clean to dirty: another direct page, with W (validate_direct_spte).
            shadow.drop_parent(child, sp, index)
            mmu.flush_remote_tlbs()
            child = None
        shift = 9 * (level - 1)
        base = fault.gfn >> shift << shift
        role = roles.child_role(sp.role, access, index, direct=True)
        if child is None or (replaces and (child.gfn, child.role) != (base, role)):
            child = shadow.get_page(vcpu, base, role)
            if index in sp.children:
                shadow.drop_parent(sp.children[index], sp, index)
                mmu.flush_remote_tlbs()
            shadow.link(sp, index, child)
            if fault.huge_page_disallowed:
                shadow.account_nx_huge_page(child, possible=fault.req_level >= level)
        sp = child
        level -= 1
    shift = 9 * (level - 1)
    base = fault.gfn >> shift << shift
    if slot is None:
        set_mmio_spte(vcpu, sp, index, base)
        return RetPf.EMULATE
    result = shadow.set_spte(
        sp, index, slot, access, base, write=fault.write, prefetch=False, host_writable=writable
    )
    if result is not RetPf.SPURIOUS and level == 1:
        if sp.direct:
            prefetch_direct(vcpu, sp, index)
        else:
            _prefetch(vcpu, sp, index, found, size)
    return result


def set_mmio_spte(vcpu: VcpuMmu, sp: ShadowPage, index: int, gfn: int) -> None:
    """``mark_mmio_spte``: the next access here is known for MMIO by its reserved bit."""
    if sp.spt.get(index, 0) & spte.MMU_PRESENT:
        vcpu.mmu.shadow.drop_spte(sp, index)
    sp.spt[index] = spte.MMIO | spte.P | gfn << 12
    sp.mmio_generation[index] = vcpu.mmu.memslots.generations[0]
    vcpu.counters.pf_mmio_spte_created += 1


def _goal_level(vcpu: VcpuMmu, fault: Fault, slot: Memslot | None) -> int:
    """``kvm_mmu_hugepage_adjust``: never larger than the guest's page, and 4 KiB while the slot logs."""
    if slot is None or fault.max_level == 1 or slot.flags & LOG_DIRTY_PAGES:
        return 1
    return fault.adjust_level(vcpu, slot)


def stays_split(child: ShadowPage | None, level: int, goal: int) -> int:
    """``disallowed_hugepage_adjust``: what the NX mitigation took apart stays so: the level to map at."""
    if level == goal and level > 1 and child is not None and child.nx_huge_page_disallowed:
        return goal - 1
    return goal


def _prefetch(vcpu: VcpuMmu, sp: ShadowPage, index: int, found: GuestWalk, size: int) -> None:
    """``FNAME(pte_prefetch)``: the neighbours in an aligned group of 8, up to the first unfit entry."""
    mmu = vcpu.mmu
    spt = sp.spt
    first = index & -GROUP
    gfn = found.table_gfn[0]
    table = mmu.memslots.lookup(gfn)
    if table is None:
        return
    offset = found.index[0] - index
    address_mask = ADDRESS if size == 8 else 0xFFFFF000
    for number in range(first, first + GROUP):
        if number == index or spt.get(number, 0) & spte.MMU_PRESENT:
            continue
        gpte = read_entry(table, gfn, number + offset, size)
        if invalid_for_prefetch(vcpu, gpte):
            spt.pop(number, None)
            return
        access = sp.access & gpte_access(gpte)
        if not gpte & _D:
            access &= ~roles.ACC_WRITE
        if not prefetch_leaf(vcpu, sp, number, (gpte & address_mask) >> 12, access):
            return
