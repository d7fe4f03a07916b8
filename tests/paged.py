"""Guests of every paging mode that write chosen pages, and what the reference walk says that this writes.

Code, tables and stack lie below DATA and are mapped one to one by 4 KiB pages whose D is clear; the data
pages are seen through a window far from where they lie, by pages of the size that the test wants.  A and D
start clear in everything that the window and the code need, so every walk that should set one is seen to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self

from pykvm.crosscheck.abilities import marks_reads
from pykvm.guest.boot import Arena, BootMode, BootState, SystemTables, boot_state
from pykvm.guest.launch import PAGING
from pykvm.guest.modes import MODES, why_mode_fails
from pykvm.guest.pagetables import PageTables
from pykvm.machine import DirtyRingFull, Exit, Machine, System, Vcpu
from pykvm.machine.emulation import QEMU_TCG, emulator
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.model.cpu.features import Features
from pykvm.model.paging import Access, Control, Walk, read_pdptes, walk
from pykvm.track import Tracker
from pykvm.x86.bits import PAGE_SHIFT, Pte
from pykvm.x86.cpuid import CpuidEntry, has_1g_pages

CODE, HANDLERS, STACK, ARENA = 0x1000, 0x2000, 0x3000, (0x10000, 0x80000)
DATA: Final = 0x400000
DATA_PAGES: Final = 64
READ_ONLY: Final = DATA_PAGES - 1
"""The data page that may not be written where pages are small enough for that."""
MEMORY: Final = DATA + DATA_PAGES * PAGE_SIZE
DONE: Final = 0x10
HANDLER_PORT: Final = 0x40
"""Handlers write to this port plus the vector."""
_VECTORS: Final = 32
_HANDLER_BYTES: Final = 16
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_WINDOWS: Final = {
    BootMode.PAGED32: 0xC0000000,
    BootMode.PAE: 0xC0000000,
    BootMode.LONG: 0x7000_0000_0000,
    BootMode.LA57: 0x00F0_0000_0000_0000,
}
_PAGE: Final = Pte.P | Pte.RW | Pte.US
_SYSTEM: Final = _PAGE | Pte.A
WIDE: Final = (BootMode.LONG, BootMode.LA57)


@dataclass(frozen=True)
class Layout:
    """A mode (a key of MODES), the size of the window's pages (0 without paging), and the CPL."""

    name: str
    page_size: int
    cpl: int

    @property
    def mode(self) -> BootMode:
        return MODES[self.name]

    @property
    def paged(self) -> bool:
        return self.page_size > 0

    def linear(self, page: int) -> int:
        """Where the guest sees a data page."""
        if not self.paged:
            return DATA + page * PAGE_SIZE
        return _WINDOWS[self.mode] + DATA % self.page_size + page * PAGE_SIZE

    def __str__(self) -> str:
        size = {0: "unpaged", 4 * KIB: "4k", 2 * MIB: "2m", 4 * MIB: "4m", GIB: "1g"}[self.page_size]
        return f"{self.name}-{size}-cpl{self.cpl}"


_SIZES: Final = {
    "protected16": (0,),
    "protected32": (0,),
    "paged32": (4 * KIB, 4 * MIB),
    "pae": (4 * KIB, 2 * MIB),
    "long": (4 * KIB, 2 * MIB, GIB),
    "la57": (4 * KIB, 2 * MIB, GIB),
}
LAYOUTS: Final = tuple(
    Layout(name, size, cpl)
    for name, sizes in _SIZES.items()
    for size in sizes
    for cpl in (0, 3)
    if name != "protected16" or not cpl
)
PAGED: Final = tuple(layout for layout in LAYOUTS if layout.paged)


_REASONS: Final[dict[tuple[str, int], str | None]] = {}
_READS: Final[dict[tuple[str, str, int], bool]] = {}
"""What was found out once, since a machine takes a second to make where the processor is emulated."""


def why_not(system: System, layout: Layout) -> str | None:
    """A sentence where the system cannot run such a guest."""
    if system.backend == "model":
        return None
    if (layout.name, layout.cpl) not in _REASONS:
        reason = why_mode_fails(system, layout.name, cpl=layout.cpl)
        if reason is not None:
            reason = f"This KVM does not run {layout.mode.value} at CPL {layout.cpl}: {reason}"
        _REASONS[layout.name, layout.cpl] = reason
    reason = _REASONS[layout.name, layout.cpl]
    if reason is None and layout.page_size == GIB:
        with system.create_machine() as machine:
            if not has_1g_pages(machine.supported_cpuid):
                reason = "This KVM offers its guests no 1 GiB pages (CPUID 0x80000001, EDX bit 26)."
    return reason


def _reports_reads(system: System, layout: Layout) -> bool:
    key = system.backend, layout.name, layout.cpl
    if key not in _READS:
        _READS[key] = marks_reads(system, layout.name, layout.cpl)
    return _READS[key]


def with_everything(cpuid: Iterable[CpuidEntry]) -> list[CpuidEntry]:
    """The leaves with SMEP, SMAP, PKU, LA57, NX and 1 GiB pages added: the model can do all of them."""
    entries = []
    for entry in cpuid:
        if entry.function == 7 and entry.index == 0:
            entries.append(replace(entry, ebx=entry.ebx | 1 << 7 | 1 << 20, ecx=entry.ecx | 1 << 3 | 1 << 16))
        elif entry.function == 0x80000001:
            entries.append(replace(entry, edx=entry.edx | 1 << 20 | 1 << 26))
        else:
            entries.append(entry)
    return entries


def processor(machine: Machine) -> list[CpuidEntry]:
    """The CPUID for the guest: whatever KVM offers; of the model, all that it can do."""
    offered = machine.supported_cpuid
    return with_everything(offered) if machine.backend == "model" else list(offered)


def build(memory: GuestMemory, layout: Layout) -> tuple[BootState, PageTables | None]:
    """Write handlers, descriptor and page tables; the state before the first instruction at CODE."""
    handlers = [HANDLERS + _HANDLER_BYTES * vector for vector in range(_VECTORS)]
    for vector, at in enumerate(handlers):
        memory.write(at, bytes([0xE6, HANDLER_PORT + vector, 0xEB, 0xFE]))  # out port, al; jmp $
    arena = Arena(*ARENA)
    wide = layout.mode in WIDE
    stack = STACK + PAGE_SIZE
    system = SystemTables.build(memory, arena.take, wide=wide, stacks=[stack], handlers=handlers)
    paging = None
    if layout.paged:
        paging = PageTables(PAGING[layout.mode], memory, arena.take)
        paging.map(CODE, CODE, PAGE_SIZE, flags=_PAGE, table_flags=_PAGE)
        paging.map(HANDLERS, HANDLERS, ARENA[1] - HANDLERS, flags=_SYSTEM)
        _map_window(paging, layout)
    state = boot_state(
        layout.mode,
        entry=CODE,
        stack=stack - 0x800,
        cpl=layout.cpl,
        cr3=paging.cr3 if paging else 0,
        tables=system,
    )
    return state, paging


def _map_window(paging: PageTables, layout: Layout) -> None:
    start, size = layout.linear(0), layout.page_size
    if size == PAGE_SIZE:
        paging.map(start, DATA, READ_ONLY * PAGE_SIZE, flags=_PAGE, table_flags=_PAGE)
        last = READ_ONLY * PAGE_SIZE
        paging.map(start + last, DATA + last, PAGE_SIZE, flags=Pte.P | Pte.US)
    else:
        paging.map(start & -size, DATA & -size, size, page_size=size, flags=_PAGE, table_flags=_PAGE)


class Touch(NamedTuple):
    """One instruction of the guest: a store to a data page, or a load."""

    what: Literal["store", "load"]
    page: int


def program(layout: Layout, touches: Sequence[Touch]) -> bytes:
    """mov rdi, address; mov [rdi], eax or mov eax, [rdi], for each; out DONE, al; jmp $.

    A nop comes first: a vCPU set to the very OUT that it left by would step over it (hosts.md C.3).
    """
    wide, narrow = layout.mode in WIDE, layout.mode is BootMode.PROTECTED16
    code = b"\x90"
    for what, page in touches:
        address = layout.linear(page)
        code += (b"\x48" if wide else b"\x66" if narrow else b"") + b"\xbf"
        code += address.to_bytes(8 if wide else 4, "little")
        code += (b"\x67\x66" if narrow else b"") + (b"\x89\x07" if what == "store" else b"\x8b\x07")
    return code + bytes([0xE6, DONE, 0xEB, 0xFE])


@dataclass
class Prediction:
    """What accesses do to memory, by gfn, as the architecture has it.

    ``written``: pages stored to, and tables whose A or D is set.  ``tables``: all tables on the way.
    ``read``: pages fetched or loaded from; ``read_of_dirty`` those of them with D set in the entry, which a
    KVM may map writable and report (hosts.md B.0).  ``entries``: what changed entries hold afterwards, by
    address and size.
    """

    written: set[int] = field(default_factory=set)
    tables: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)
    read_of_dirty: set[int] = field(default_factory=set)
    entries: dict[tuple[int, int], int] = field(default_factory=dict)


class PagedGuest:
    """A machine with such a guest, prepared for one tracker; a context manager."""

    def __init__(self, system: System, layout: Layout, tracker: Tracker) -> None:
        self.layout = layout
        self.tracker = tracker
        self.reads_are_marked = _reports_reads(system, layout)
        self.machine: Machine = system.create_machine()
        self.memory = GuestMemory(MEMORY)
        try:
            tracker.prepare(self.machine)
            # Written once, so that the host has a page of its own everywhere (hosts.md A, untouched memory).
            self.memory.view()[::PAGE_SIZE] = 0
            self.machine.create_slot(self.memory, 0)
            self._start, self.paging = build(self.memory, layout)
            self.vcpu: Vcpu = self.machine.create_vcpu()
            self._cpuid = processor(self.machine)
            self.vcpu.set_cpuid(self._cpuid)
            self._start.apply(self.vcpu)
        except BaseException:
            self.close()
            raise

    def run(self, touches: Sequence[Touch]) -> Exit:
        """Execute the accesses in order; the exit that ended it."""
        self.memory.write(CODE, program(self.layout, touches))
        registers = replace(self._start.registers, rax=0x5A5A5A5A)
        self.vcpu.set_registers(registers)
        exit_ = self.vcpu.run()
        while isinstance(exit_, DirtyRingFull):
            self.tracker.on_ring_full(self.vcpu)
            exit_ = self.vcpu.run()
        return exit_

    def reported(self) -> set[int]:
        """Collect and re-arm; the gfns."""
        pages = self.tracker.collect()
        self.tracker.rearm(pages)
        return {gfn for _, gfn in pages}

    def predict(self, touches: Sequence[Touch]) -> Prediction:
        """What ``run`` of the same will do, from the page tables as they are now."""
        found = Prediction()
        user = Access.USER if self.layout.cpl else Access(0)
        self._apply(found, self.walk(CODE, Access.FETCH | user, found))
        for what, page in touches:
            access = (Access.WRITE if what == "store" else Access.READ) | user
            self._apply(found, self.walk(self.layout.linear(page), access, found))
        return found

    def walk(self, linear: int, access: Access, so_far: Prediction | None = None) -> Walk:
        """The reference walk, with the entries that ``so_far`` changed."""

        def read(gpa: int, size: int) -> int:
            known = so_far.entries.get((gpa, size)) if so_far else None
            return int.from_bytes(self.memory.read(gpa, size), "little") if known is None else known

        special, features = self._start.special, Features.of(self._cpuid)
        pdptrs = (0, 0, 0, 0)
        if self.layout.mode is BootMode.PAE:
            pdptrs = read_pdptes(self._pdpte, special.cr3, features.physical_bits) or pdptrs
        control = Control(
            cr0=special.cr0,
            cr3=special.cr3,
            cr4=special.cr4,
            efer=special.efer,
            pdptrs=pdptrs,
            physical_bits=features.physical_bits,
            pages_1g=features.pages_1g,
            pse36=features.pse36,
            amd=features.amd,
        )
        return walk(read, control, linear, access)

    def _pdpte(self, gpa: int, size: int) -> int:
        """One of PAE's four, without A, which is reserved there: TCG's nested walks set it all the same."""
        ignored = int(Pte.A) if emulator() == QEMU_TCG else 0
        return int.from_bytes(self.memory.read(gpa, size), "little") & ~ignored

    def _apply(self, found: Prediction, made: Walk) -> None:
        assert made.error is None, made
        found.tables |= {at >> PAGE_SHIFT for at, _ in made.steps}
        if self.layout.mode is BootMode.PAE:
            found.tables.add(self._start.special.cr3 >> PAGE_SHIFT)
        for update in made.updates:
            found.entries[update.gpa, update.size] = update.new
            found.written.add(update.gpa >> PAGE_SHIFT)
        gfn = made.gpa >> PAGE_SHIFT
        if made.access & Access.WRITE:
            found.written.add(gfn)
            return
        found.read.add(gfn)
        if made.steps:
            at, value = made.steps[-1]
            size = 4 if self.layout.mode is BootMode.PAGED32 else 8
            if found.entries.get((at, size), value or 0) & Pte.D:
                found.read_of_dirty.add(gfn)

    def close(self) -> None:
        self.machine.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
