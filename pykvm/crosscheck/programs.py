"""Short random guest programs: loads, stores of all sizes, read-modify-write, strings, page-table writes.

A program is a list of units, each a few instructions that set up their own addresses, so that any unit can
be left out.  The encodings are those of SDM vol. 2 for 16-, 32- and 64-bit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol, TypeVar

from pykvm.memory import PAGE_SIZE

T = TypeVar("T")
MARK_PORT: Final = 0x10
END_PORT: Final = 0x1F
IN_PORT: Final = 0x11

_RAX, _RCX, _RSI, _RDI = 0, 1, 6, 7
_OPERAND_SIZE, _LOCK, _REP = b"\x66", b"\xf0", b"\xf3"
_REX_W = b"\x48"


class Source(Protocol):
    """Where choices come from: a seeded generator, hypothesis, or a recorded list."""

    def integer(self, least: int, most: int) -> int:
        """An integer in [least, most]; the smaller the simpler."""


def choose(source: Source, items: Sequence[T]) -> T:
    """One of ``items``, the simplest first."""
    return items[source.integer(0, len(items) - 1)]


def chance(source: Source, percent: int) -> bool:
    """True that often; False is the simpler choice."""
    return source.integer(0, 99) >= 100 - percent


class Operation(NamedTuple):
    """An instruction with one memory operand at [DI], whose flags and result are defined.

    Opcodes for bytes and for the larger sizes, empty where there is none.  ``digit``: what ModRM.reg must be,
    None for any register; ``immediate``: its bytes, -1 for the operand's own (four at most).  ``writes``:
    whether it stores; ``updates``: whether it does so after loading.
    """

    name: str
    byte: bytes
    wide: bytes
    digit: int | None = None
    immediate: int = 0
    writes: bool = True
    updates: bool = True
    locks: bool = False


OPERATIONS: Final = (
    Operation("mov store", b"\x88", b"\x89", updates=False),
    Operation("mov load", b"\x8a", b"\x8b", writes=False, updates=False),
    Operation("mov immediate", b"\xc6", b"\xc7", 0, -1, updates=False),
    Operation("add", b"\x00", b"\x01", locks=True),
    Operation("adc", b"\x10", b"\x11", locks=True),
    Operation("sub", b"\x28", b"\x29", locks=True),
    Operation("or", b"\x08", b"\x09", locks=True),
    Operation("and", b"\x20", b"\x21", locks=True),
    Operation("xor", b"\x30", b"\x31", locks=True),
    Operation("cmp", b"\x38", b"\x39", writes=False, updates=False),
    Operation("test", b"\x84", b"\x85", writes=False, updates=False),
    Operation("xchg", b"\x86", b"\x87", locks=True),
    Operation("inc", b"\xfe", b"\xff", 0, locks=True),
    Operation("dec", b"\xfe", b"\xff", 1, locks=True),
    Operation("not", b"\xf6", b"\xf7", 2, locks=True),
    Operation("neg", b"\xf6", b"\xf7", 3, locks=True),
    Operation("xadd", b"\x0f\xc0", b"\x0f\xc1", locks=True),
    Operation("cmpxchg", b"\x0f\xb0", b"\x0f\xb1", locks=True),
    Operation("add immediate", b"\x80", b"\x81", 0, -1, locks=True),
    Operation("add load", b"\x02", b"\x03", writes=False, updates=False),
    Operation("rotate by one", b"\xd0", b"\xd1", 0),
    Operation("shift left by one", b"\xd0", b"\xd1", 4),
    Operation("shift right by one", b"\xd0", b"\xd1", 5),
    Operation("bts immediate", b"", b"\x0f\xba", 5, 1, locks=True),
    Operation("btc immediate", b"", b"\x0f\xba", 7, 1, locks=True),
    Operation("push", b"", b"\xff", 6, writes=False, updates=False),
    Operation("movzx load", b"", b"\x0f\xb6", writes=False, updates=False),
    Operation("cmovc load", b"", b"\x0f\x42", writes=False, updates=False),
    Operation("setc", b"\x0f\x92", b"", 0, updates=False),
)
_STRINGS: Final = ((b"\xaa", b"\xab"), (b"\xa4", b"\xa5"), (b"\xac", b"\xad"))
"""stos, movs, lods."""


class Assembler:
    """Encodes the instructions of a unit for code of ``bits`` bits (16, 32, 64)."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.code = bytearray()

    def load(self, register: int, value: int) -> None:
        """mov register, value: as wide as it needs to be."""
        if self.bits == 16:
            self.code += bytes([0xB8 + register]) + (value & 0xFFFF).to_bytes(2, "little")
        elif self.bits == 32 or value < 1 << 32:
            self.code += bytes([0xB8 + register]) + (value & 0xFFFFFFFF).to_bytes(4, "little")
        else:
            self.code += _REX_W + bytes([0xB8 + register]) + value.to_bytes(8, "little")

    def memory(self, operation: Operation, size: int, register: int, immediate: int, *, lock: bool) -> None:
        """The operation on ``size`` bytes at [DI], with ``register`` (0 to 3) where it takes one."""
        digit = register if operation.digit is None else operation.digit
        prefix, opcode = self._sized(operation.byte, operation.wide, size)
        at_di = 5 if self.bits == 16 else 7
        self.code += (_LOCK if lock else b"") + prefix + opcode + bytes([digit << 3 | at_di])
        if operation.immediate:
            length = 1 if operation.immediate == 1 else min(size, 4)
            self.code += (immediate & (1 << 8 * length) - 1).to_bytes(length, "little")

    def string(self, byte: bytes, wide: bytes, size: int) -> None:
        """A string instruction with REP."""
        prefix, opcode = self._sized(byte, wide, size)
        self.code += _REP + prefix + opcode

    def out(self, port: int) -> None:
        self.code += bytes([0xE6, port])

    def _sized(self, byte: bytes, wide: bytes, size: int) -> tuple[bytes, bytes]:
        if size == 1:
            return b"", byte
        if size == 8:
            return _REX_W, wide
        other = (size == 4) == (self.bits == 16)
        return (_OPERAND_SIZE if other else b""), wide


class Terrain(NamedTuple):
    """Where programs may work: pages from linear address ``base`` on, reached by DI = ``base - segment``.

    ``kinds`` says for each page what an access does: ``rw`` works for good, anything else may fault.
    ``entries``: the pages whose page-table entries a program may rewrite, each with the linear address of
    the entry and what it holds at first.  ``careful``: no store may cross into a page where it faults
    (hosts.md E: KVM's emulator has then written the first part).
    """

    bits: int
    cpl: int
    base: int
    segment: int
    kinds: tuple[str, ...]
    entries: tuple[tuple[int, int, int], ...] = ()
    careful: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1, 2, 4, 8) if self.bits == 64 else (1, 2, 4)


class Unit(NamedTuple):
    """A few instructions; ``crosses``: the page from which they write on into a page that faults."""

    code: bytes
    crosses: int | None = None


def random_unit(source: Source, terrain: Terrain) -> Unit:
    """One unit."""
    kinds = [_memory_unit, _memory_unit, _memory_unit, _stack_unit, _string_unit, _branch_unit, _in_unit]
    if terrain.entries:
        kinds.append(_entry_unit)
    return choose(source, kinds)(source, terrain)


def random_program(source: Source, terrain: Terrain, most: int) -> tuple[bytes, int, tuple[Unit, ...]]:
    """Code of at most ``most`` bytes, the number of exits it makes by marks, and the units it consists of.

    It ends with an OUT to END_PORT for ever.
    """
    end = bytes([0xE6, END_PORT, 0xEB, 0xFC])
    code, marks, units = _prologue(terrain), 0, []
    for _ in range(source.integer(1, 24)):
        unit = random_unit(source, terrain)
        mark = bytes([0xE6, MARK_PORT]) if chance(source, 60) else b""
        if len(code) + len(unit.code) + len(mark) + len(end) > most:
            break
        code += unit.code + mark
        marks += bool(mark)
        units.append(unit)
    return code + end, marks, tuple(units)


def _prologue(terrain: Terrain) -> bytes:
    """mov ax, segment; mov ds, ax; mov es, ax in 16-bit code."""
    if terrain.bits != 16:
        return b""
    return b"\xb8" + (terrain.segment >> 4).to_bytes(2, "little") + b"\x8e\xd8\x8e\xc0"


def _address(source: Source, terrain: Terrain, size: int, operation: Operation) -> tuple[int, int | None]:
    """A linear address in the terrain and, for a store that faults behind a page's end, that page.

    Left out is what KVM's emulator does in an order of its own (docs/kvm-findings.md): where ``careful``,
    stores into a page that faults, or read-modify-writes of one; everywhere, read-modify-writes across.
    """
    count = len(terrain.kinds)
    only_good = terrain.careful and operation.updates
    page = choose(source, [n for n in range(count) if not only_good or terrain.kinds[n] == "rw"])
    where = choose(source, ("start", "inside", "end", "crossing"))
    offset = {
        "start": 0,
        "inside": source.integer(0, PAGE_SIZE // 8 - 1) * 8,
        "end": PAGE_SIZE - size,
        "crossing": PAGE_SIZE - size + source.integer(1, size - 1) if size > 1 else PAGE_SIZE - size,
    }[where]
    crosses = None
    if offset + size > PAGE_SIZE:
        faults = page + 1 == count or terrain.kinds[page + 1] != "rw"
        in_emulator = operation.updates or (operation.writes and terrain.careful)
        if page + 1 == count or (faults and in_emulator):
            offset = PAGE_SIZE - size
        elif faults and operation.writes:
            crosses = page
    return terrain.base + page * PAGE_SIZE + offset, crosses


def _memory_unit(source: Source, terrain: Terrain) -> Unit:
    operation = choose(source, OPERATIONS)
    size = choose(source, [n for n in terrain.sizes if (operation.byte if n == 1 else operation.wide)])
    address, crosses = _address(source, terrain, size, operation)
    assembler = Assembler(terrain.bits)
    assembler.load(_RDI, address - terrain.segment)
    register = source.integer(0, 3)
    lock = operation.locks and chance(source, 30)
    assembler.memory(operation, size, register, source.integer(0, 0xFFFFFFFF), lock=lock)
    return Unit(bytes(assembler.code), crosses)


def _stack_unit(source: Source, terrain: Terrain) -> Unit:
    return Unit(bytes([0x50 + source.integer(0, 3), 0x58 + source.integer(0, 3)]))


def _string_unit(source: Source, terrain: Terrain) -> Unit:
    """mov di, …; mov si, …; mov cx, count; [std]; rep …; [cld]: within pages that do not fault."""
    good = [page for page, kind in enumerate(terrain.kinds) if kind == "rw"]
    if not good:
        return _stack_unit(source, terrain)
    byte, wide = choose(source, _STRINGS)
    size, count = choose(source, terrain.sizes), source.integer(0, 32)
    backwards = chance(source, 30)
    assembler = Assembler(terrain.bits)
    for register in (_RDI, _RSI):
        page = choose(source, good)
        last = page + 1 < len(terrain.kinds) and terrain.kinds[page + 1] == "rw"
        span = count * size
        offset = source.integer(0, PAGE_SIZE - 1 if last else PAGE_SIZE - max(span, 1))
        address = terrain.base + page * PAGE_SIZE + offset
        assembler.load(register, address + (span - size if backwards and span else 0) - terrain.segment)
    assembler.load(_RCX, count)
    if backwards:
        assembler.code += b"\xfd"
    assembler.string(byte, wide, size)
    if backwards:
        assembler.code += b"\xfc"
    return Unit(bytes(assembler.code))


def _branch_unit(source: Source, terrain: Terrain) -> Unit:
    """jcc over a unit."""
    inner = _memory_unit(source, terrain)
    return Unit(bytes([0x70 + source.integer(0, 15), len(inner.code)]) + inner.code, inner.crosses)


def _in_unit(source: Source, terrain: Terrain) -> Unit:
    return Unit(bytes([0xE4 + source.integer(0, 1), IN_PORT]))


def _entry_unit(source: Source, terrain: Terrain) -> Unit:
    """Rewrite a page-table entry: at CPL 0 anyhow, with INVLPG; at CPL 3 from not present to present."""
    page, entry, value = choose(source, terrain.entries)
    if terrain.cpl:
        if value & 1:
            return _memory_unit(source, terrain)
        value |= 1
    else:
        value ^= choose(source, (0, 0x20, 0x60 & value, 2, 1))
    assembler = Assembler(terrain.bits)
    assembler.load(_RDI, entry)
    assembler.load(_RAX, value)
    assembler.memory(OPERATIONS[0], 8 if terrain.bits == 64 else 4, _RAX, 0, lock=False)
    if not terrain.cpl:
        assembler.load(_RDI, terrain.base + page * PAGE_SIZE)
        assembler.code += b"\x0f\x01\x3f"  # invlpg [rdi]
    return Unit(bytes(assembler.code))
