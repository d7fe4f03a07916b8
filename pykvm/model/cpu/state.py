"""The processor's registers, and what follows from them: mode, privilege, the windows of its segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from pykvm.model.cpu.features import Features
from pykvm.model.cpu.flags import MASK
from pykvm.model.cpu.instruction import CS, FS, GS, SS
from pykvm.x86.bits import Cr0, Cr4, Efer, Rflags
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import DescriptorTable, Registers, Segment, SpecialRegisters

SHADOW_STI: Final = 1
SHADOW_SS: Final = 2
"""After STI no interrupt, after MOV SS and POP SS no debug trap either (SDM vol. 3, 6.8.3)."""

SEGMENT_NAMES: Final = ("es", "cs", "ss", "ds", "fs", "gs")
_TOP: Final = MASK[8]
_FIXED: Final = int(Rflags.FIXED)
_VM, _AC = int(Rflags.VM), int(Rflags.AC)
_PE, _AM, _LA57, _LMA = int(Cr0.PE), int(Cr0.AM), int(Cr4.LA57), int(Efer.LMA)
_VM_AND_AC: Final = int(Rflags.VM | Rflags.AC)
_CODE, _WRITABLE_OR_READABLE, _EXPAND_DOWN = 8, 2, 4


class Window(NamedTuple):
    """Which offsets of a segment may be used, first to last, and how (SDM vol. 3, 5.3 and 5.5)."""

    base: int
    first: int
    last: int
    readable: bool
    writable: bool


class X87:
    """x87 registers: ``registers`` are the eight physical ones, 80 bits each; the top is in ``status``.

    ``tags`` is the full tag word, two bits a physical register (SDM vol. 1, 8.1.7).
    """

    __slots__ = ("control", "data_pointer", "instruction_pointer", "opcode", "registers", "status", "tags")

    def __init__(self) -> None:
        self.registers = [0] * 8
        self.control = 0x37F
        self.status = 0
        self.tags = 0xFFFF
        self.opcode = 0
        self.instruction_pointer = 0
        self.data_pointer = 0


class State:
    """Registers, each an unsigned integer of its width.

    Segments are values: replace one with ``set_segment``, never change it.  After changing CR0, CR4, EFER,
    RFLAGS.VM or RFLAGS.AC call ``update_mode``; arithmetic writes ``rflags`` directly.
    """

    def __init__(self, cpuid: Sequence[CpuidEntry]) -> None:
        special = SpecialRegisters()
        self.cpuid = tuple(cpuid)
        self.features = Features.of(self.cpuid)
        self.regs = [0] * 16
        self.regs[2] = 0x600  # EDX after reset: a family and model (SDM vol. 3, 10.1.2)
        self.rip = 0xFFF0
        self.next_rip = 0
        self.rflags = 2
        self.segments: list[Segment] = [getattr(special, name) for name in SEGMENT_NAMES]
        self.tr, self.ldt = special.tr, special.ldt
        self.gdt, self.idt = special.gdt, special.idt
        self.cr0, self.cr2, self.cr3, self.cr4, self.cr8 = special.cr0, 0, 0, 0, 0
        self.efer = 0
        self.pdptrs = (0, 0, 0, 0)
        self.apic_base = special.apic_base
        self.xcr0 = 1
        self.xss = 0
        self.pkru = 0
        self.pkrs = 0
        self.dr = [0, 0, 0, 0]
        self.dr6 = 0xFFFF0FF0
        self.dr7 = 0x400
        self.msrs: dict[int, int] = {}
        self.x87 = X87()
        self.xmm = [0] * 16
        self.mxcsr = 0x1F80
        self.tsc_offset = 0
        self.windows: list[Window] = []
        self.epoch = 0
        """Counts what may make translated code invalid: changes of mode, segments, translations, memory."""
        self.update_mode()

    # --- what follows from the registers -----------------------------------------------------------

    def update_mode(self) -> None:
        """Work out anew what follows from control registers, RFLAGS and segments."""
        self.protected_mode = bool(self.cr0 & _PE)
        self.vm86 = bool(self.protected_mode and self.rflags & _VM)
        self.long_mode = bool(self.efer & _LMA)
        self.real_or_vm86 = not self.protected_mode or self.vm86
        code, stack = self.segments[CS], self.segments[SS]
        self.cpl = 3 if self.vm86 else stack.dpl if self.protected_mode else 0
        self.bits64 = bool(self.long_mode and code.l)
        self.bits = 64 if self.bits64 else 32 if code.db and not self.vm86 else 16
        self.ip_mask = _TOP if self.bits64 else 0xFFFFFFFF
        self.stack_size = 8 if self.bits64 else 4 if stack.db else 2
        self.stack_mask = MASK[self.stack_size]
        self.canonical_shift = 56 if self.cr4 & _LA57 else 47
        self.checks_alignment = bool(self.cpl == 3 and self.cr0 & _AM and self.rflags & _AC)
        self.windows = [self._window(number) for number in range(6)]
        self.epoch += 1

    def set_segment(self, number: int, segment: Segment) -> None:
        """Replace a segment register with its hidden part; of CS and SS, the mode follows."""
        self.segments[number] = segment
        if number in {CS, SS}:
            self.update_mode()
        else:
            self.windows[number] = self._window(number)
            self.epoch += 1

    def set_rflags(self, value: int) -> None:
        """Replace RFLAGS, system flags included; bit 1 stays set."""
        changed = (self.rflags ^ value) & _VM_AND_AC
        self.rflags = int(value) | _FIXED
        if changed:
            self.update_mode()

    def _window(self, number: int) -> Window:
        segment = self.segments[number]
        if self.bits64:
            return Window(segment.base if number in {FS, GS} else 0, 0, _TOP, True, True)
        if self.real_or_vm86:
            return Window(segment.base, 0, segment.limit, True, True)
        if segment.unusable or not segment.present:
            return Window(0, 1, 0, False, False)
        code = segment.type & _CODE
        permitted = bool(segment.type & _WRITABLE_OR_READABLE)
        first, last = 0, segment.limit
        if not code and segment.type & _EXPAND_DOWN:
            first, last = segment.limit + 1, 0xFFFFFFFF if segment.db else 0xFFFF
        return Window(segment.base, first, last, permitted or not code, permitted and not code)

    def is_canonical(self, address: int) -> bool:
        """Whether the upper bits repeat the top bit of the address (SDM vol. 1, 3.3.7.1)."""
        top = address >> self.canonical_shift
        return not top or top == _TOP >> self.canonical_shift

    @property
    def code_window(self) -> Window:
        """CS for fetches."""
        return self.windows[CS]

    @property
    def iopl(self) -> int:
        """RFLAGS.IOPL."""
        return self.rflags >> 12 & 3

    # --- as KVM's interface has them -----------------------------------------------------------------

    def get_registers(self) -> Registers:
        """KVM_GET_REGS."""
        r = self.regs
        return Registers(
            rax=r[0], rcx=r[1], rdx=r[2], rbx=r[3], rsp=r[4], rbp=r[5], rsi=r[6], rdi=r[7],
            r8=r[8], r9=r[9], r10=r[10], r11=r[11], r12=r[12], r13=r[13], r14=r[14], r15=r[15],
            rip=self.rip, rflags=self.rflags,
        )  # fmt: skip

    def set_registers(self, value: Registers) -> None:
        """KVM_SET_REGS."""
        self.regs[:] = (
            value.rax, value.rcx, value.rdx, value.rbx, value.rsp, value.rbp, value.rsi, value.rdi,
            value.r8, value.r9, value.r10, value.r11, value.r12, value.r13, value.r14, value.r15,
        )  # fmt: skip
        self.rip = value.rip
        self.rflags = int(value.rflags) | _FIXED
        self.update_mode()

    def get_special_registers(self) -> SpecialRegisters:
        """KVM_GET_SREGS."""
        pae = self.cr0 & Cr0.PG and self.cr4 & Cr4.PAE and not self.long_mode
        es, cs, ss, ds, fs, gs = self.segments
        return SpecialRegisters(
            es=es,
            cs=cs,
            ss=ss,
            ds=ds,
            fs=fs,
            gs=gs,
            tr=self.tr,
            ldt=self.ldt,
            gdt=DescriptorTable(self.gdt.base, self.gdt.limit),
            idt=DescriptorTable(self.idt.base, self.idt.limit),
            cr0=self.cr0,
            cr2=self.cr2,
            cr3=self.cr3,
            cr4=self.cr4,
            cr8=self.cr8,
            efer=self.efer,
            apic_base=self.apic_base,
            pdptrs=self.pdptrs if pae else None,
        )

    def set_special_registers(self, value: SpecialRegisters) -> None:
        """KVM_SET_SREGS, without its checks."""
        self.segments = [getattr(value, name) for name in SEGMENT_NAMES]
        self.tr, self.ldt = value.tr, value.ldt
        self.gdt, self.idt = value.gdt, value.idt
        # Plain integers: operations on enumeration flags take ten times as long.
        self.cr0, self.cr2, self.cr3, self.cr4, self.cr8 = (
            int(register) for register in (value.cr0, value.cr2, value.cr3, value.cr4, value.cr8)
        )
        self.efer = int(value.efer)
        self.apic_base = value.apic_base
        if value.pdptrs is not None:
            self.pdptrs = value.pdptrs
        self.update_mode()
