"""What the processor does natively under nested paging: its two-dimensional walk and TLB (kvm-mmu.md 13.4).

Every guest-physical address that an access touches, those of the guest's tables included, is looked up in the
second stage.  A violation there is a VM exit, which KVM's fault pipeline handles; then the guest tries again.

Where the architecture leaves open what happens, the model decides:

* The guest's A flags: with NPT the processor sets A of an upper entry as soon as it goes on to the next
  level, even if the walk then faults; with EPT it sets nothing before the walk has succeeded.  A and D of the
  leaf are set when the access is permitted, before the second stage of the page itself is looked at.
* The TLB keeps translations by the kind of access that made them until the next VM exit, INVLPG or change of
  a control register.  A processor may drop any translation at any time, and the emulated ones under which KVM
  can be watched do so at each exit.  Translations of other PCIDs are therefore not kept either.
* PAE: with NPT the PDPTEs are read from memory in each walk, with EPT from their registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.mmu.direct_fault import FETCH, GUEST_FINAL, GUEST_PAGE, PRESENT, RSVD, USER, WRITE
from pykvm.model.mmu.guest_walk import read_entry
from pykvm.model.mmu.outcomes import GuestPageFault, RetPf
from pykvm.model.mmu.page_fault import page_fault
from pykvm.model.mmu.pml import PmlBuffer
from pykvm.model.mmu.profile import Paging
from pykvm.model.mmu.spte import NX, A, D, P, W
from pykvm.model.mmu.tdp_fault import direct_page_fault, mmio_spte_is_current
from pykvm.model.paging import Control, walk
from pykvm.model.paging_format import PAE, Access, format_of
from pykvm.x86.bits import Cr0, Pte

if TYPE_CHECKING:
    from pykvm.model.mmu.memslots import Memslot
    from pykvm.model.mmu.vcpu import VcpuMmu

_ACCESSES: Final = 16
_KIND_WRITE, _KIND_FETCH = int(Access.WRITE), int(Access.FETCH)
_GUEST_A: Final = int(Pte.A)
_PG: Final = int(Cr0.PG)


class _Violation(Exception):
    """The second stage denies an access: a VM exit with this guest-physical address and error code."""

    def __init__(self, gpa: int, error: int) -> None:
        self.gpa = gpa
        self.error = error


class TdpAccess:
    """The translations of one vCPU under NPT or EPT with the TDP MMU."""

    def __init__(self, vcpu: VcpuMmu) -> None:
        self._vcpu = vcpu
        mmu = vcpu.mmu
        assert mmu.tdp is not None
        self._tdp = mmu.tdp
        profile = mmu.profile
        self._npt = profile.paging is Paging.NPT
        self._walks_write = profile.walks_write_tables
        self._read_needs = P | A if self._walks_write else P
        self._write_needs = P | W | A | D if self._walks_write else P | W
        self.pml = PmlBuffer(vcpu) if profile.pml else None
        self._tlb: tuple[dict[int, int], ...] = tuple({} for _ in range(_ACCESSES))
        """By access, from linear to guest-physical page address."""
        self.root = self._tdp.root(vcpu.load_as_id)
        self._above: tuple[Memslot, int, int, int, int] | None = None

    # --- the TLB -------------------------------------------------------------------------------------

    def translate(self, linear: int, access: int) -> int:
        """The guest-physical address for an access within a page, faults that KVM fixes being taken.

        Raises GuestPageFault (delivered by the processor: KVM counts nothing) and EmulateInstruction.
        """
        page = self._tlb[access].get(linear >> 12)
        if page is not None:
            return page | linear & 0xFFF
        while True:
            try:
                gpa = self._access(linear, access)
            except _Violation as violation:
                self.exit()
                page_fault(self._vcpu, violation.gpa, violation.error)
                self._vcpu.reenter()
                continue
            page = gpa & -4096
            self._tlb[access][linear >> 12] = page
            if access & _KIND_WRITE:
                self._tlb[access & ~_KIND_WRITE][linear >> 12] = page
            return gpa

    def flush(self) -> None:
        """Drop every translation, and take the valid root if the present one was zapped."""
        for translations in self._tlb:
            translations.clear()
        if self.root.invalid:
            self.root = self._tdp.root(self._vcpu.load_as_id)

    def exit(self) -> None:
        """A VM exit: translations are lost, the PML buffer is read."""
        self.flush()
        if self.pml is not None:
            self.pml.flush()

    def handle_mmio(self, gpa: int) -> bool:
        """Whether an MMIO SPTE of the current memslot generation answers a reserved-bit fault at gpa."""
        if not mmio_spte_is_current(self._vcpu, gpa >> 12):
            return False
        self._vcpu.remember_mmio(gpa, gpa >> 12)
        return True

    def page_fault(self, gpa: int, error_code: int) -> RetPf:
        """KVM's side of a violation."""
        return direct_page_fault(self._vcpu, gpa, error_code)

    # --- the walk ------------------------------------------------------------------------------------

    def _access(self, linear: int, access: int) -> int:
        """One attempt: the guest's tables, then the page.  Raises _Violation and GuestPageFault."""
        control = self._vcpu.control
        if not control.cr0 & _PG:
            gpa = linear & 0xFFFFFFFF
        else:
            if self._npt and format_of(control).name is PAE:
                control = self._load_pdpte(control, linear)
            self._above = None
            found = walk(self._read, control, linear, Access(access))
            if found.error is not None:
                raise GuestPageFault(found.error, linear, injected=False)
            for update in found.updates:
                self._update(update.gpa, update.size, update.new)
            gpa = found.gpa
        gfn = gpa >> 12
        spte = self.root.small.get(gfn) or self.root.leaf(gfn)[0]
        if access & _KIND_WRITE:
            if spte & self._write_needs != self._write_needs:
                self._write(gpa, spte, GUEST_FINAL)
        elif access & _KIND_FETCH:
            if spte & (P | NX) != P:
                self._violate(gpa, spte, FETCH | GUEST_FINAL)
        elif spte & self._read_needs != self._read_needs:
            self._look(gpa, spte, GUEST_FINAL)
        return gpa

    def _read(self, gpa: int, size: int) -> int | None:
        """The walk reads an entry of a guest table.

        With NPT, that it goes on proves the entry above to be good: its A flag is set now.
        """
        gfn = gpa >> 12
        if self._above is not None:
            self._set_accessed(*self._above)
        spte = self.root.small.get(gfn) or self.root.leaf(gfn)[0]
        if self._walks_write:
            if spte & self._write_needs != self._write_needs:
                self._write(gpa, spte, GUEST_PAGE)
        elif spte & self._read_needs != self._read_needs:
            self._look(gpa, spte, GUEST_PAGE)
        slot = self._vcpu.mmu.memslots.lookup(gfn, self._vcpu.load_as_id)
        if slot is None:
            return None
        index = (gpa & 0xFFF) // size
        value = (
            slot.words[(gfn - slot.base_gfn << 9) + index] if size == 8 else read_entry(slot, gfn, index, 4)
        )
        if self._npt:
            self._above = None if value & _GUEST_A else (slot, gfn, index, size, value)
        return value

    def _set_accessed(self, slot: Memslot, gfn: int, index: int, size: int, value: int) -> None:
        _write_entry(slot, gfn, index, size, value | _GUEST_A)

    def _update(self, gpa: int, size: int, entry: int) -> None:
        """The processor sets flags in an entry of a guest table."""
        gfn = gpa >> 12
        if not self._walks_write:
            spte = self.root.leaf(gfn)[0]
            if spte & self._write_needs != self._write_needs:
                self._write(gpa, spte, GUEST_PAGE)
        slot = self._vcpu.mmu.memslots.lookup(gfn, self._vcpu.load_as_id)
        assert slot is not None, "the second stage maps it"
        _write_entry(slot, gfn, (gpa & 0xFFF) // size, size, entry)

    def _load_pdpte(self, control: Control, linear: int) -> Control:
        number = linear >> 30 & 3
        self._above = None
        entry = self._read((control.cr3 & 0xFFFFFFE0) + 8 * number, 8) or 0
        pdptrs = list(control.pdptrs)
        pdptrs[number] = entry
        return control._replace(pdptrs=(pdptrs[0], pdptrs[1], pdptrs[2], pdptrs[3]))

    # --- the second stage's rare cases ---------------------------------------------------------------

    def _write(self, gpa: int, spte: int, stage: int) -> None:
        """A write that an SPTE does not simply allow: a violation, or A and D are to be set."""
        if spte & (P | W) != P | W:
            self._violate(gpa, spte, WRITE | stage)
        if self.pml is not None and not spte & D:
            if self.pml.is_full:
                self.exit()
                self._vcpu.reenter()
            self.pml.log(gpa >> 12)
        self._set(gpa, A | D)

    def _look(self, gpa: int, spte: int, stage: int) -> None:
        """A read that an SPTE does not simply allow."""
        if not spte & P:
            self._violate(gpa, spte, stage)
        self._set(gpa, A)

    def _set(self, gpa: int, flags: int) -> None:
        gfn = gpa >> 12
        spte, level = self.root.leaf(gfn)
        self.root.leaves[level][gfn >> 9 * (level - 1)] = spte | flags

    def _violate(self, gpa: int, spte: int, error: int) -> None:
        """The error code of ``kvm_mmu_page_fault`` (7.1).  NPT takes every access for a user's."""
        mmio = not spte and gpa >> 12 in self.root.mmio
        if self._npt:
            error |= USER | (RSVD | PRESENT if mmio else PRESENT if spte & P else 0)
        elif mmio:
            error = RSVD  # an EPT misconfiguration says nothing else
        elif spte & P:
            error |= PRESENT
        raise _Violation(gpa, error)


def _write_entry(slot: Memslot, gfn: int, index: int, size: int, entry: int) -> None:
    """The processor's locked update of a table entry."""
    if size == 8:
        slot.words[(gfn - slot.base_gfn << 9) + index] = entry
    else:
        at = (gfn - slot.base_gfn << 12) + index * 4
        slot.data[at : at + 4] = entry.to_bytes(4, "little")
