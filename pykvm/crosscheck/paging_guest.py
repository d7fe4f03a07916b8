"""A guest that makes one access after another through page tables of the host's making.

Every case gets table pages of its own and each page is used once per machine, since a KVM with shadow page
tables does not see what the host writes to a table that it has cached (docs/reference/hosts.md B.1).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from pykvm.crosscheck.paging_cases import Features, Kind, PagingCase
from pykvm.errors import ClosedError, GuestTimeoutError
from pykvm.guest.boot import Arena, BootMode, SystemTables, boot_state
from pykvm.guest.pagetables import SUPERVISOR, USER, PageTables, PagingMode
from pykvm.machine import Exit, IoOut, Machine, Registers, Segment, SpecialRegisters, System, Vcpu
from pykvm.memory import GuestMemory
from pykvm.x86.bits import PAGE_SIZE
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.exceptions import Vector

CASES_PER_MACHINE: Final = 512
STUCK_SECONDS: Final = 2.0
"""An access that takes longer (and at most twice that) is given up."""

_DONE: Final = 0x10
_HANDLER: Final = 0x40
"""Handlers write to this port plus the vector."""
_VECTORS: Final = 32
_OLD_CR2: Final = 0x5A5A000
_STORED: Final = 0x11223344

# Guest-physical pages; what is not a target or a table is mapped one to one.
_HANDLERS: Final = 0x1000
_SUPERVISOR_CODE: Final = 0x2000
_USER_CODE: Final = 0x3000
_ARENA: Final = (0x4000, 0x20000)
FRAMES: Final = {12: 0x203000, 21: 0x200000, 22: 0, 30: 0x4000_0000}
"""The frame that a leaf of each page shift points to.  The target's bytes are the same for all."""
_TARGET_PAGE: Final = 0x203000
TABLES: Final = 0x400000
"""Where the tables of a machine's first case are."""
_STEP: Final = 5 * PAGE_SIZE
"""Tables per case."""

_SNIPPET_BYTES: Final = 16
_WRPKRU: Final = b"\x0f\x01\xef"
_OUT: Final = bytes([0xE6, _DONE, 0xEB, 0xFE])
"""out 0x10, al; jmp $"""
_TRAP: Final = b"\xcc"
_READ_CR2: Final = b"\x0f\x20\xd0"
"""mov rax, cr2"""
_ACCESS: Final = {
    Kind.READ: b"\x8b\x1f",  # mov ebx, [rdi]
    Kind.WRITE: b"\x89\x1f",  # mov [rdi], ebx
    Kind.EXCHANGE: b"\x87\x1f",  # xchg [rdi], ebx
    Kind.FETCH: b"\xff\xe7",  # jmp rdi
    Kind.LOAD_SEGMENT: b"\x8e\xc3",  # mov es, ebx
    Kind.MARK_SEGMENT: b"\x8e\xc3",
}
"""In 32-bit code with the 32-bit registers of those names."""
_LDT_SELECTOR: Final = 0x7
"""Entry 0 of the LDT, RPL 3."""
_DESCRIPTOR: Final = b"\xff\xff\0\0\0\xf2\xcf\0"
"""A flat writable data segment of DPL 3 that was not accessed yet (SDM vol. 3, 3.4.5)."""
_ACCESSED: Final = 1 << 40
_TARGETS: Final = {
    Kind.LOAD_SEGMENT: int.from_bytes(_DESCRIPTOR, "little") | _ACCESSED,
    Kind.MARK_SEGMENT: int.from_bytes(_DESCRIPTOR, "little"),
}
_CODE_TARGET: Final = int.from_bytes(_OUT + b"\x01\x02\x03\x04", "little")
"""What the target holds otherwise: it can be run, and is told from what is written."""


@dataclass(frozen=True, slots=True)
class PagingOutcome:
    """What an access did.

    ``end`` is "done", an exception's name, or an exit in words.  ``error`` is the exception's error code,
    ``cr2`` CR2 of a page fault, ``at`` where the exception was: at the "access", at its "target", or an
    address.  ``flags`` are the bits of each entry on the path that changed, the root's first; ``target`` the
    8 bytes there and ``register`` the instruction's register afterwards.
    """

    end: str
    error: int | None
    cr2: int | None
    at: str
    flags: tuple[int, ...]
    target: int
    register: int


class PagingRoom:
    """A machine for a number of cases; a context manager."""

    def __init__(self, system: System, cpuid: Sequence[CpuidEntry], cases: int = CASES_PER_MACHINE) -> None:
        self._bits = Features.of(cpuid).physical_bits
        self._left = cases
        self._tables = TABLES
        self._memory = memory = GuestMemory(TABLES + cases * _STEP)
        self._machine: Machine = system.create_machine()
        self._closed = threading.Event()
        try:
            self._machine.create_slot(memory, 0)
            large = FRAMES[30] + _TARGET_PAGE
            self._machine.create_slot(memory, large, size=PAGE_SIZE, memory_offset=_TARGET_PAGE)
            arena = Arena(*_ARENA)
            self._stack = arena.take() + PAGE_SIZE
            handlers = _write_code(memory)
            tables = {
                wide: SystemTables.build(
                    memory, arena.take, wide=wide, stacks=[self._stack], handlers=handlers
                )
                for wide in (False, True)
            }
            self._system = {levels: _map_system(memory, arena, modes[1]) for levels, modes in _MODES.items()}
            self._vcpu: Vcpu = self._machine.create_vcpu()
            self._vcpu.set_cpuid(cpuid)
            self._special = {
                (levels, cpl): self._start_state(mode, cpl, tables[levels > 3])
                for levels, (mode, _) in _MODES.items()
                for cpl in (0, 3)
            }
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def usable(self) -> bool:
        """Whether another case can run: there are tables left, and the last one ended with a report."""
        return self._left > 0

    def run(self, case: PagingCase) -> PagingOutcome:
        """Make the access; the room must be usable."""
        memory, tables = self._memory, self._tables
        self._tables += _STEP
        self._left -= 1
        target = _TARGET_PAGE + (case.linear & 0xFFF)
        entries = case.entries(tables, FRAMES[case.shape.page_shift], self._bits)
        memory.write(tables, self._system[case.shape.levels])
        size = case.shape.entry_bytes
        for gpa, entry in entries:
            memory.write(gpa, entry.to_bytes(size, "little"))
        memory.write(target, _TARGETS.get(case.kind, _CODE_TARGET).to_bytes(8, "little"))
        start = self._load(case, tables)
        exit = self._vcpu.run()
        registers = self._vcpu.get_registers()
        places = {start: "access", case.linear: "target"}
        end, error, cr2, at = self._report(exit, registers, 8 if case.shape.levels > 3 else 4, places)
        return PagingOutcome(
            end,
            error,
            cr2,
            at,
            tuple(int.from_bytes(memory.read(gpa, size), "little") ^ entry for gpa, entry in entries),
            int.from_bytes(memory.read(target, 8), "little"),
            registers.rbx,
        )

    def close(self) -> None:
        """Close machine and memory.  Idempotent."""
        self._closed.set()
        self._machine.close()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ----------------------------------------------------------------------------------

    def _start_state(self, mode: BootMode, cpl: int, tables: SystemTables) -> SpecialRegisters:
        special = boot_state(mode, entry=0, stack=0, cpl=cpl, cr3=TABLES, tables=tables).special
        special.apic_base = self._vcpu.get_special_registers().apic_base
        special.cr2 = _OLD_CR2
        return special

    def _load(self, case: PagingCase, tables: int) -> int:
        """Set the vCPU's state; the address of the instruction that makes the access."""
        special = self._special[case.shape.levels, case.cpl]
        special.cr0, special.cr3, special.cr4, special.efer = case.cr0, tables, case.cr4, case.efer
        special.ldt = Segment(base=case.linear, limit=7, selector=0, type=2, s=0)
        start = (_USER_CODE if case.cpl else _SUPERVISOR_CODE) + _SNIPPET_BYTES * _NUMBERS[case.kind]
        self._vcpu.set_special_registers(special)
        self._vcpu.set_registers(
            Registers(
                rax=case.pkru,
                rbx=_LDT_SELECTOR if case.kind in _TARGETS else _STORED,
                rdi=case.linear,
                rsp=self._stack - PAGE_SIZE // 2,
                rip=start if case.control.pke else start + len(_WRPKRU),
                rflags=case.rflags,
            )
        )
        return start + len(_WRPKRU)

    def _report(
        self, exit: Exit, registers: Registers, word: int, places: Mapping[int, str]
    ) -> tuple[str, int | None, int | None, str]:
        """End, error code, CR2 and place; ``word`` bytes are the items of the handler's stack."""
        if isinstance(exit, IoOut) and exit.port == _DONE:
            return "done", None, None, ""
        if not isinstance(exit, IoOut) or not _HANDLER <= exit.port < _HANDLER + _VECTORS:
            self._left = 0
            return str(exit), None, None, ""
        vector = exit.port - _HANDLER
        stack = registers.rsp
        error = None
        if vector in _WITH_ERROR_CODE:
            error = int.from_bytes(self._memory.read(stack, word), "little")
            stack += word
        rip = int.from_bytes(self._memory.read(stack, word), "little")
        cr2 = registers.rax if vector == Vector.PF else None
        return f"#{_NAMES.get(vector, vector)}", error, cr2, places.get(rip, hex(rip))

    def _watch(self) -> None:
        """Kick the vCPU out of a case that does not end."""
        seen = -1
        while not self._closed.wait(STUCK_SECONDS):
            if self._left == seen:
                with suppress(ClosedError, GuestTimeoutError):
                    self._vcpu.kick(wait=STUCK_SECONDS)
            seen = self._left


_MODES: Final = {
    2: (BootMode.PAGED32, PagingMode.LEGACY32),
    3: (BootMode.PAE, PagingMode.PAE),
    4: (BootMode.LONG, PagingMode.LONG4),
    5: (BootMode.LA57, PagingMode.LONG5),
}
_NUMBERS: Final = {kind: number for number, kind in enumerate(Kind)}
_NAMES: Final = {int(vector): vector.name for vector in Vector}
_WITH_ERROR_CODE: Final = {int(vector) for vector in Vector if vector.has_error_code}


def _map_system(memory: GuestMemory, arena: Arena, mode: PagingMode) -> bytes:
    """Map the guest's own pages, all flags set; the entry for the root of a case's tables."""
    tables = PageTables(mode, memory, arena.take)
    for page in range(_HANDLERS, _ARENA[1], PAGE_SIZE):
        flags = USER if page == _USER_CODE else SUPERVISOR
        tables.map(page, page, PAGE_SIZE, flags=flags)
    return memory.read(tables.cr3, 4 if mode is PagingMode.LEGACY32 else 8)


def _write_code(memory: GuestMemory) -> list[int]:
    """The snippets at both places, and the handlers, whose addresses are returned."""
    for kind, access in _ACCESS.items():
        ending = _TRAP if kind is Kind.FETCH else _OUT
        for page in (_SUPERVISOR_CODE, _USER_CODE):
            memory.write(page + _SNIPPET_BYTES * _NUMBERS[kind], _WRPKRU + access + ending)
    handlers = [_HANDLERS + _SNIPPET_BYTES * vector for vector in range(_VECTORS)]
    for vector, handler in enumerate(handlers):
        memory.write(handler, _READ_CR2 + bytes([0xE6, _HANDLER + vector, 0xEB, 0xFE]))
    return handlers
