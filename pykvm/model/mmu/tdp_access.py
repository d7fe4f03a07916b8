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

Where a profile says that an emulator runs the guest, its deviations apply (``pykvm.profiles.Execution``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.mmu.direct_fault import FETCH, GUEST_FINAL, GUEST_PAGE, PRESENT, RSVD, USER, WRITE
from pykvm.model.mmu.guest_walk import forbids, read_entry
from pykvm.model.mmu.outcomes import GuestPageFault, Refault, RetPf
from pykvm.model.mmu.page_fault import page_fault
from pykvm.model.mmu.pml import PmlBuffer
from pykvm.model.mmu.spte import NX, A, D, P, W
from pykvm.model.mmu.tdp_fault import direct_page_fault, mmio_spte_is_current
from pykvm.model.mmu.tdp_stage import DirectPages, SecondStage
from pykvm.model.paging import Control, walk
from pykvm.model.paging_format import ADDRESS, PAE, Access, Format, format_of, page_address
from pykvm.profiles import Execution, Paging
from pykvm.x86.bits import Cr0, Cr4, PageFault, Pte

if TYPE_CHECKING:
    from pykvm.model.mmu.memslots import Memslot
    from pykvm.model.mmu.vcpu import VcpuMmu

_ACCESSES: Final = 8
"""Combinations of write, fetch and user."""
_KIND_WRITE, _KIND_FETCH = int(Access.WRITE), int(Access.FETCH)
_GUEST_P, _GUEST_RW, _GUEST_US, _GUEST_A, _GUEST_D, _GUEST_XD = (
    int(bit) for bit in (Pte.P, Pte.RW, Pte.US, Pte.A, Pte.D, Pte.NX)
)
_GUEST_RSVD: Final = int(PageFault.RSVD)
_PG: Final = int(Cr0.PG)
_KEYS: Final = int(Cr4.PKE | Cr4.PKS)


class _Violation(Exception):
    """The second stage denies an access: a VM exit with this guest-physical address and error code."""

    def __init__(self, gpa: int, error: int) -> None:
        self.gpa = gpa
        self.error = error


class TdpAccess:
    """The translations of one vCPU under NPT or EPT."""

    def __init__(self, vcpu: VcpuMmu) -> None:
        self._vcpu = vcpu
        mmu = vcpu.mmu
        profile = mmu.profile
        self._npt = profile.paging is Paging.NPT
        self._walks_write = profile.walks_write_tables
        self._tcg = profile.execution is Execution.TCG
        self._checks_flags = not self._walks_write and profile.execution is not Execution.BOCHS
        self._read_needs = P | A if self._walks_write else P
        self._write_needs = P | W | A | D if self._walks_write else P | W
        self.pml = PmlBuffer(vcpu) if profile.pml else None
        self._tlb: tuple[dict[int, int], ...] = tuple({} for _ in range(_ACCESSES))
        """By access, from linear page number to guest-physical page address."""
        self._filled = False
        self._lookup = mmu.memslots.lookup
        self._control = vcpu.control
        self._format = self._form(vcpu.control)
        """The guest's paging mode, of ``_control``."""
        self.root: SecondStage = self._load()

    # --- the TLB -------------------------------------------------------------------------------------

    def translate(self, linear: int, access: int) -> int:
        """The guest-physical address for an access within a page, faults that KVM fixes being taken.

        Raises GuestPageFault (delivered by the processor: KVM counts nothing), EmulateInstruction,
        LeaveGuest where userspace must act before the guest goes on, and Refault after any other fault if
        the vCPU ``restarts``.
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
                if self._vcpu.restarts:
                    raise Refault from None
                continue
            self._filled = True
            self._tlb[access][linear >> 12] = gpa & -4096
            if access & _KIND_WRITE:
                self._tlb[access & ~_KIND_WRITE][linear >> 12] = gpa & -4096
            return gpa

    def _form(self, control: Control) -> Format:
        """The guest's paging mode, with the reserved bits that the processor minds."""
        return format_of(control._replace(amd=False) if self._tcg else control)

    def _load(self) -> SecondStage:
        """The tables that the processor walks: the TDP MMU's, or direct shadow pages."""
        tdp = self._vcpu.mmu.tdp
        return DirectPages(self._vcpu) if tdp is None else tdp.root(self._vcpu.load_as_id)

    def flush(self) -> None:
        """Drop every translation, and take the valid root if the present one was zapped."""
        if self._filled:
            self._filled = False
            for translations in self._tlb:
                translations.clear()
        if self.root.invalid:
            self.root = self._load()

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
        gpa = self._walk(control, linear, access) if control.cr0 & _PG else linear & 0xFFFFFFFF
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

    def _walk(self, control: Control, linear: int, access: int) -> int:
        """The guest's tables, each looked up in the second stage; what they say of the address.

        This is ``pykvm.model.paging.walk``, which also has the words for a denial, interleaved with the
        second stage.
        """
        if control is not self._control:
            self._control = control
            self._format = self._form(control)
        form = self._format
        small = self.root.small
        needs = self._write_needs if self._walks_write else self._read_needs
        table = control.cr3 & form.root
        if form.name is PAE:
            table = self._pdpte(control, linear)
            if not table & _GUEST_P:
                raise self._denied(control, linear, access)
            table &= ADDRESS
        size = form.entry
        rights = _GUEST_RW | _GUEST_US
        disabled = entry = 0
        late: list[tuple[Memslot, int, int, int]] = []
        slot: Memslot | None = None
        for level in form.levels:
            _, shift, mask, page, reserved, page_reserved, offset = level
            gfn = table >> 12
            index = linear >> shift & mask
            spte = small.get(gfn) or self.root.leaf(gfn)[0]
            if spte & needs != needs:
                self._reach_table(table + index * size, spte)
            slot = self._lookup(gfn, self._vcpu.load_as_id)
            assert slot is not None, "the second stage maps slots only"
            if size == 8:
                entry = slot.words[(gfn - slot.base_gfn << 9) + index]
            else:
                entry = read_entry(slot, gfn, index, 4)
            if not entry & _GUEST_P:
                raise self._denied(control, linear, access)
            rights &= entry
            disabled |= entry
            if entry & page:
                if entry & page_reserved:
                    raise self._denied(control, linear, access)
                break
            if entry & reserved:
                raise self._denied(control, linear, access)
            if not entry & _GUEST_A:
                if self._npt:
                    _write_entry(slot, gfn, index, size, entry | _GUEST_A)
                else:
                    late.append((slot, gfn, index, entry | _GUEST_A))
            table = entry & ADDRESS
        acc = rights | (not disabled & _GUEST_XD)
        if (control.cr4 & _KEYS or forbids(control, access, acc)) and (
            denied := self._judge(control, linear, access)
        ):
            raise denied
        wanted = entry | (_GUEST_A | _GUEST_D if access & _KIND_WRITE else _GUEST_A)
        if wanted != entry:
            assert slot is not None
            late.append((slot, gfn, index, wanted))
        for each in late:
            self._update(*each, size)
        if size == 4:
            return page_address(form, level, entry) | linear & offset
        return entry & ADDRESS & ~offset | linear & offset

    def _update(self, slot: Memslot, gfn: int, index: int, entry: int, size: int) -> None:
        """The processor sets flags in an entry of a guest table: a write, where the walk was none yet."""
        if self._checks_flags:
            spte = self.root.leaf(gfn)[0]
            if spte & self._write_needs != self._write_needs:
                self._write((gfn << 12) + index * size, spte, GUEST_PAGE)
        _write_entry(slot, gfn, index, size, entry)

    def _reach_table(self, gpa: int, spte: int) -> None:
        """The second stage does not simply allow the walk to look at an entry."""
        if self._walks_write:
            self._write(gpa, spte, GUEST_PAGE)
        else:
            self._look(gpa, spte, GUEST_PAGE)

    def _pdpte(self, control: Control, linear: int) -> int:
        """The PDPTE of an address: with NPT from memory, else from its register."""
        number = linear >> 30 & 3
        if not self._npt:
            return control.pdptrs[number]
        gpa = (control.cr3 & 0xFFFFFFE0) + 8 * number
        gfn = gpa >> 12
        spte = self.root.leaf(gfn)[0]
        if spte & self._write_needs != self._write_needs:
            self._write(gpa, spte, GUEST_PAGE)
        slot = self._lookup(gfn, self._vcpu.load_as_id)
        assert slot is not None, "the second stage maps slots only"
        index = (gpa & 0xFFF) >> 3
        entry = read_entry(slot, gfn, index, 8)
        if self._tcg and entry & _GUEST_P:
            _write_entry(slot, gfn, index, 8, entry | _GUEST_A)
        return entry

    def _judge(self, control: Control, linear: int, access: int) -> GuestPageFault | None:
        """The architecture's word on an access whose tables were all reached."""

        def read(gpa: int, size: int) -> int | None:
            gfn = gpa >> 12
            slot = self._lookup(gfn, self._vcpu.load_as_id)
            return None if slot is None else read_entry(slot, gfn, (gpa & 0xFFF) // size, size)

        if self._tcg:
            control = control._replace(amd=False)
        if self._npt and self._format.name is PAE:
            pdptrs = tuple(read((control.cr3 & 0xFFFFFFE0) + 8 * number, 8) or 0 for number in range(4))
            control = control._replace(pdptrs=(pdptrs[0], pdptrs[1], pdptrs[2], pdptrs[3]))
        found = walk(read, control, linear, Access(access))
        if found.error is None:
            return None
        error = found.error
        if self._tcg and error & _GUEST_RSVD:
            error &= ~_GUEST_P
        return GuestPageFault(error, linear, injected=False)

    def _denied(self, control: Control, linear: int, access: int) -> GuestPageFault:
        fault = self._judge(control, linear, access)
        assert fault is not None, "both walks follow the same rules"
        return fault

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
        self.root.set_flags(gpa >> 12, A | D)

    def _look(self, gpa: int, spte: int, stage: int) -> None:
        """A read that an SPTE does not simply allow."""
        if not spte & P:
            self._violate(gpa, spte, stage)
        self.root.set_flags(gpa >> 12, A)

    def _violate(self, gpa: int, spte: int, error: int) -> None:
        """The error code of ``kvm_mmu_page_fault`` (7.1).  NPT takes every access for a user's."""
        mmio = not spte and self.root.maps_mmio(gpa >> 12)
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
