"""KVM's own walk of the guest's page tables (``FNAME(walk_addr_generic)``, kvm-mmu.md 13.3).

Unlike a processor it sets A and D only after the whole walk succeeded, from the root to the leaf, marking the
table's page dirty for each entry that changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model import paging
from pykvm.model.mmu import roles
from pykvm.model.mmu.memslots import INVALID, READONLY, Memslot
from pykvm.model.mmu.outcomes import GuestPageFault
from pykvm.model.paging import Access, Control
from pykvm.model.paging_format import ADDRESS, PAE, format_of, page_address
from pykvm.x86.bits import Cr0, Cr4, Efer, PageFault, Pte

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

_P, _RW, _US, _A, _D, _XD = (int(bit) for bit in (Pte.P, Pte.RW, Pte.US, Pte.A, Pte.D, Pte.NX))
_WRITE, _FETCH, _USER, _IMPLICIT = (
    int(kind) for kind in (Access.WRITE, Access.FETCH, Access.USER, Access.IMPLICIT)
)
_KEYS: Final = int(Cr4.PKE | Cr4.PKS)
_WP, _SMEP, _SMAP, _PAE = int(Cr0.WP), int(Cr4.SMEP), int(Cr4.SMAP), int(Cr4.PAE)
_NXE: Final = int(Efer.NXE)
_RULE: Final = "kvm-mmu.md 13.3"


class GuestWalk:
    """A walk that succeeded.

    Lists are indexed by level - 1: the gfn of the table of that level, its entry as it was read (with A and D
    set since), its index, and the access rights (ACC bits) accumulated above it.
    """

    __slots__ = ("gfn", "gpa", "index", "level", "pt_access", "pte_access", "ptes", "table_gfn")

    def __init__(self) -> None:
        self.gpa = 0
        self.gfn = 0
        self.level = 0
        """Level of the leaf: 1 for a 4 KiB page, 2 for 2 or 4 MiB, 3 for 1 GiB."""
        self.pte_access = 0
        """Rights of the whole walk; without W for an access that is no write while the leaf's D is 0."""
        self.table_gfn = [0] * 5
        self.ptes = [0] * 5
        self.index = [0] * 5
        self.pt_access = [0] * 5


def read_entry(slot: Memslot, gfn: int, index: int, size: int) -> int:
    """Entry ``index`` of a table in a slot."""
    if size == 8:
        return slot.words[(gfn - slot.base_gfn << 9) + index]
    at = (gfn - slot.base_gfn << 12) + index * 4
    return int.from_bytes(slot.data[at : at + 4], "little")


def _write_entry(slot: Memslot, gfn: int, index: int, size: int, value: int) -> None:
    if size == 8:
        slot.words[(gfn - slot.base_gfn << 9) + index] = value
    else:
        at = (gfn - slot.base_gfn << 12) + index * 4
        slot.data[at : at + 4] = value.to_bytes(4, "little")


def walk(vcpu: VcpuMmu, linear: int, access: int) -> GuestWalk:
    """Walk the guest's tables for an access, setting A and D.  Raises GuestPageFault, having set nothing."""
    control = vcpu.control
    mmu = vcpu.mmu
    if mmu.journal is not None:
        _explain(vcpu, linear, access)
    if access & _IMPLICIT:
        access &= ~_USER
    form = format_of(control)
    table = control.cr3 & form.root
    if form.name is PAE:
        table = control.pdptrs[linear >> 30 & 3]
        if not table & _P:
            raise fault(control, linear, access, 0)
        table &= ADDRESS
    size = form.entry
    lookup = mmu.memslots.lookup
    rights = _RW | _US
    disabled = 0
    result = GuestWalk()
    entry = 0
    depth = 2 if form.name is PAE else len(form.levels)
    number = depth
    complete = _A
    slots: list[Memslot] = []
    for level in form.levels:
        gfn = table >> 12
        slot = lookup(gfn)
        if slot is None or (slot.flags & INVALID):
            raise fault(control, linear, access, 0)
        index = linear >> level.shift & level.mask
        entry = (
            slot.words[(gfn - slot.base_gfn << 9) + index] if size == 8 else read_entry(slot, gfn, index, 4)
        )
        slots.append(slot)
        number -= 1
        result.table_gfn[number] = gfn
        result.ptes[number] = entry
        result.index[number] = index
        result.pt_access[number] = _acc(rights, disabled)
        if not entry & _P:
            raise fault(control, linear, access, 0)
        rights &= entry
        disabled |= entry
        if entry & level.page:
            if entry & level.page_reserved:
                raise fault(control, linear, access, PageFault.P | PageFault.RSVD)
            break
        if entry & level.table_reserved:
            raise fault(control, linear, access, PageFault.P | PageFault.RSVD)
        complete &= entry
        table = entry & ADDRESS
    acc = _acc(rights, disabled)
    if control.cr4 & _KEYS or forbids(control, access, acc):
        _judge(vcpu, linear, access)
    write = access & _WRITE
    if not write and not entry & _D:
        acc &= ~roles.ACC_WRITE
    result.level = number + 1
    result.pte_access = acc
    gpa = page_address(form, level, entry) | linear & level.offset
    result.gpa = gpa
    result.gfn = gpa >> 12
    wanted = _A | _D if write else _A
    if (not complete & entry & _A or (write and not entry & _D)) and not _update(
        vcpu, result, depth, size, wanted, slots
    ):
        return walk(vcpu, linear, access)
    return result


def _acc(rights: int, disabled: int) -> int:
    """ACC bits of accumulated entry bits."""
    return (rights & (_RW | _US)) | (not disabled & _XD)


def _update(
    vcpu: VcpuMmu, result: GuestWalk, depth: int, size: int, wanted: int, slots: list[Memslot]
) -> bool:
    """Set A in every entry that lacks it and the wanted bits in the leaf, top-down; one mark an entry.

    A table in a READONLY slot is passed over silently.  False where an entry is no longer what the walk read,
    which tables that map themselves bring about: one entry then serves two levels, and the walk starts anew.
    """
    mmu = vcpu.mmu
    leaf = result.level - 1
    for number in range(depth - 1, leaf - 1, -1):
        entry = result.ptes[number]
        new = entry | (wanted if number == leaf else _A)
        if new == entry:
            continue
        slot = slots[depth - 1 - number]
        if slot.flags & READONLY:
            continue
        gfn = result.table_gfn[number]
        if read_entry(slot, gfn, result.index[number], size) != entry:
            return False
        _write_entry(slot, gfn, result.index[number], size, new)
        result.ptes[number] = new
        mmu.mark_page_dirty(slot, gfn)
    return True


def forbids(control: Control, access: int, acc: int) -> bool:
    """Whether accumulated rights deny an access, protection keys aside (SDM vol. 3, 4.6.1)."""
    if access & _FETCH and not acc & roles.ACC_EXEC:
        return True
    if access & _USER:
        return not acc & roles.ACC_USER or bool(access & _WRITE and not acc & roles.ACC_WRITE)
    if acc & roles.ACC_USER:
        if access & _FETCH:
            return bool(control.cr4 & _SMEP)
        if control.cr4 & _SMAP and (access & _IMPLICIT or not control.ac):
            return True
    return bool(access & _WRITE and not acc & roles.ACC_WRITE and control.cr0 & _WP)


def _reader(vcpu: VcpuMmu) -> paging.ReadEntry:
    def read(gpa: int, size: int) -> int | None:
        gfn = gpa >> 12
        slot = vcpu.mmu.memslots.visible(gfn)
        return None if slot is None else read_entry(slot, gfn, (gpa & 0xFFF) // size, size)

    return read


def _judge(vcpu: VcpuMmu, linear: int, access: int) -> None:
    """The rare cases, with all of the architecture's words: raises GuestPageFault if access is denied."""
    result = paging.walk(_reader(vcpu), vcpu.control, linear, Access(access))
    if result.error is not None:
        raise GuestPageFault(result.error, linear)


def _explain(vcpu: VcpuMmu, linear: int, access: int) -> None:
    assert vcpu.mmu.journal is not None
    words = str(paging.walk(_reader(vcpu), vcpu.control, linear, Access(access)))
    vcpu.mmu.journal.note(f"KVM walks the guest's tables: {words}", _RULE)


def fault(control: Control, linear: int, access: int, cause: int) -> GuestPageFault:
    """A #PF with the bits that describe the access (SDM vol. 3, 4.7)."""
    error = int(cause)
    if access & _WRITE:
        error |= PageFault.WR
    if access & _USER and not access & _IMPLICIT:
        error |= PageFault.US
    if access & _FETCH and (control.cr4 & _SMEP or (control.cr4 & _PAE and control.efer & _NXE)):
        error |= PageFault.ID
    return GuestPageFault(int(error), linear)


def forbids_entry(control: Control, gpte: int) -> bool:
    """Whether a present 4 KiB entry has a reserved bit set."""
    return bool(gpte & format_of(control).levels[-1].page_reserved)
