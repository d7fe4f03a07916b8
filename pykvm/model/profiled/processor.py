"""A processor as a host runs it: natively, instruction by instruction in KVM's emulator, or from one to the
other when a native access ends in the emulator's hands (kvm-mmu.md 12, hosts.md C.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pykvm.errors import UnsupportedInstruction
from pykvm.machine.exits import DirtyRingFull, Exit, InternalError, MmioRead, MmioWrite, Shutdown
from pykvm.model.cpu import interrupts
from pykvm.model.cpu.faults import Fault, NeedInput, TripleFault
from pykvm.model.cpu.instruction import Instruction, Memory
from pykvm.model.mmu import outcomes
from pykvm.model.mmu.emulated_opcodes import (
    EXCHANGES,
    GATHERED,
    LENIENT,
    READ_FIRST,
    STANDARD_WRITES,
    Coverage,
    coverage,
    is_page_table_opcode,
    lacked_feature,
    refuses,
    uses_exit_gpa,
)
from pykvm.model.mmu.vcpu import ControlChange
from pykvm.model.paging import Access
from pykvm.model.profiled import emulators, kvm_pvm
from pykvm.model.profiled.access import Raced
from pykvm.model.profiled.delivery import MOST_REFAULTS, HostDelivery
from pykvm.model.profiled.svm import reset_after_shutdown
from pykvm.x86.bits import Rflags
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.bus import Bus
    from pykvm.model.mmu.outcomes import EmulateInstruction
    from pykvm.model.mmu.vcpu import VcpuMmu
    from pykvm.x86.cpuid import CpuidEntry

_EMULATION: Final = 1  # KVM_INTERNAL_ERROR_EMULATION
_STRING_IO: Final = frozenset({"ins", "outs"})
_NATIVE_EXITS: Final = frozenset(
    {"in", "out", "hlt", "cpuid", "rdmsr", "wrmsr", "mov_cr", "invlpg", "invpcid", "vmcall", "vmmcall"}
)
"""Instructions that leave a native guest for KVM."""
_ALIGNED: Final = 16
"""Operands from this size on must be aligned, where the emulator's table does not say otherwise (12.4)."""
_AC: Final = int(Rflags.AC)


class HostProcessor(HostDelivery):
    """The processor of a vCPU on a host; ``mmu`` is the vCPU's."""

    def __init__(self, bus: Bus, cpuid: Sequence[CpuidEntry], mmu: VcpuMmu) -> None:
        self._profile = mmu.mmu.profile
        self.left = True
        """KVM has control: it must look at requests before guest code runs again."""
        self.batch = 0
        """Instructions until a host that emulates in batches looks at requests again."""
        self.emulated: Instruction | None = None
        """The instruction that waits for the host's answer amid its emulation, or amid its repetition."""
        self.mmio_exits = 0
        self.decoded_name = ""
        self._fetched_bytes = b""
        self._began = False
        self._was_native = False
        self._after_undefined = False
        self._undelivered: Fault | None = None
        """The exception that the guest gets when it next runs."""
        self._stuck = 0
        self._flags_kept = ~(kvm_pvm.LOST_FLAGS if self._profile.emulates_all_but_user else 0)
        super().__init__(bus, cpuid, mmu)

    # --- running -------------------------------------------------------------------------------------

    def run(self, limit: int) -> Exit | None:
        """As Processor.run; DirtyRingFull where KVM finds the ring full before it enters the guest."""
        exit = self._run(limit)
        if exit is not None:
            self.mmu.flush_pml()
        return exit

    def _run(self, limit: int) -> Exit | None:
        self.epoch += 1  # the host may have written to memory since
        translator = self._translator
        while not self.exits:
            if self.shut_down:
                return Shutdown() if limit > 0 else None
            if translator is not None and self._runs_on():
                self.refresh_views()
                limit -= translator.run(limit)
            if limit <= 0:
                return None
            limit -= 1
            try:
                if not (self.replies or self.emulated) and not self._enter():
                    return DirtyRingFull()
                self.step()
            except NeedInput as question:
                self.left = True
                return question.exit
            if self.repetitions:
                limit -= self.repetitions
                self.repetitions = 0
        self.left = True
        return self.exits.pop(0)

    def _runs_on(self) -> bool:
        """Whether native code goes on without KVM having a look, and nothing comes between instructions."""
        return self._was_native and not self.left and self.runs_natively and self._undisturbed()

    def _enter(self) -> bool:
        """Before guest code runs: whether it may."""
        native = self.runs_natively
        if self.left:
            self.mmu.flush_pml()
        elif self.batch > 0 and native == self._was_native and self.mmu.rooted:
            return True
        self._was_native = native
        if self._profile.emulates_all_but_user and kvm_pvm.cannot_run(self):
            self.shut_down = True
            self.exits.append(Shutdown())
            return True
        try:
            if not self.mmu.enter():
                return False
        except outcomes.TripleFault:
            self.shut_down = True
            self.exits.append(Shutdown())
        self.left = False
        self.batch = self._profile.emulation_batch
        return True

    @property
    def runs_natively(self) -> bool:
        """Whether the host's processor executes the code as it is now."""
        return not self._profile.emulates_all_but_user or (self.cpl == 3 and self.bits64)

    @property
    def emulates_ports(self) -> bool:
        """Whether IN and OUT are the emulator's; then they do not count as I/O exits."""
        return self._profile.emulates_all_but_user

    def step(self) -> None:
        if self.shut_down or self.spins:
            return
        try:
            if self._undelivered is not None:
                fault, self._undelivered = self._undelivered, None
                self._deliver_now(fault)
            elif self.emulated is not None or not self.runs_natively:
                self._emulated_step()
            else:
                self.features = self._hardware
                self.rflags &= self._flags_kept
                self._native_step()
        except TripleFault:
            self.discard()
            self.exits.append(Shutdown())
            if self._profile.resets_at_shutdown:
                reset_after_shutdown(self)
            else:
                self.shut_down = True
        finally:
            self.features = self._guests

    # --- natively ------------------------------------------------------------------------------------

    def _native_step(self) -> None:
        self.mmu.rip = self.rip
        self.emulating = self._began = False
        try:
            if not self.replies and self._event_waits() and interrupts.take_event(self):
                self.left = True
                return
            insn = self.fetch()
            self.decoded_name = insn.name
            if insn.name in _STRING_IO or self._trapped(insn):
                self._emulate(None)
                return
            if emulators.skips(self._profile, insn):
                emulators.skip(self, insn)
                return
            self.execute(insn)
            self._stuck = 0
            if insn.name in _NATIVE_EXITS:
                self.left = True
        except (outcomes.Refault, outcomes.LeaveGuest):
            self.rollback_native()
            self.left = True
            self._stuck += 1
            if self._stuck > MOST_REFAULTS:
                raise UnsupportedInstruction(self.rip, b"", "faults for ever") from None
        except outcomes.EmulateInstruction as cause:
            self.rollback_native()
            self._emulate(cause)
        except Fault as fault:
            self.rollback_native()
            if self._profile.emulates_all_but_user and kvm_pvm.emulates_fault(self, fault):
                self._after_undefined = fault.vector == Vector.UD
                self._emulate(None)
                self._after_undefined = False
            elif self._profile.emulates_all_but_user and kvm_pvm.repairs_fault(self, fault):
                self._repair()
            else:
                self._deliver(fault)

    def _repair(self) -> None:
        """The host module carries out the instruction at RIP, without KVM's emulator."""
        self.left = self.emulating = True
        try:
            self._carry_out(self.fetch())
        except Fault as fault:
            self.undo_emulated()
            self.emulating = False
            self._deliver(fault)
        finally:
            self.emulating = False

    def _trapped(self, insn: Instruction) -> bool:
        """Whether KVM gets to see the instruction, and emulates it."""
        if self._profile.emulates_all_but_user:
            return kvm_pvm.is_trapped(self, insn)
        return emulators.lacks_assist(self, self._profile, insn)

    def rollback_native(self) -> None:
        """Undo what the instruction did; nothing of it reached memory."""
        if self._began:
            self.rollback()
        else:
            self.discard()

    def at(self, code: bytes) -> bool:
        """Whether RIP points to these bytes, as the fetch found them."""
        return self._fetched_bytes[: len(code)] == code

    # --- fetching ------------------------------------------------------------------------------------

    def fetch(self) -> Instruction:
        return self._fetch_and_decode()

    def fetch_bytes(self, linear: int, size: int) -> bytes:
        self._fetched_bytes = super().fetch_bytes(linear, size)
        return self._fetched_bytes

    def _remember(self, rip: int, linear: int, insn: Instruction) -> None:
        """Every fetch is seen by the MMU."""

    # --- in the emulator -----------------------------------------------------------------------------

    def _emulated_step(self) -> None:
        if self.emulated is None:
            if self._event_waits() and interrupts.take_event(self):
                return
            self.batch -= 1
        self._emulate(None)

    def _emulate(self, cause: EmulateInstruction | None) -> None:
        """``x86_emulate_instruction`` (12.3) for the instruction at RIP."""
        self.left = self.left or self.runs_natively
        self.features = self._guests
        self.emulating = True
        self.mmu.rip = self.rip
        try:
            insn = self.emulated
            if insn is None:
                insn = self._decode(cause)
                if insn is None:
                    return
            elif self._coverage(insn) is Coverage.UNHANDLED:
                self.emulated = None
                self._give_up(insn, cause)
                return
            self.emulated = None
            self._carry_out(insn)
        except Raced:
            self.undo_emulated()
        except Fault as fault:
            self.undo_emulated()
            self.emulating = False
            self._deliver(fault)
        finally:
            self.emulating = False

    def _decode(self, cause: EmulateInstruction | None) -> Instruction | None:
        """Fetch and decode; None where that is all, since KVM resumes the guest or gives up."""
        self._saved = self._snapshot()
        self.exit_gpa = None
        insn: Instruction | None = None
        self.probing = True
        try:
            insn = self.fetch()
        except UnsupportedInstruction:
            pass
        except Fault as fault:
            if fault.vector != Vector.UD:
                self._unfetched(fault, cause)
                return None
        finally:
            self.probing = False
        self.mmu.decoded()
        found = Coverage.UNDECODED if insn is None else self._coverage(insn)
        if insn is None or found is Coverage.UNDECODED:
            self._fail(cause)
            return None
        if cause is not None and self.mmu.retry(
            cause, self.rip, page_table_opcode=is_page_table_opcode(insn)
        ):
            return None
        if cause is not None and self.mmu.direct and uses_exit_gpa(insn):
            self.exit_gpa = cause.address
        if found is Coverage.UNHANDLED:
            self._give_up(insn, cause)
            return None
        if found is Coverage.UNDEFINED:
            self._read_operand(insn, source_only=True)
            raise Fault.ud()
        if found is Coverage.HOST:
            self.mmu.counters.insn_emulation_fail += 1
        return insn

    def _unfetched(self, fault: Fault, cause: EmulateInstruction | None) -> None:
        """The emulator cannot fetch: KVM unprotects what was written and lets the guest try, or delivers it.

        Of an instruction that is trapped the host itself has read the bytes first.
        """
        if cause is not None or not self.runs_natively or self._reads_code():
            self.mmu.decoded()
        if self.mmu.retry_after_failure(cause, self.rip):
            self.discard()
            return
        if fault.vector == Vector.PF:
            self.mmu.inject_page_fault(outcomes.GuestPageFault(fault.error or 0, fault.address))
        raise fault

    def _reads_code(self) -> bool:
        """Whether the page of the instruction can be read, whatever execution says."""
        try:
            self.reach(self._linear_rip(self.rip), int(Access.READ))
        except Fault:
            return False
        return True

    def _give_up(self, insn: Instruction, cause: EmulateInstruction | None) -> None:
        """The emulator reads the operand before it finds that it lacks the instruction."""
        try:
            self._read_operand(insn)
        except NeedInput as question:
            self.emulated = insn
            self.mmio_exits += isinstance(question.exit, MmioRead) and self.fragments == 1
            self.rollback()
            raise
        self._fail(cause)

    def _coverage(self, insn: Instruction) -> Coverage:
        feature = lacked_feature(insn)
        if feature is not None and not getattr(self.features, feature):
            return Coverage.UNDEFINED
        return coverage(insn, self._profile, protected=not self.real_or_vm86, bits64=self.bits64)

    def _read_operand(self, insn: Instruction, *, source_only: bool = False) -> None:
        for operand in insn.operands[1:] if source_only else insn.operands:
            if isinstance(operand, Memory):
                self.next_rip = self.rip + insn.length & self.ip_mask
                linear = self.linear(operand.segment, operand.offset(self), 1, False)
                if operand.size >= _ALIGNED and linear % operand.size:
                    raise Fault.gp()
                operand.read(self)

    def _fail(self, cause: EmulateInstruction | None) -> None:
        """The emulator lacks the instruction (``handle_emulation_failure``)."""
        self.discard()
        if self._after_undefined and refuses(self._fetched_bytes):
            self.emulating = False
            self._deliver(Fault.ud())
            return
        if self.mmu.emulation_failed(cause, self.rip):
            return
        native = cause is not None and self._profile.exit_per_emulated_user_failure
        if self.cpl == 0 or native:
            raise NeedInput(InternalError(_EMULATION, (), self._code()))
        self.emulating = False
        self._deliver(Fault.ud())

    def _code(self) -> bytes:
        """The bytes that KVM fetched."""
        try:
            linear = self._linear_rip(self.rip)
            return self.fetch_bytes(linear, min(15, 0x1000 - (linear & 0xFFF)))
        except (Fault, NeedInput):
            return b""

    def _carry_out(self, insn: Instruction) -> None:
        name = insn.name
        self.untracked = name in STANDARD_WRITES
        self.gathering = name in GATHERED
        self.locking = insn.lock or name in EXCHANGES
        self.lenient = name in LENIENT and self._profile.emulates_all_but_user
        before = len(self.exits)
        try:
            if name in READ_FIRST:
                self._read_operand(insn)
            self.execute(insn)
        except NeedInput as question:
            self.emulated = insn
            self.mmio_exits += isinstance(question.exit, MmioRead) and self.fragments == 1
            raise
        finally:
            self.untracked = self.gathering = self.locking = self.lenient = False
        if any(isinstance(each, MmioWrite) for each in self.exits[before:]):
            self.mmio_exits += 1

    def execute(self, insn: Instruction) -> None:
        self._began = True
        if insn.name in kvm_pvm.BASES and self._profile.emulates_all_but_user:
            kvm_pvm.move_base(self, insn)
        else:
            super().execute(insn)

    def undo_emulated(self) -> None:
        """Registers go back; what was stored stays."""
        self.rollback()

    def no_code(self) -> Exception:
        return NeedInput(InternalError(_EMULATION, ()))

    # --- control registers ---------------------------------------------------------------------------

    def control_changed(self, *, loads_cr3: bool = False, keeps_pcid: bool = False) -> None:
        change = ControlChange.OTHER
        if loads_cr3:
            change = ControlChange.MOV_CR3_NO_FLUSH if keeps_pcid else ControlChange.MOV_CR3
        self.mmu.set_control(self.paging_control(), change)

    def host_changed_control(self) -> None:
        self.mmu.set_control(self.paging_control(), ControlChange.HOST)

    def set_cpuid(self, leaves: Sequence[CpuidEntry]) -> None:
        super().set_cpuid(leaves)
        self._guests = self._hardware = self.features
        if self._profile.emulates_all_but_user:
            self._hardware = kvm_pvm.hardware(self.features)
        self.mmu.control = self.paging_control()  # no register has changed

    def reach(self, address: int, access: int, system: bool = False) -> int:
        if address >> 39 == kvm_pvm.HOST_AREA and self._profile.emulates_all_but_user and not self.emulating:
            raise kvm_pvm.host_area_fault(address, access)
        return super().reach(address, access, system)

    def live_control(self) -> None:
        mmu = self.mmu
        ac = bool(self.rflags & _AC)
        mmu.control = mmu.control._replace(ac=ac, pkru=self.pkru, pkrs=self.pkrs)
        mmu.flush_tlb()

    @property
    def iopl(self) -> int:
        if self._profile.reads_io_bitmap and self.cpl == 3:
            return 0
        return super().iopl

    def update_mode(self) -> None:
        super().update_mode()
        if bool(self.rflags & _AC) != self.mmu.control.ac:
            self.live_control()

    def flush_pcid(self, kind: int, pcid: int, address: int) -> None:
        self.mmu.invpcid(kind, pcid, address)

    def flush_page(self, address: int) -> None:
        self.mmu.invlpg(address)
