"""An emulated write to guest memory, as KVM's own MMU sees it (``kvm_mmu_track_write``, kvm-mmu.md 10.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.mmu import roles
from pykvm.model.mmu.shadow_mmu import flooded
from pykvm.model.mmu.shadow_page import ShadowPage
from pykvm.x86.bits import Cr4

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

_RULE: Final = "kvm-mmu.md 10.6"


def track_write(vcpu: VcpuMmu, gpa: int, size: int) -> None:
    """Memory at gpa was changed, ``size`` bytes within a page: shadow pages made of it follow."""
    mmu = vcpu.mmu
    shadow = mmu.shadow
    if not shadow.indirect_pages:
        return
    counters = mmu.counters
    gfn = gpa >> 12
    if size == 4 and vcpu.control.cr4 & Cr4.PAE:
        gpa &= ~7
        size = 8
    counters.mmu_pte_write += 1
    pages = shadow.by_gfn.get(gfn)
    if not pages:
        return
    entry = _entry(vcpu, gpa, size) if size in (4, 8) else 0
    zapped: list[ShadowPage] = []
    flush = False
    for sp in tuple(pages):
        if shadow.is_obsolete(sp):
            continue
        if misaligned(sp, gpa, size) or flooded(sp):
            if mmu.journal is not None:
                mmu.journal.note(f"the write to {sp} is misaligned or floods it", _RULE)
            shadow.prepare_zap(sp, zapped)
            counters.mmu_flooded += 1
            continue
        for index in written_sptes(sp, gpa):
            present = shadow.zap_entry(sp, index)
            if entry and sp.level != 1:
                counters.mmu_pde_zapped += 1
            flush |= present
            if mmu.journal is not None:
                mmu.journal.note(f"SPTE {index:#x} of {sp} is cleared after the write", _RULE)
    shadow.flush_or_commit(zapped, flush=flush)


def _entry(vcpu: VcpuMmu, gpa: int, size: int) -> int:
    """The guest's entry as it is in memory now; 0 where it cannot be read."""
    slot = vcpu.mmu.memslots.visible(gpa >> 12)
    if slot is None:
        return 0
    at = gpa - (slot.base_gfn << 12)
    return int.from_bytes(slot.data[at : at + size], "little")


def misaligned(sp: ShadowPage, gpa: int, size: int) -> bool:
    """``detect_write_misaligned``: a write that is no whole entry, status bytes at an entry's start aside."""
    offset = gpa & 0xFFF
    entry = 4 if sp.role & roles.FOUR_BYTE_GPTE else 8
    if size == 1 and not offset & entry - 1:
        return False
    return size < 4 or bool((offset ^ offset + size - 1) & ~(entry - 1))


def written_sptes(sp: ShadowPage, gpa: int) -> tuple[int, ...]:
    """``get_written_sptes``: the SPTEs made of the written entry; none for another quadrant."""
    offset = gpa & 0xFFF
    if not sp.role & roles.FOUR_BYTE_GPTE:
        return (offset >> 3,)
    offset <<= 1
    count = 1
    if sp.level == 2:
        offset = (offset & ~7) << 1
        count = 2
    if offset >> 12 != sp.role >> roles.QUADRANT_SHIFT & 3:
        return ()
    index = (offset & 0xFFF) >> 3
    return tuple(range(index, index + count))
