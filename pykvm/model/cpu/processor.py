"""The processor: one instruction after another, with everything that may come between two of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from pykvm.errors import UnsupportedInstruction
from pykvm.machine.exits import Exit, InternalError, Shutdown
from pykvm.model.bus import Bus
from pykvm.model.cpu import decode, gates, instructions, interrupts
from pykvm.model.cpu.access import MemoryAccess
from pykvm.model.cpu.faults import Fault, NeedInput, TripleFault
from pykvm.model.cpu.features import Features
from pykvm.model.cpu.instruction import Instruction
from pykvm.model.cpu.translator.core import Translator
from pykvm.model.paging import Access
from pykvm.x86.bits import Rflags
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import Segment

_MODULES: Final = instructions  # their import has filled the table
_EMULATION: Final = 1  # KVM_INTERNAL_ERROR_EMULATION
_SINGLE_STEP: Final = 1 << 14  # DR6.BS
_BREAKPOINT_MASK: Final = 0xFF
_INSTRUCTIONS_KEPT: Final = 1 << 16
_TF: Final = int(Rflags.TF)
_RF: Final = int(Rflags.RF)
_VM_AND_AC: Final = int(Rflags.VM | Rflags.AC)


class Processor(MemoryAccess):
    """An x86 processor on a bus.

    ``run`` executes until the host must see something.  The plain interpreter here is the reference; with
    ``translate`` hot code runs as Python functions, which behave exactly like it.
    """

    def __init__(self, bus: Bus, cpuid: Sequence[CpuidEntry], *, translate: bool = True) -> None:
        super().__init__(bus, cpuid)
        self.instructions = 0
        """How many instructions completed."""
        self.translated = 0
        """How many of them as translated code."""
        self.shut_down = False
        self.shadow = 0
        """The interrupt shadow over the coming instruction."""
        self.next_shadow = 0
        """Set by an instruction for the one after it."""
        self.pending_debug = 0
        """DR6 bits of debug traps to deliver before the coming instruction."""
        self.pending_interrupt: int | None = None
        """Vector of an external interrupt that waits for RFLAGS.IF."""
        self.pending_nmi = False
        self.nmi_masked = False
        self.injected_exception: Fault | None = None
        """An exception to deliver next, from the host (KVM_SET_VCPU_EVENTS)."""
        self.injected_interrupt: int | None = None
        """Vector of an interrupt that was accepted already: delivered next, whatever RFLAGS.IF says."""
        self.single_step = False
        """A #DB trap follows this instruction; those that load or clear TF say otherwise."""
        self.repetitions = 0
        """How many iterations string instructions did since ``run`` asked."""
        self._saved = self._snapshot()
        self._fetched: dict[int, tuple[int, memoryview, Instruction]] = {}
        """By RIP: epoch, the bytes in memory, and what they were when they were decoded."""
        self.set_cpuid(cpuid)
        self._translator = Translator(self) if translate and sys.byteorder == "little" else None

    # --- instructions ------------------------------------------------------------------------------------

    def run(self, limit: int) -> Exit | None:
        """Execute until an exit, or None after at most ``limit`` instructions.

        Repetitions of string instructions count, too, so that a host waits only so long.
        """
        self.epoch += 1  # the host may have written to memory since
        translator = self._translator
        while not self.exits:
            if self.shut_down:
                return Shutdown() if limit > 0 else None
            if translator is not None and self._undisturbed():
                limit -= translator.run(limit)
                if translator.exit_due():
                    continue
            if limit <= 0:
                return None
            limit -= 1
            try:
                self.step()
            except NeedInput as question:
                return question.exit
            if self.repetitions:
                limit -= self.repetitions
                self.repetitions = 0
        return self.exits.pop(0)

    def step(self) -> None:
        """One instruction, or the delivery of one event.

        Raises NeedInput, having changed nothing, where the host must answer first.
        """
        try:
            try:
                # An instruction that the host answered began already.
                if not self.replies and self._event_waits() and interrupts.take_event(self):
                    return
                insn = self.fetch()
            except Fault as fault:
                interrupts.deliver_fault(self, fault)
                return
            try:
                self.execute(insn)
            except Fault as fault:
                self.rollback()
                self.replies.clear()
                interrupts.deliver_fault(self, fault)
        except TripleFault:
            self.discard()
            self.shut_down = True
            self.exits.append(Shutdown())

    def _event_waits(self) -> bool:
        """Whether take_event must look."""
        return bool(
            self.pending_debug
            or self.pending_nmi
            or self.pending_interrupt is not None
            or self.injected_exception is not None
            or self.injected_interrupt is not None
            or self.dr7 & _BREAKPOINT_MASK
        )

    def _undisturbed(self) -> bool:
        """Whether nothing comes between instructions or looks at each single one."""
        return not (
            self.rflags & _TF or self.shadow or self.replies or self.checks_alignment or self._event_waits()
        )

    def execute(self, insn: Instruction) -> None:
        """Carry out one instruction as a whole."""
        self.single_step = bool(self.rflags & _TF)
        self.next_rip = self.rip + len(insn.encoding) & self.ip_mask
        self._saved = self._snapshot()
        self.next_shadow = 0
        if self.rflags & _RF:
            self.rflags &= ~_RF  # some instructions set it again, for the next one (SDM vol. 3, 18.3.1.1)
        try:
            insn.semantics.execute(self, insn)
        except NeedInput:
            self.rollback()
            raise
        self.commit()
        self.rip = self.next_rip
        self.shadow = self.next_shadow
        self.instructions += 1
        if self.single_step or self.debug_hits:
            self.pending_debug |= self.debug_hits | (_SINGLE_STEP if self.single_step else 0)
            self.debug_hits = 0

    def enter_handler(self, event: gates.Event) -> None:
        """Go to the handler of an event; see gates.enter."""
        gates.enter(self, event)

    def begin(self) -> None:
        """Start something that can be rolled back: the delivery of an event."""
        self._saved = self._snapshot()

    def finish(self) -> None:
        """An event was delivered: its handler comes next."""
        self.commit()
        self.rip = self.next_rip
        self.shadow = 0
        self.pending_debug |= self.debug_hits
        self.debug_hits = 0

    def checkpoint(self) -> None:
        """What the instruction did so far stays, whatever follows (the iterations of REP)."""
        self.commit()
        self._saved = self._snapshot()

    def _snapshot(self) -> tuple[list[int], int, list[Segment], Segment, Segment]:
        return self.regs.copy(), self.rflags, self.segments.copy(), self.tr, self.ldt

    def rollback(self) -> None:
        """Undo the current instruction back to its last checkpoint."""
        self.discard()
        self.debug_hits = 0
        regs, rflags, segments, self.tr, self.ldt = self._saved
        self.regs[:] = regs
        mode_changed = bool((rflags ^ self.rflags) & _VM_AND_AC)
        self.rflags = rflags
        if segments != self.segments:
            self.segments[:] = segments
            mode_changed = True
        if mode_changed:
            self.update_mode()

    def set_cpuid(self, leaves: Sequence[CpuidEntry]) -> None:
        """Have other leaves, and the features that they tell of."""
        self.cpuid = tuple(leaves)
        self.features = Features.of(self.cpuid)
        self._decoders = {bits: decode.decoder(bits, amd=self.features.amd) for bits in (16, 32, 64)}
        self.flush_tlb()

    # --- fetching ----------------------------------------------------------------------------------------

    @property
    def decoder(self) -> decode.Decoder:
        """The one for the present code size."""
        return self._decoders[self.bits]

    def fetch(self) -> Instruction:
        """The instruction at CS:RIP."""
        known = self._fetched.get(self.rip)
        if known is not None:
            epoch, memory, insn = known
            if epoch == self.epoch and memory == insn.encoding:
                return insn
        return self._fetch_and_decode()

    def _fetch_and_decode(self) -> Instruction:
        decoder = self.decoder
        rip = self.rip
        _, first, last, _, _ = self.code_window
        if not first <= rip <= last:
            raise Fault.gp()
        linear = self._linear_rip(rip)
        code = self.fetch_bytes(linear, min(decode.MAX_LENGTH, 0x1000 - (linear & 0xFFF)))
        try:
            try:
                insn = decoder.decode(code)
            except decode.TruncatedError:
                if len(code) == decode.MAX_LENGTH:
                    raise Fault.gp() from None
                if rip + len(code) > last:
                    raise Fault.gp() from None
                code += self.fetch_bytes(self._linear_rip(rip + len(code)), decode.MAX_LENGTH - len(code))
                insn = decoder.decode(code)
        except decode.TruncatedError:
            raise Fault.gp() from None
        except decode.TooLongError:
            raise Fault.gp() from None
        except decode.InvalidEncodingError:
            raise Fault.ud() from None
        except decode.UnknownInstructionError as unknown:
            raise UnsupportedInstruction(linear, unknown.encoding, unknown.text) from None
        if rip + insn.length - 1 > last:
            raise Fault.gp()
        self._remember(rip, linear, insn)
        return insn

    def _remember(self, rip: int, linear: int, insn: Instruction) -> None:
        """Keep an instruction for the next time, unless it crosses a page."""
        offset = linear & 0xFFF
        page = self.translations.fetch.get(linear >> 12)
        ram = self.bus.ram(page >> 12) if page is not None else None
        if ram is not None and offset + insn.length <= 0x1000:
            if len(self._fetched) >= _INSTRUCTIONS_KEPT:
                self._fetched.clear()
            self._fetched[rip] = self.epoch, ram[offset : offset + insn.length], insn

    def flush_tlb(self) -> None:
        super().flush_tlb()
        self._fetched.clear()

    def _linear_rip(self, rip: int) -> int:
        address = self.code_window.base + rip
        if not self.bits64:
            return address & 0xFFFFFFFF
        top = rip >> self.canonical_shift
        if top and top != 0xFFFFFFFFFFFFFFFF >> self.canonical_shift:
            raise Fault.gp()
        return address

    def fetch_bytes(self, linear: int, size: int) -> bytes:
        """Instruction bytes within one page, translated as a fetch."""
        page = self.translations.fetch.get(linear >> 12)
        if page is None:
            page = self._walk(linear, Access.FETCH)
        ram = self.bus.ram(page >> 12)
        if ram is None:
            raise NeedInput(InternalError(_EMULATION, ()))
        return bytes(ram[linear & 0xFFF : (linear & 0xFFF) + size])

    # --- the bus's word ----------------------------------------------------------------------------------

    def watched_frame_changed(self, gfn: int) -> None:
        """The guest wrote to a page that holds page tables or translated code: forget what came from it."""
        self.epoch += 1
        if self.holds_tables(gfn):
            self.flush_tlb()
