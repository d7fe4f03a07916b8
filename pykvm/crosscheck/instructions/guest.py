"""The guest around a case: page tables, descriptor tables, handlers, and bytes that end the run.

In long mode (64- and 32-bit code) the case's pages stand at the linear addresses of the host's traced child,
and what belongs to the guest at SYSTEM, for the supervisor only.  The descriptors have the selectors of
Linux, so that an instruction which loads one finds the same on the host.  Every exception has a handler
``out PORT, al`` on a stack of its own (IST), so the frame says everything.
"""

from __future__ import annotations

import struct
from typing import Final

from pykvm.crosscheck.instructions.case import FLAT, REAL, InstructionCase
from pykvm.x86.bits import Cr0, Cr4, Efer
from pykvm.x86.registers import DescriptorTable, Segment, SpecialRegisters

PAGE: Final = 4096
STOP: Final = 0xEE
"""``out dx, al``: what the code page is full of but for the case, so any branch into it ends the run."""
PORT: Final = 0x10
"""Handlers and the epilogue write here."""

SYSTEM: Final = 0x1010_0000
"""Linear address of guest-physical 0."""
PML4, PDPT, PD, PT, GDT, IDT, TSS, HANDLERS, STACK, STUBS, FXAREA = (
    0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000, 0xA000, 0xB000, 0xC000, 0xD000,
)  # fmt: skip
"""Guest-physical addresses."""
CODE: Final = 0x10000
DATA: Final = 0x20000
"""Guest-physical addresses of the case's pages in long mode."""
MEMORY: Final = 0x50000

FRAME_TOP: Final = STACK + PAGE
_HANDLER_BYTES: Final = 16
_VECTORS: Final = 256
_TSS_BYTES: Final = 0x68 + 8192 + 1

_P, _W, _U, _A, _D, _NX = 1, 2, 4, 0x20, 0x40, 1 << 63

KERNEL32, KERNEL64, KERNEL_DATA, USER32, USER_DATA, USER64, TSS_SELECTOR = (
    0x08, 0x10, 0x18, 0x23, 0x2B, 0x33, 0x40,
)  # fmt: skip
_DESCRIPTORS: Final = {
    KERNEL32: 0x00CF9B000000FFFF,
    KERNEL64: 0x00AF9B000000FFFF,
    KERNEL_DATA: 0x00CF93000000FFFF,
    USER32: 0x00CFFB000000FFFF,
    USER_DATA: 0x00CFF3000000FFFF,
    USER64: 0x00AFFB000000FFFF,
}
"""Flat 4 GiB segments (SDM vol. 3, figures 3-8 and 5-1), accessed bit set."""

PROLOGUE: Final = SYSTEM + STUBS
EPILOGUE: Final = SYSTEM + STUBS + 0x100
"""fxsave [FXAREA]; out PORT, al: in the case's mode."""
HANDLER_EPILOGUE: Final = SYSTEM + STUBS + 0x180
"""The same in 64-bit code, which handlers are in."""
_REAL_STUBS: Final = 0x800
REAL_PROLOGUE: Final = 0x1900
REAL_EPILOGUE: Final = 0x1A00
REAL_FXAREA: Final = 0x2000
"""With CS 0."""


def build_flat(memory: memoryview, mode: int) -> None:
    """Tables, handlers and stubs of a long-mode guest for 64- or 32-bit code."""
    for table, entry in ((PML4, PDPT), (PDPT, PD)):
        _entries(memory, table, {0: entry | _P | _W | _U | _A})
    _entries(memory, PD, {FLAT.code >> 21 & 511: PT | _P | _W | _U | _A})
    leaves = {FLAT.code >> 12 & 511: CODE | _P | _U | _A}
    for address in range(FLAT.data, FLAT.end, PAGE):
        writable = _W | _D if address < FLAT.read_only else 0
        leaves[address >> 12 & 511] = DATA + address - FLAT.data | _P | _U | _A | _NX | writable
    for page in range(PML4, FXAREA + PAGE, PAGE):
        user = _U if page in {STUBS, FXAREA} else 0
        leaves[SYSTEM + page >> 12 & 511] = page | _P | _W | _A | _D | user
    _entries(memory, PT, leaves)
    for selector, descriptor in _DESCRIPTORS.items():
        struct.pack_into("<Q", memory, GDT + (selector & ~7), descriptor)
    struct.pack_into("<Q", memory, TSS + 0x24, SYSTEM + FRAME_TOP)  # IST1
    struct.pack_into("<H", memory, TSS + 0x66, 0x68)
    memory[TSS + 0x68 + 8192] = 0xFF
    for vector in range(_VECTORS):
        handler = SYSTEM + HANDLERS + _HANDLER_BYTES * vector
        gate = 0x8E | (0x60 if vector in {3, 4} else 0)
        struct.pack_into(
            "<HHBBHII", memory, IDT + 16 * vector,
            handler & 0xFFFF, KERNEL64, 1, gate, handler >> 16 & 0xFFFF, handler >> 32, 0,
        )  # fmt: skip
        memory[handler - SYSTEM : handler - SYSTEM + 2] = bytes([0xE6, PORT])
    _stub(memory, STUBS + 0x100, _fx(mode) + bytes([0xE6, PORT]))
    _stub(memory, STUBS + 0x180, _fx(64) + bytes([0xE6, PORT]))


def prologue(case: InstructionCase) -> bytes:
    """fxrstor [FXAREA]; jmp to the instruction."""
    load = _fx(case.mode, restore=True)
    if case.mode == 16:
        return load + b"\xea" + struct.pack("<HH", case.registers.rip, REAL.code >> 4)
    return load + b"\xe9" + struct.pack("<i", case.registers.rip - PROLOGUE - len(load) - 5)


def _fx(mode: int, *, restore: bool = False) -> bytes:
    """FXSAVE (0F AE /0) or FXRSTOR (/1) of the state area, in 64-bit mode with REX.W."""
    register = 8 if restore else 0
    if mode == 64:
        return bytes([0x48, 0x0F, 0xAE, 0x04 | register, 0x25]) + struct.pack("<I", SYSTEM + FXAREA)
    if mode == 32:
        return bytes([0x0F, 0xAE, 0x05 | register]) + struct.pack("<I", SYSTEM + FXAREA)
    return bytes([0x2E, 0x0F, 0xAE, 0x06 | register]) + struct.pack("<H", REAL_FXAREA)


def handler_vector(case: InstructionCase, rip: int, base: int) -> int | None:
    """The vector whose handler wrote to PORT, from RIP behind it and the base of CS; None for others."""
    start = _REAL_STUBS if case.mode == 16 else SYSTEM + HANDLERS
    vector, offset = divmod(rip + base - start, _HANDLER_BYTES)
    return vector if 0 <= vector < _VECTORS and offset == 2 else None


def build_real(memory: memoryview) -> None:
    """The interrupt vector table and stubs of a real-mode guest."""
    for vector in range(_VECTORS):
        struct.pack_into("<HH", memory, 4 * vector, 0, (_REAL_STUBS >> 4) + vector)
        _stub(memory, _REAL_STUBS + _HANDLER_BYTES * vector, bytes([0xE6, PORT]))
    _stub(memory, REAL_EPILOGUE, _fx(16) + bytes([0xE6, PORT]))


def special_registers(case: InstructionCase, start: SpecialRegisters) -> SpecialRegisters:
    """The case's mode, from the registers of a fresh vCPU."""
    return _real(start) if case.mode == 16 else _flat(case, start)


def _flat(case: InstructionCase, start: SpecialRegisters) -> SpecialRegisters:
    user = case.cpl == 3
    if case.mode == 64:
        code = Segment(0, 0xFFFFFFFF, USER64 if user else KERNEL64, 0xB, 1, case.cpl, 0, 1, 1, 1)
        data = Segment(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    else:
        code = Segment(0, 0xFFFFFFFF, USER32 if user else KERNEL32, 0xB, 1, case.cpl, 1, 1, 0, 1)
        data = Segment(0, 0xFFFFFFFF, USER_DATA, 3, 1, 3, 1, 1, 0, 1)
    stack = Segment(0, 0xFFFFFFFF, USER_DATA if user else KERNEL_DATA, 3, 1, case.cpl, 1, 1, 0, 1)
    fs, gs = data, data
    if case.mode == 64:
        fs = Segment(case.fs_base, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
        gs = Segment(case.gs_base, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    return SpecialRegisters(
        cs=code, ds=data, es=data, fs=fs, gs=gs, ss=stack,
        tr=Segment(SYSTEM + TSS, _TSS_BYTES - 1, TSS_SELECTOR, 0xB, 1, 0, 0, 0, 0, 0),
        ldt=Segment(0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1),
        gdt=DescriptorTable(SYSTEM + GDT, 0x7F),
        idt=DescriptorTable(SYSTEM + IDT, 0xFFF),
        cr0=Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.PG,
        cr3=PML4,
        cr4=Cr4.PAE | Cr4.OSFXSR | Cr4.OSXMMEXCPT,
        efer=Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE,
        apic_base=start.apic_base,
    )  # fmt: skip


def _real(start: SpecialRegisters) -> SpecialRegisters:
    def segment(base: int, type_: int) -> Segment:
        return Segment(base, 0xFFFF, base >> 4, type_, 1, 0, 0, 1, 0, 0)

    data = segment(REAL.data, 3)
    return SpecialRegisters(
        cs=segment(REAL.code, 0xB),
        ds=data, es=data, fs=data, gs=data,
        ss=segment(REAL.stack, 3),
        tr=start.tr, ldt=start.ldt,
        gdt=DescriptorTable(0, 0xFFFF),
        idt=DescriptorTable(0, 0x3FF),
        cr0=Cr0.ET,
        cr4=Cr4.OSFXSR | Cr4.OSXMMEXCPT,
        apic_base=start.apic_base,
    )  # fmt: skip


def _entries(memory: memoryview, table: int, entries: dict[int, int]) -> None:
    for index, value in entries.items():
        struct.pack_into("<Q", memory, table + 8 * index, value)


def _stub(memory: memoryview, address: int, code: bytes) -> None:
    memory[address : address + len(code)] = code
