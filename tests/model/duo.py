"""The same program twice: on the plain interpreter and with the translator, in memory of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pykvm.machine.exits import Exit, Halted, InternalError, IoIn, MmioRead, MmioWrite, Shutdown
from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.cpu.instruction import CS
from pykvm.model.cpu.processor import Processor
from pykvm.x86.bits import Cr0, Cr4, Efer
from pykvm.x86.registers import DescriptorTable, Segment

PAGE = 0x1000
SIZE = 1 << 20
CODE = 0x8000
STACK = 0xC000
DATA = 0x10000
IDT = 0x2000
GDT = 0x3000
HANDLERS = 0x4000
"""The handler of vector v, a HLT, is at HANDLERS + 16 * v."""
READ_ONLY_PAGE, ABSENT_PAGE = 0x1E000, 0x1B000
"""To the page tables of long mode."""
# mov [rdi], rcx ; add rdi, 8 ; dec rcx ; jnz ; hlt
STORES = bytes.fromhex("48890f 4883c708 48ffc9 75f4 f4")
PML4, PDPT, PD, PT = 0x5000, 0x6000, 0x7000, 0x18000


class Ram:
    """A bus with a megabyte of RAM, a READONLY frame, and a hole above."""

    READONLY = 0x1F

    def __init__(self) -> None:
        self.bytes = bytearray(SIZE)
        self.dirty: set[int] = set()
        self.watched: set[int] = set()
        self.cpu: Processor | None = None
        self.views = 0
        """How often a page was handed out for writing."""

    def ram(self, gfn: int) -> memoryview | None:
        at = gfn * PAGE
        return memoryview(self.bytes)[at : at + PAGE] if at < SIZE else None

    def writable(self, gfn: int) -> memoryview | None:
        if gfn * PAGE >= SIZE or gfn in self.watched or gfn == self.READONLY:
            return None
        self.views += 1
        self.dirty.add(gfn)
        return self.ram(gfn)

    def write(self, gpa: int, data: bytes) -> list[MmioWrite]:
        gfn = gpa // PAGE
        if gpa >= SIZE or gfn == self.READONLY:
            return [MmioWrite(gpa + at, data[at : at + 8]) for at in range(0, len(data), 8)]
        self.dirty.add(gfn)
        self.bytes[gpa : gpa + len(data)] = data
        if gfn in self.watched and self.cpu is not None:
            self.cpu.watched_frame_changed(gfn)
        return []

    def set_entry(self, gpa: int, size: int, value: int) -> None:
        self.dirty.add(gpa // PAGE)
        self.bytes[gpa : gpa + size] = value.to_bytes(size, "little")

    def watch(self, gfn: int) -> None:
        if gfn not in self.watched:
            self.watched.add(gfn)
            assert self.cpu is not None
            self.cpu.flush_writable()

    def collect(self) -> set[int]:
        """Fetch and clear the dirty log."""
        found, self.dirty = self.dirty, set()
        assert self.cpu is not None
        self.cpu.flush_writable()
        return found


class Machine:
    """One of the two: long mode with paging, flat protected mode, or real mode, at CPL 0."""

    def __init__(self, bits: int, *, translate: bool) -> None:
        self.ram = Ram()
        self.cpu = Processor(self.ram, supported_cpuid(), translate=translate)
        self.ram.cpu = self.cpu
        {64: self._long_mode, 32: self._protected_mode, 16: self._real_mode}[bits]()
        self.cpu.rip = CODE
        self.cpu.regs[:] = [0] * 16
        self.cpu.regs[4] = STACK

    def put(self, address: int, data: bytes) -> None:
        """As the host does it."""
        self.ram.bytes[address : address + len(data)] = data

    def _put_entry(self, address: int, value: int) -> None:
        self.put(address, value.to_bytes(8, "little"))

    def _handlers(self) -> None:
        for vector in range(32):
            self.put(HANDLERS + 16 * vector, b"\xf4")

    def _long_mode(self) -> None:
        cpu = self.cpu
        self._put_entry(PML4, PDPT | 7)
        self._put_entry(PDPT, PD | 7)
        self._put_entry(PD, PT | 7)
        for page in range(512):
            # A and D as they come; no memory from SIZE on
            flags = 1 if page * PAGE == READ_ONLY_PAGE else 0 if page * PAGE == ABSENT_PAGE else 7
            self._put_entry(PT + 8 * page, page * PAGE | flags)
        cpu.cr3 = PML4
        cpu.efer = Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE
        cpu.cr0 = Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.PG
        cpu.cr4 = Cr4.PAE | Cr4.OSFXSR | Cr4.OSXMMEXCPT
        self._flat(wide=True)
        for vector in range(32):
            at = HANDLERS + 16 * vector
            self.put(IDT + 16 * vector, at.to_bytes(2, "little") + bytes.fromhex("0800008e") + bytes(10))
        self._handlers()

    def _protected_mode(self) -> None:
        self.cpu.cr0 = Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE
        self._flat(wide=False)
        for vector in range(32):
            at = HANDLERS + 16 * vector
            self.put(IDT + 8 * vector, at.to_bytes(2, "little") + bytes.fromhex("0800008e0000"))
        self._handlers()

    def _flat(self, *, wide: bool) -> None:
        cpu = self.cpu
        data = Segment(limit=0xFFFFFFFF, selector=16, type=3, db=1, g=1)
        cpu.segments = [data] * 6
        cpu.segments[CS] = replace(data, selector=8, type=0xB, l=int(wide), db=int(not wide))
        cpu.update_mode()
        self._put_entry(GDT + 8, 0x00AF9B000000FFFF if wide else 0x00CF9B000000FFFF)
        self._put_entry(GDT + 16, 0x00CF93000000FFFF)
        cpu.gdt, cpu.idt = DescriptorTable(GDT, 0xFF), DescriptorTable(IDT, 0xFFF)

    def _real_mode(self) -> None:
        cpu = self.cpu
        cpu.segments = [Segment(base=0, limit=0xFFFF, selector=0, type=3) for _ in range(6)]
        cpu.segments[CS] = Segment(type=0xB)
        for number in (0, 3):  # ES and DS
            cpu.set_segment(number, Segment(base=DATA, limit=0xFFFF, selector=DATA >> 4, type=3))
        cpu.update_mode()
        for vector in range(32):
            self.put(4 * vector, (HANDLERS + 16 * vector).to_bytes(4, "little"))
        self._handlers()

    def run(self, limit: int) -> list[Exit]:
        """Go on for ``limit`` instructions, answering questions with a pattern: the exits on the way."""
        exits: list[Exit] = []
        end = self.cpu.instructions + limit
        for _ in range(4 * limit):
            left = end - self.cpu.instructions
            if left <= 0:
                break
            exit = self.cpu.run(left)
            if exit is not None:
                exits.append(exit)
                if isinstance(exit, IoIn | MmioRead):
                    self.cpu.replies.append(bytes(range(0xA1, 0xA1 + exit.size)))
                elif isinstance(exit, Halted | Shutdown | InternalError):
                    break
        return exits

    def seen(self) -> dict[str, object]:
        """All that must be equal."""
        cpu = self.cpu
        return {
            "registers": [hex(value) for value in cpu.regs],
            "rip": hex(cpu.rip),
            "rflags": hex(cpu.rflags),
            "segments": list(cpu.segments),
            "cr2": hex(cpu.cr2),
            "shadow": cpu.shadow,
            "instructions": cpu.instructions,
            "dirty": sorted(self.ram.dirty),
        }


class Duo:
    """Both machines, in step."""

    def __init__(
        self, bits: int, code: bytes, registers: dict[int, int] | None = None, *, hot: int = 16
    ) -> None:
        self.plain = Machine(bits, translate=False)
        self.fast = Machine(bits, translate=True)
        translator = self.fast.cpu._translator
        assert translator is not None
        translator.hot = hot
        for machine in self:
            machine.put(CODE, code)
            for number, value in (registers or {}).items():
                machine.cpu.regs[number] = value

    def __iter__(self) -> Iterable[Machine]:  # type: ignore[override]
        return iter((self.plain, self.fast))

    def run(self, *limits: int) -> list[Exit]:
        """Run both by these numbers of instructions, comparing after each: the exits."""
        exits: list[Exit] = []
        for limit in limits:
            one, other = self.plain.run(limit), self.fast.run(limit)
            assert other == one
            assert self.fast.seen() == self.plain.seen()
            exits += one
        assert self.fast.ram.bytes == self.plain.ram.bytes
        return exits

    @property
    def translated(self) -> int:
        """How many instructions the translator executed."""
        return self.fast.cpu.translated
