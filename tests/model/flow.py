"""A megabyte with descriptor tables, handlers and stacks, to run short programs on the model and on KVM.

Everything is placed by hand, from the SDM's formats.  Each handler is a HLT of its own, so RIP tells which
vector was delivered; interrupt and exception frames are left on the stack.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, fields, replace

from pykvm.machine import Registers, SpecialRegisters
from pykvm.machine.exits import Halted
from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.cpu.processor import Processor
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import DescriptorTable, Segment
from tests.model.chip import SIZE, Memory

PML4, PDPT, PD = 0x1000, 0x2000, 0x3000
CODE, HANDLERS, DATA = 0x8000, 0xA000, 0x9000
STACK, STACK3, STACK_TSS, STACK_IST = 0x7000, 0xE000, 0xF000, 0x10000
GDT, IDT, TSS, LDT, TSS2 = 0x20000, 0x21000, 0x23000, 0x24000, 0x25000

CODE32, DATA32, CODE64, CODE16, DATA16 = 0x08, 0x10, 0x18, 0x20, 0x28
CODE32_USER, DATA_USER, CODE64_USER = 0x33, 0x3B, 0x43
CONFORMING, TSS_SELECTOR, LDT_SELECTOR, TSS2_SELECTOR = 0x48, 0x50, 0x60, 0x70
FREE = 0x80
"""The first selector that is left to the test."""

CODE_TYPE, DATA_TYPE, CONFORMING_TYPE = 0xB, 0x3, 0xF
"""Readable code and writable data, accessed."""


def descriptor(
    type_: int, *, base: int = 0, limit: int = 0xFFFFF, dpl: int = 0, s: int = 1, p: int = 1, flags: int = 0xC
) -> bytes:
    """SDM vol. 3, figure 3-8; ``flags`` are G, D/B, L and AVL from bit 3 down, ``limit`` its raw 20 bits."""
    return struct.pack(
        "<HHBBBB",
        limit & 0xFFFF,
        base & 0xFFFF,
        base >> 16 & 0xFF,
        type_ | s << 4 | dpl << 5 | p << 7,
        limit >> 16 | flags << 4,
        base >> 24,
    )


def gate(
    type_: int, selector: int, offset: int, *, dpl: int = 0, p: int = 1, count: int = 0, wide: bool = False
) -> bytes:
    """SDM vol. 3, figures 5-8, 6-2 and 6-8; ``count`` also stands for IST."""
    low = struct.pack(
        "<HHBBH", offset & 0xFFFF, selector, count, type_ | dpl << 5 | p << 7, offset >> 16 & 0xFFFF
    )
    return low + struct.pack("<II", offset >> 32, 0) if wide else low


def handler(vector: int) -> int:
    """Where the handler of a vector is; RIP after its HLT is one more."""
    return HANDLERS + vector * 16


@dataclass
class World:
    """Memory and registers before a program; ``bits`` is 16 (real), 32 or 64 (IA-32e, paged)."""

    bits: int = 32
    cpl: int = 0
    memory: bytearray = field(default_factory=lambda: bytearray(SIZE))
    registers: Registers = field(default_factory=lambda: Registers(rip=CODE, rsp=STACK))
    special: SpecialRegisters = field(default_factory=SpecialRegisters)

    def __post_init__(self) -> None:
        self._special()
        self._tables()
        for vector in range(256):
            self.put(handler(vector), b"\xf4")
            self.handle(vector, handler(vector))
        if self.cpl:
            self.registers.rsp = STACK3

    def put(self, address: int, data: bytes | str) -> World:
        data = bytes.fromhex(data) if isinstance(data, str) else data
        self.memory[address : address + len(data)] = data
        return self

    def code(self, data: bytes | str, at: int = CODE) -> World:
        """The program, in hexadecimal."""
        return self.put(at, data)

    def define(self, selector: int, data: bytes) -> World:
        """Put a descriptor into the GDT."""
        return self.put(GDT + (selector & ~7), data)

    def handle(self, vector: int, offset: int, *, type_: int = 0xE, **options: int) -> World:
        """Put a gate (or a real-mode vector) into the table."""
        if self.bits == 16:
            return self.put(vector * 4, struct.pack("<HH", offset, 0))
        wide = self.bits == 64
        return self.put(
            IDT + vector * (16 if wide else 8),
            gate(type_, options.pop("selector", CODE64 if wide else CODE32), offset, wide=wide, **options),
        )

    def gate(self, vector: int, data: bytes) -> World:
        """Put any gate into the IDT."""
        return self.put(IDT + vector * (16 if self.bits == 64 else 8), data)

    def task(self, code: str = "f4", **selectors: int) -> World:
        """Fill the second TSS, in 32-bit format: ``code`` at DATA, registers 1 to 8, other stack."""
        values = {
            "es": DATA32,
            "cs": CODE32,
            "ss": DATA32,
            "ds": DATA32,
            "fs": 0,
            "gs": 0,
            "ldt": 0,
        } | selectors
        registers = (0x11, 0x22, 0x33, 0x44, STACK_TSS, 0x66, 0x77, 0x88)
        eip_to_ldt = (DATA, 0x2, *registers, *values.values())
        self.put(TSS2, struct.pack("<28xI17I", 0, *eip_to_ldt))
        return self.put(DATA, code)

    def task16(self) -> World:
        """The same in 16-bit format."""
        registers = (0x11, 0x22, 0x33, 0x44, STACK_TSS, 0x66, 0x77, 0x88)
        words = (DATA, 0x2, *registers, DATA32, CODE32, DATA32, DATA32, 0)
        self.put(TSS2 + 14, struct.pack("<15H", *words))
        return self.put(DATA, "f4")

    def frame(self, *values: int, size: int = 4) -> World:
        """Put values onto the stack, the topmost first."""
        self.registers.rsp -= size * len(values)
        return self.put(self.registers.rsp, b"".join(value.to_bytes(size, "little") for value in values))

    def set(self, **registers: int) -> World:
        for name, value in registers.items():
            setattr(self.registers, name, value)
        return self

    def _special(self) -> None:
        special = self.special
        if self.bits == 16:
            special.cs = Segment(type=0xB)
            special.cr0 = 0x10
            special.idt = DescriptorTable(0, 0x3FF)
            special.gdt = DescriptorTable(GDT, 0xFFF)
            return
        rpl = self.cpl
        code, data = (CODE32_USER, DATA_USER) if rpl else (CODE32, DATA32)
        if self.bits == 64:
            code = CODE64_USER if rpl else CODE64
        wide = int(self.bits == 64)
        special.cs = Segment(0, 0xFFFFFFFF, code, 0xB, 1, rpl, 1 - wide, 1, wide, 1)
        flat = Segment(0, 0xFFFFFFFF, data, 3, 1, rpl, 1, 1, 0, 1)
        special.ds = special.es = special.fs = special.gs = special.ss = flat
        special.tr = Segment(TSS, 0x2067, TSS_SELECTOR, 0xB, s=0)
        special.ldt = Segment(LDT, 0x7F, LDT_SELECTOR, 2, s=0)
        special.gdt, special.idt = DescriptorTable(GDT, 0xFFF), DescriptorTable(IDT, 0xFFF)
        special.cr0 = 0x33
        special.cr4 = 0x600
        if self.bits == 64:
            special.cr0, special.cr3, special.cr4, special.efer = 0x80010033, PML4, 0x620, 0xD01

    def _tables(self) -> None:
        entries = {
            CODE32: descriptor(CODE_TYPE),
            DATA32: descriptor(DATA_TYPE),
            CODE64: descriptor(CODE_TYPE, flags=0xA),
            CODE16: descriptor(CODE_TYPE, limit=0xFFFF, flags=0),
            DATA16: descriptor(DATA_TYPE, limit=0xFFFF, flags=0),
            CODE32_USER: descriptor(CODE_TYPE, dpl=3),
            DATA_USER: descriptor(DATA_TYPE, dpl=3),
            CODE64_USER: descriptor(CODE_TYPE, dpl=3, flags=0xA),
            CONFORMING: descriptor(CONFORMING_TYPE),
            TSS_SELECTOR: descriptor(0xB, base=TSS, limit=0x2067, s=0, flags=0),
            LDT_SELECTOR: descriptor(2, base=LDT, limit=0x7F, s=0, flags=0),
            TSS2_SELECTOR: descriptor(9, base=TSS2, limit=0x67, s=0, flags=0),
        }
        for selector, data in entries.items():
            self.define(selector, data)
        if self.bits == 64:
            self.put(TSS, struct.pack("<IQ24xQ58xH", 0, STACK_TSS, STACK_IST, 0x68))
            for table, entry in ((PML4, PDPT | 7), (PDPT, PD | 7), (PD, 0x87)):
                self.put(table, entry.to_bytes(8, "little"))
        else:
            self.put(TSS, struct.pack("<IIH92xH", 0, STACK_TSS, DATA32, 0x68))

    def processor(self, cpuid: tuple[CpuidEntry, ...] | None = None) -> Processor:
        """The model in this state."""
        cpu = Processor(Memory(), supported_cpuid() if cpuid is None else cpuid)
        cpu.bus.bytes[:] = self.memory  # type: ignore[attr-defined]
        cpu.set_special_registers(replace(self.special))
        cpu.set_registers(replace(self.registers))
        return cpu

    def run(self, limit: int = 1000, *, cpuid: tuple[CpuidEntry, ...] | None = None) -> Ended:
        """Run on the model to the first exit, which must be HLT."""
        cpu = self.processor(cpuid)
        assert cpu.run(limit) == Halted(), f"stopped at {cpu.rip:#x}"
        return Ended(cpu)


class Ended:
    """The model after HLT."""

    def __init__(self, cpu: Processor) -> None:
        self.cpu = cpu
        self.memory: bytearray = cpu.bus.bytes  # type: ignore[attr-defined]

    @property
    def vector(self) -> int | None:
        """The vector whose handler halted; None where something else did."""
        number, rest = divmod(self.cpu.rip - 1 - HANDLERS, 16)
        return number if not rest and 0 <= number < 256 else None

    def at(self, address: int, size: int) -> int:
        return int.from_bytes(self.memory[address : address + size], "little")

    def stack(self, count: int, size: int) -> list[int]:
        """The topmost values on the stack."""
        at = self.cpu.segments[2].base + self.cpu.regs[4]
        return [self.at(at + number * size, size) for number in range(count)]


def amd_cpuid() -> tuple[CpuidEntry, ...]:
    """The reference processor's leaves with AMD's name (leaf 0: EBX, EDX, ECX)."""
    first, *others = supported_cpuid()
    return (replace(first, ebx=0x68747541, edx=0x69746E65, ecx=0x444D4163), *others)


def same_segment(a: Segment, b: Segment) -> bool:
    """Equal, but for what an unusable segment hides; KVM shows a usable SS behind a null selector.

    On AMD KVM computes G from the limit (svm_get_segment), so it shows 0 for a limit that needs no pages.
    """
    if a.unusable and (b.unusable or not b.selector & ~3):
        return a.selector == b.selector
    if a.limit == b.limit <= 0xFFFFF:
        a = replace(a, g=b.g)
    return all(getattr(a, each.name) == getattr(b, each.name) for each in fields(Segment))
