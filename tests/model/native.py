"""MMX, SSE and x87 instructions on the model and on the host's processor, from the same random state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pykvm.machine.exits import MmioWrite
from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.fpu_state import get_fpu, set_fpu
from pykvm.observe.arena import CODE, DATA
from pykvm.observe.host_cpu import FLAGS, HostCase, HostCpu, HostOutcome
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.exceptions import Vector
from pykvm.x86.fpu import FloatingPoint
from pykvm.x86.registers import GENERAL, Registers
from tests.model.chip import TOP_TABLE, Chip

PAGE = 4096
AREA = DATA + 0x800
_DATA_PAGES = 4
_IDENTITY = TOP_TABLE, TOP_TABLE + PAGE
_SINGLES = (
    0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F800001, 0x4B000001, 0x4F000000, 0x5F000000, 0x7F7FFFFF,
    0x7F800000, 0x7F800001, 0x7FA00000, 0x7FC00000, 0x33800000, 0x20000000,
)  # fmt: skip
_DOUBLES = (
    0, 1, 0xFFFFFFFFFFFFF, 1 << 52, 0x3FF << 52, 0x3FF0000000000001, 0x41E << 52, 0x43E << 52,
    0x7FEFFFFFFFFFFFFF, 0x7FF << 52, (0x7FF << 52) + 1, 0x7FF8 << 48, 0x380 << 52, 0x36A << 52, 0x47F << 52,
)  # fmt: skip
_EXPONENTS = (
    0, 1, 0x3BCD, 0x3C00, 0x3C01, 0x3F6A, 0x3F80, 0x3F81, 0x3FFE, 0x3FFF, 0x400D, 0x400E, 0x401D, 0x401E,
    0x403D, 0x403E, 0x407E, 0x407F, 0x43FE, 0x43FF, 0x7FFE, 0x7FFF,
)  # fmt: skip


class Frames:
    """The bus: the arena's pages and two page tables, nothing else."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def ram(self, gfn: int) -> memoryview | None:
        return memoryview(self.pages[gfn]) if gfn in self.pages else None

    def writable(self, gfn: int) -> memoryview | None:
        return self.ram(gfn)

    def write(self, gpa: int, data: bytes) -> list[MmioWrite]:
        at = gpa % PAGE
        self.pages[gpa // PAGE][at : at + len(data)] = data
        return []

    def set_entry(self, gpa: int, size: int, value: int) -> None:
        self.write(gpa, value.to_bytes(size, "little"))

    def watch(self, gfn: int) -> None:
        pass


def host_cpuid() -> tuple[CpuidEntry, ...]:
    """The model's, with the host's vendor, and AMD's SSE4A and misaligned mode where the host has them."""
    text = Path("/proc/cpuinfo").read_text()
    entries = []
    for entry in supported_cpuid():
        if entry.function == 0 and "AuthenticAMD" in text:
            entry = replace(entry, ebx=0x68747541, edx=0x69746E65, ecx=0x444D4163)
        if entry.function == 0x80000001:
            amd = ("sse4a" in text) << 6 | ("misalignsse" in text) << 7
            entry = replace(entry, ecx=entry.ecx | amd)
        entries.append(entry)
    return tuple(entries)


@dataclass
class Outcome:
    """What both sides are compared by."""

    vector: int | None
    registers: Registers
    floating: FloatingPoint
    memory: Mapping[int, bytes]


class Twin:
    """One model and one host processor."""

    def __init__(self) -> None:
        self.host = HostCpu(64)
        self.chip = Chip(64, 3, host_cpuid())
        self.frames = Frames()
        for address in _IDENTITY:
            self.frames.pages[address // PAGE] = bytearray(self.chip.bus.bytes[address : address + PAGE])
        self.chip.bus = self.frames  # type: ignore[assignment]

    def close(self) -> None:
        self.host.close()

    def difference(self, case: HostCase) -> str:
        """In what the two disagree, or ""."""
        host, model = self.on_host(case), self.on_model(case)
        if host.vector != model.vector:
            return f"vector {model.vector}, the host's {host.vector}"
        for name in (*GENERAL, "rip"):
            mine, theirs = getattr(model.registers, name), getattr(host.registers, name)
            if mine != theirs:
                return f"{name} {mine:#x}, the host's {theirs:#x}"
        if (model.registers.rflags ^ host.registers.rflags) & FLAGS:
            return f"rflags {model.registers.rflags:#x}, the host's {host.registers.rflags:#x}"
        for name in ("fcw", "fsw", "ftwx", "mxcsr", "fpr", "xmm"):
            mine, theirs = getattr(model.floating, name), getattr(host.floating, name)
            if mine != theirs:
                return f"{name} {_text(mine)}, the host's {_text(theirs)}"
        if model.memory != host.memory:
            return f"memory {_differing(model.memory, host.memory)}"
        return ""

    def on_host(self, case: HostCase) -> Outcome:
        """An x87 exception that FXRSTOR brought in is told as #XM by its signal: #MF for x87 code."""
        found: HostOutcome = self.host.execute(case)
        assert found.floating is not None
        image = _image(case)
        for address, data in found.memory:
            image[address - DATA : address - DATA + len(data)] = data
        vector = found.vector
        if vector == Vector.XM and case.code[0] != 0x0F and 0xD8 <= case.code[-2] <= 0xDF:
            vector = Vector.MF
        floating = replace(found.floating, fpr=tuple(each[:10] for each in found.floating.fpr))
        return Outcome(vector, found.registers, floating, _lines(image))

    def on_model(self, case: HostCase) -> Outcome:
        chip, pages = self.chip, self.frames.pages
        image = _image(case)
        for number in range(_DATA_PAGES):
            pages[DATA // PAGE + number] = image[number * PAGE : (number + 1) * PAGE]
        code = pages[CODE // PAGE] = bytearray(PAGE)
        at = case.registers.rip - CODE
        code[at : at + len(case.code)] = case.code
        chip.flush_tlb()
        chip.set_registers(replace(case.registers, rflags=case.registers.rflags & FLAGS | 0x202))
        assert case.floating is not None
        set_fpu(chip, case.floating)
        vector = insn = None
        try:
            insn = chip.fetch()
            chip.execute(insn)
        except Fault as fault:
            if insn:
                chip.rollback()
            vector = fault.vector
        after = b"".join(bytes(pages[DATA // PAGE + number]) for number in range(_DATA_PAGES))
        floating = get_fpu(chip)
        floating = replace(floating, fpr=tuple(each[:10] for each in floating.fpr))
        return Outcome(vector, chip.get_registers(), floating, _lines(bytearray(after)))


def _image(case: HostCase) -> bytearray:
    image = bytearray(_DATA_PAGES * PAGE)
    for address, data in case.memory.items():
        image[address - DATA : address - DATA + len(data)] = data
    return image


def _lines(image: bytearray) -> dict[int, bytes]:
    lines = ((at, bytes(image[at : at + 16])) for at in range(0, len(image), 16))
    return {DATA + at: line for at, line in lines if any(line)}


def _differing(mine: Mapping[int, bytes], theirs: Mapping[int, bytes]) -> str:
    for address in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(address, bytes(16)), theirs.get(address, bytes(16))
        if one != other:
            return f"at {address:#x}: {one[::-1].hex()}, the host's {other[::-1].hex()}"
    return ""


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(each[::-1].hex() for each in value)
    return f"{value:#x}"


# --- random states ----------------------------------------------------------------------------------------


class Values:
    """Random operands with a weight on the edges of every format."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def bits128(self) -> int:
        draw = self.random
        makers: tuple[Callable[[], int], ...] = (
            lambda: draw.getrandbits(128),
            lambda: self._lanes(32, lambda: draw.choice(_SINGLES) | draw.getrandbits(1) << 31),
            lambda: self._lanes(64, lambda: draw.choice(_DOUBLES) | draw.getrandbits(1) << 63),
            lambda: self._lanes(8, lambda: draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.getrandbits(8)))),
            lambda: self._lanes(64, lambda: draw.randrange(130)),
        )
        return draw.choice(makers)()

    def _lanes(self, width: int, lane: Callable[[], int]) -> int:
        return sum(lane() << at for at in range(0, 128, width))

    def bits80(self) -> int:
        draw = self.random
        significand = draw.choice(
            (1 << 63, (1 << 64) - 1, 3 << 62, 1, 0, 1 << 63 | 1 << draw.randrange(63), draw.getrandbits(64),
             1 << 63 | draw.getrandbits(63) >> draw.randrange(63) << draw.randrange(63) & (1 << 63) - 1)
        )  # fmt: skip
        exponent = draw.choice(
            (draw.choice(_EXPONENTS), 0x3FFF + draw.randrange(-4, 70), draw.getrandbits(15))
        )
        return draw.getrandbits(1) << 79 | exponent << 64 | significand

    def registers(self, offset: int) -> Registers:
        """RDI points to AREA, ``offset`` bytes in."""
        draw = self.random
        values = {name: draw.choice((draw.getrandbits(64), draw.getrandbits(4))) for name in GENERAL}
        values |= {"rdi": AREA + offset, "rsp": DATA + 0x400}
        return Registers(**values, rip=CODE + 0x100, rflags=draw.getrandbits(12) & 0x8D5 | 2)

    def memory(self, line: Callable[[], int]) -> dict[int, bytes]:
        return {AREA - 16 + 16 * n: line().to_bytes(16, "little") for n in range(10)}


def vector_cases(
    code: bytes, seed: int, count: int, *, mmx: bool, offsets: tuple[int, ...]
) -> Iterator[HostCase]:
    """Random MMX and XMM registers and MXCSR; the x87 state is what MMX code leaves, or a fresh one."""
    values = Values(seed)
    draw = values.random
    for _ in range(count):
        floating = FloatingPoint(
            xmm=tuple(values.bits128().to_bytes(16, "little") for _ in range(16)),
            mxcsr=draw.choice((0x1F80, 0x1F80 | draw.getrandbits(2) << 13, draw.getrandbits(16))),
        )
        if mmx:
            floating.ftwx, floating.fsw = 0xFF, draw.choice((0, 0x1800))
            registers = (0xFFFF << 64 | values.bits128() & (1 << 64) - 1 for _ in range(8))
            floating.fpr = tuple(each.to_bytes(16, "little") for each in registers)
        yield HostCase(code, values.registers(draw.choice(offsets)), floating, values.memory(values.bits128))


def x87_cases(code: bytes, seed: int, count: int) -> Iterator[HostCase]:
    """Random registers, tags, flags, masks, precision and rounding."""
    values = Values(seed)
    draw = values.random
    for _ in range(count):
        floating = FloatingPoint(
            fpr=tuple(values.bits80().to_bytes(16, "little") for _ in range(8)),
            ftwx=draw.choice((0, 0xFF, draw.getrandbits(8))),
            fcw=draw.choice((0x37F, 0x37F, 0x7F, 0x27F, 0x77F, 0xB7F, 0xF7F, 0x340 | draw.getrandbits(6))),
            fsw=draw.getrandbits(16) & 0x7F00,
        )
        line = draw.choice((values.bits80, values.bits128))
        yield HostCase(code, values.registers(0), floating, values.memory(line))
