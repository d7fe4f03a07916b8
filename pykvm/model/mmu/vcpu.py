"""The MMU of a vCPU: what the processor around it calls.

A processor runs guest code in one of two ways, and asks accordingly:

* natively: ``translate`` for each access, as hardware does with its TLB and the tables that KVM made.  It may
  end in EmulateInstruction: then the whole instruction is carried out the second way;
* in KVM's emulator: ``decoded`` once an instruction, ``emulator_translate`` for each access, and
  ``emulator_write`` for each store, at once and in program order.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from pykvm.model.mmu.counters import VcpuCounters
from pykvm.model.mmu.dirty_ring import DirtyRing
from pykvm.model.mmu.outcomes import EmulateInstruction
from pykvm.model.paging import Control

if TYPE_CHECKING:
    from pykvm.model.mmu.vm import Mmu


class ControlChange(Enum):
    """Who changed control registers: the paths differ in what they flush and when they synchronise."""

    HOST = "KVM_SET_SREGS"
    MOV_CR3 = "MOV to CR3"
    OTHER = "MOV to CR0 or CR4, WRMSR of EFER"


class VcpuMmu:
    """``struct kvm_vcpu`` as far as memory goes."""

    def __init__(self, mmu: Mmu, vcpu_id: int, ring: DirtyRing | None) -> None:
        self.mmu = mmu
        self.id = vcpu_id
        self.ring = ring
        self.counters = VcpuCounters()

    def set_control(self, control: Control, change: ControlChange) -> None:
        """The control registers are these now (kvm-mmu.md 13.5)."""
        raise NotImplementedError

    def enter(self) -> bool:
        """Before guest code runs (every KVM_RUN, and after every exit that KVM handled): serve requests and
        load the root.  False: the dirty ring is full, KVM_RUN returns KVM_EXIT_DIRTY_RING_FULL instead.
        Raises TripleFault.
        """
        raise NotImplementedError

    def translate(self, linear: int, access: int) -> int:
        """The guest-physical address of a linear one, for native code; ``access`` as pykvm.model.paging.Access.

        The access lies within a page.  Takes the faults that KVM fixes without anybody noticing.  Raises
        GuestPageFault and EmulateInstruction.
        """
        raise NotImplementedError

    def decoded(self) -> None:
        """The emulator decoded an instruction, successfully or not (insn_emulation)."""
        self.counters.insn_emulation += 1

    def emulator_translate(self, linear: int, access: int) -> int:
        """As KVM's emulator: a software walk that sets A and D and marks the tables.  Raises GuestPageFault."""
        raise NotImplementedError

    def emulator_write(self, gpa: int, data: bytes, *, locked: bool = False, tracked: bool = True) -> bool:
        """A store of the emulator within one page: memory, dirty mark, track_write.  False: not RAM.

        ``locked``: a locked or exchanging operation, which marks before it looks.  ``tracked`` False: the
        write_std path (FXSAVE, SGDT, descriptors), which no track_write hears of (12.4).
        """
        raise NotImplementedError

    def retry(self, emulate: EmulateInstruction, rip: int, *, page_table_opcode: bool) -> bool:
        """Whether KVM unprotected the gfn and resumes the guest instead of emulating (12.3, 12.7)."""
        raise NotImplementedError

    def emulation_failed(self, emulate: EmulateInstruction | None, rip: int) -> bool:
        """The emulator lacks the instruction: whether an unprotected page lets the guest retry; else
        insn_emulation_fail counts and the caller injects #UD or exits (12.3)."""
        raise NotImplementedError

    def invlpg(self, linear: int) -> None:
        """An intercepted or emulated INVLPG (10.5)."""
        raise NotImplementedError

    def translate_for_host(self, linear: int) -> int | None:
        """KVM_TRANSLATE: a supervisor read that sets A bits and marks tables; None where nothing is mapped."""
        raise NotImplementedError

    # --- what the VM tells it ------------------------------------------------------------------------

    def push_dirty(self, ring_id: int, offset: int) -> None:
        """A mark goes to this vCPU's ring (4.3)."""
        raise NotImplementedError

    def request_tlb_flush(self) -> None:
        """KVM_REQ_TLB_FLUSH: served at the next entry."""
        raise NotImplementedError

    def flush_pml(self) -> None:
        """An exit reads the PML buffer (11.3)."""
        raise NotImplementedError

    def forget_mmio(self) -> None:
        """Slots changed: the remembered MMIO address is void."""
        raise NotImplementedError
