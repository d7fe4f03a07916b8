"""A guest for one question at a time to KVM's MMU, by the method of docs/reference/hosts.md 0.

One slot of 64 MiB (or fewer pages) at gfn 0, mapped one to one by 4 KiB pages with R/W and U/S set and with
A and D as the test wants them; one snippet for each KVM_RUN; what every deterministic statistic moved by, and
the pages that the log or the ring got.  It knows machines by their protocols only, so the same rows are asked
of a real KVM and of the model.

Frames are those of hosts.md, in hexadecimal, so that ring orders read the same: 1 code, 2 PML4, 100 PDPT, 101
PD, 102 on page tables (112 maps 2000 to 21ff); beside them 3 TSS, 4 GDT, 5 IDT, 6 handlers, 7 the stack of
CPL 0, 8 that of CPL 3, and 180 to 1ff for further tables.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import pytest

from pykvm.kvm import KvmSystem
from pykvm.machine import DirtyRingFull, Exit, IoOut, Machine, Registers, Slot, SlotFlags, System, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.model.system import ModelSystem
from pykvm.probe import detect, read_evidence
from pykvm.profiles import DEVELOPMENT_HOST, Profile, profile
from pykvm.x86.bits import Rflags
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import DescriptorTable, Segment, SpecialRegisters

CODE, PML4, TSS, GDT, IDT, HANDLERS, KERNEL_STACK, USER_STACK = 1, 2, 3, 4, 5, 6, 7, 8
PDPT, PD, PT = 0x100, 0x101, 0x102
SPARE: Final = 0x180
"""The first of 80h frames for further tables and whatever else a test needs."""
DATA: Final = 0x2000
"""The data page of hosts.md; its page table is 112."""
DATA_PT: Final = 0x112
PAGES_64M: Final = 0x4000
PORT, FAULT_PORT = 0x10, 0x20
DONE: Final = bytes([0xE6, PORT])
STORE: Final = {1: b"\x88\x07", 2: b"\x66\x89\x07", 4: b"\x89\x07", 8: b"\x48\x89\x07"}
"""mov [rdi], al / ax / eax / rax"""
LOAD: Final = {1: b"\x8a\x07", 2: b"\x66\x8b\x07", 4: b"\x8b\x07", 8: b"\x48\x8b\x07"}
FETCH: Final = b"\xff\xe7"
"""jmp rdi: what is there must end the run."""
NOP, INVLPG, LOAD_CR3 = b"", b"\x0f\x01\x3f", b"\x0f\x22\xd8"
"""Nothing; invlpg [rdi]; mov cr3, rax."""
TABLE, PAGE, FRESH = 0x27, 0x67, 0x07
"""Flags of entries: P, R/W, U/S with A; with A and D; with neither."""
_CODE_STRIDE: Final = 64

MMU: Final = (
    "remote_tlb_flush_requests", "mmu_cache_miss", "mmu_unsync", "mmu_pte_write", "mmu_pde_zapped",
    "mmu_flooded", "mmu_shadow_zapped", "mmu_recycled", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits",
    "max_mmu_rmap_size", "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", "pf_guest",
    "pf_mmio_spte_created", "invlpg",
)  # fmt: skip
"""What the rows compare: the deterministic statistics of the MMU (hosts.md A)."""
BOOKKEEPING: Final = (
    "tlb_flush",
    "insn_emulation",
    "insn_emulation_fail",
    "io_exits",
    "mmio_exits",
    "hypercalls",
)
"""Deterministic too, but different from vendor to vendor (hosts.md 0, the normalised recipe)."""


# --- hosts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A source of machines and what is known of how it behaves."""

    system: System
    profile: Profile

    @property
    def kvm(self) -> bool:
        return self.system.backend == "kvm"


@cache
def real_profile() -> Profile:
    """The profile of this machine's KVM as found by probes, for what a row has to expect of it."""
    with KvmSystem() as system:
        return detect(system, read_evidence(), system.check_extension).profile


def _param(name: str) -> Any:
    if name == "kvm":
        return pytest.param("kvm", id="kvm", marks=pytest.mark.kvm)
    return pytest.param(name, id=f"model {name}")


def hosts(*profiles: str, kvm: bool = True) -> pytest.MarkDecorator:
    """Ask the rows of real KVM and of the model's ``profiles``, as "kind era"."""
    return pytest.mark.parametrize(
        "host", [_param(name) for name in (("kvm",) if kvm else ()) + profiles], indirect=True
    )


PVM: Final = " ".join(DEVELOPMENT_HOST)
SHADOW: Final = (PVM, "amd-shadow 6.1", "amd-shadow 6.12", "amd-shadow 7.2")
NPT: Final = ("amd-npt 6.1", "amd-npt 6.12", "amd-npt 7.2")


def open_host(name: str) -> Host:
    """``kvm``, or the model with the profile of that kind and era."""
    if name == "kvm":
        return Host(KvmSystem(), real_profile())
    wanted = profile(*name.split())
    return Host(ModelSystem(profile=wanted), wanted)


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    opened = open_host(request.param)
    with opened.system:
        yield opened


@pytest.fixture
def shadow(host: Host) -> Host:
    """A host with shadow paging that runs long mode at CPL 3 natively: all of hosts.md B.0 to B.8."""
    if host.profile.tdp:
        pytest.skip(f"The row is about shadow paging, and this KVM ({host.profile.name}) has nested paging.")
    return host


@pytest.fixture
def native(host: Host) -> Host:
    """A host with shadow paging whose processor runs every mode, not only long mode at CPL 3."""
    if host.profile.tdp:
        pytest.skip(f"The row is about shadow paging, and this KVM ({host.profile.name}) has nested paging.")
    if host.profile.emulates_all_but_user:
        pytest.skip(
            "This KVM runs only long mode at CPL 3 natively (hosts.md C.1), the row needs other modes."
        )
    return host


@pytest.fixture
def nested(host: Host) -> Host:
    """A host with nested paging and the TDP MMU, without PML."""
    if not host.profile.tdp or not host.profile.tdp_mmu or host.profile.pml:
        pytest.skip(f"The row is about the TDP MMU with nested paging, and this KVM is {host.profile.name}.")
    return host


# --- the guest -----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one KVM_RUN did.

    ``moved``: the statistics of MMU that moved, and by how much.  ``other``: those of BOOKKEEPING.
    ``fault``: vector and error code of the exception that ended it, or None.
    """

    exit: Exit
    moved: dict[str, int]
    other: dict[str, int]
    fault: tuple[int, int] | None = None
    pushed: list[int] = field(default_factory=list)
    """Ring entries of the run as gfns, in KVM's order; empty in bitmap mode."""


def _differences(
    after: Mapping[str, int], before: Mapping[str, int], names: tuple[str, ...]
) -> dict[str, int]:
    return {
        name: after.get(name, 0) - before.get(name, 0)
        for name in names
        if after.get(name, 0) != before.get(name, 0)
    }


_FREE_MEMORIES: Final[dict[int, list[GuestMemory]]] = {}
"""Memories of earlier rigs by size: the host's pages are there already, which saves most of a rig's time."""


def _zeroed_memory(size: int) -> GuestMemory:
    free = _FREE_MEMORIES.setdefault(size, [])
    memory = free.pop() if free else GuestMemory(size)
    # Every page is written, so that the host has one of its own everywhere (hosts.md A, untouched memory).
    memory.view()[:] = 0
    return memory


class Rig:
    """A machine with one vCPU in such a guest; a context manager.

    ``upper``, ``leaf``, ``code``: flags of the entries above the leaves, of the leaves, and of the leaves of
    the code page.  ``entries``: single table entries by (gfn, index), 8 bytes each.  ``ring``: entries of the
    dirty ring, 0 for the bitmap.  ``manual``: 1 for manual protection, 3 with all bits set initially.
    ``log``: whether the slot logs from the start.  ``cpl``: 3 or 0.
    """

    def __init__(
        self,
        host: Host,
        *,
        pages: int = PAGES_64M,
        upper: int = TABLE,
        leaf: int = PAGE,
        code: int = TABLE,
        entries: Mapping[tuple[int, int], int] | None = None,
        ring: int = 0,
        manual: int = 0,
        log: bool = True,
        cpl: int = 3,
        memory: GuestMemory | None = None,
        prepare: Callable[[Machine], object] | None = None,
    ) -> None:
        self.host = host
        self.pages = pages
        self.cpl = cpl
        self._runs = 0
        self._pushes = 0
        self._left_cpl = False
        self._pooled = memory is None
        self.memory = memory or _zeroed_memory(pages * PAGE_SIZE)
        self.machine: Any = host.system.create_machine()
        try:
            if ring:
                self.machine.enable_dirty_ring(ring)
            if manual:
                self.machine.enable_manual_protect(initially_set=manual == 3)
            if prepare is not None:
                prepare(self.machine)
            self._fill(upper, leaf, code, entries or {})
            flags = SlotFlags.LOG_DIRTY_PAGES if log else SlotFlags.NONE
            self.slot: Slot = self.machine.create_slot(self.memory, 0, size=pages * PAGE_SIZE, flags=flags)
            self.vcpu: Any = self.machine.create_vcpu()
            self.vcpu.set_cpuid(self._cpuid())
            self.enter(self.vcpu)
            self.counters()
        except BaseException:
            self.close()
            raise

    def _fill(self, upper: int, leaf: int, code: int, entries: Mapping[tuple[int, int], int]) -> None:
        tables = -(-self.pages // 512)
        frames = np.arange(tables * 512, dtype=np.uint64) << np.uint64(12)
        leaves = np.where(frames >> np.uint64(12) < self.pages, frames | np.uint64(leaf), np.uint64(0))
        leaves[CODE] = CODE << 12 | code
        for gfn in (TSS, GDT, IDT, HANDLERS):  # D clear, since they are only read; A by hosts.md B.10
            leaves[gfn] = gfn << 12 | TABLE
        for gfn in (KERNEL_STACK, USER_STACK):
            leaves[gfn] = gfn << 12 | PAGE
        self.memory.write(PT * PAGE_SIZE, leaves.tobytes())
        self.put(PML4, 0, PDPT << 12 | upper)
        self.put(PDPT, 0, PD << 12 | upper)
        for index in range(tables):
            self.put(PD, index, PT + index << 12 | upper)
        for (gfn, index), value in entries.items():
            self.put(gfn, index, value)
        # RSP0 lies in the TSS where the I/O bitmap begins (base 0), at ports 32 to 95: 10h stays allowed.
        self.memory.write(TSS * PAGE_SIZE + 4, struct.pack("<Q", (KERNEL_STACK + 1) * PAGE_SIZE))
        descriptors = (
            0,
            0x00AF9B000000FFFF,
            0x00CF93000000FFFF,
            0,
            0,
            0x00CFF3000000FFFF,
            0x00AFFB000000FFFF,
        )
        self.memory.write(GDT * PAGE_SIZE, struct.pack("<7Q", *descriptors))
        for vector in range(32):
            at = HANDLERS * PAGE_SIZE + vector * 8
            self.memory.write(
                at, bytes([0xB0, vector, 0xE6, FAULT_PORT, 0xEB, 0xFE])
            )  # mov al, v; out; jmp $
            gate = (
                at & 0xFFFF | 8 << 16 | (0xEE00 if vector == 3 else 0x8E00) << 32 | (at >> 16 & 0xFFFF) << 48
            )
            self.memory.write(IDT * PAGE_SIZE + vector * 16, struct.pack("<QQ", gate, at >> 32))

    def _cpuid(self) -> Sequence[CpuidEntry]:
        entries: Sequence[CpuidEntry] = self.machine.supported_cpuid
        return entries

    def enter(self, vcpu: Vcpu, **changes: int) -> None:
        """Put a vCPU into long mode at the rig's CPL, with ``cr0``, ``cr3``, ``cr4`` or ``efer`` as given."""
        special: SpecialRegisters = vcpu.get_special_registers()
        self._segments(special)
        special.tr = Segment(TSS << 12, 0x67, 0x40, 0xB, 1, 0, 0, 0, 0, 0)
        special.gdt = DescriptorTable(GDT << 12, 7 * 8 - 1)
        special.idt = DescriptorTable(IDT << 12, 32 * 16 - 1)
        special.cr0, special.cr3, special.cr4, special.efer = 0x80010033, PML4 << 12, 0x620, 0xD00
        for name, value in changes.items():
            setattr(special, name, value)
        vcpu.set_special_registers(special)

    def _segments(self, special: SpecialRegisters) -> None:
        user = self.cpl == 3
        special.cs = Segment(0, 0xFFFFFFFF, 0x33 if user else 8, 0xB, 1, self.cpl, 0, 1, 1, 1)
        data = Segment(0, 0xFFFFFFFF, 0x2B if user else 0x10, 3, 1, self.cpl, 1, 1, 0, 1)
        special.ds = special.es = special.fs = special.gs = special.ss = data

    # --- memory as the host sees it ----------------------------------------------------------------

    def put(self, gfn: int, index: int, value: int) -> None:
        """Store a table entry as the VMM: no log sees it."""
        self.memory.write(gfn * PAGE_SIZE + index * 8, struct.pack("<Q", value))

    def entry(self, gfn: int, index: int) -> int:
        """A table entry."""
        value: int = struct.unpack("<Q", self.memory.read(gfn * PAGE_SIZE + index * 8, 8))[0]
        return value

    def leaf(self, gfn: int) -> int:
        """The low 12 bits of the leaf entry that maps frame ``gfn`` one to one."""
        return self.entry(PT + gfn // 512, gfn % 512) & 0xFFF

    def value(self, gfn: int, offset: int = 0) -> int:
        """8 bytes of memory."""
        value: int = struct.unpack("<Q", self.memory.read(gfn * PAGE_SIZE + offset, 8))[0]
        return value

    # --- one KVM_RUN -------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """The deterministic statistics of the machine and the vCPU, by name."""
        found: dict[str, int] = {}
        for source in (self.machine, self.vcpu):
            read = getattr(source, "counters", None)
            if read is not None:
                found |= read()
            else:
                statistics = source.statistics()
                found |= {name: statistics.value(name) for name in statistics}
        return {name: found[name] for name in (*MMU, *BOOKKEEPING) if name in found}

    def run(self, code: bytes, **registers: int) -> Seen:
        """Execute ``code`` and the OUT behind it; registers that are not given are 0.

        Every snippet lies somewhere else in the code page: some KVMs step over an OUT that they find again
        at the address where they left (hosts.md C.3), and retry decisions look at RIP.
        """
        assert len(code) + 2 <= _CODE_STRIDE
        if self._left_cpl:
            self._switch(self.cpl)
        at = CODE * PAGE_SIZE + self._runs % (PAGE_SIZE // _CODE_STRIDE) * _CODE_STRIDE
        self._runs += 1
        self.memory.write(at, code + DONE)
        registers.setdefault("rsp", (USER_STACK + 1) * PAGE_SIZE - 256)
        flags = registers.pop("rflags", 0) | Rflags.FIXED | (Rflags.IOPL3 if self.cpl else 0)
        self.vcpu.set_registers(Registers(rip=at, rflags=flags, **registers))
        return self.resume()

    def at_cpl0(self, code: bytes, **registers: int) -> Seen:
        """``run``, but at CPL 0; the next one is at the rig's CPL again."""
        cpl = self.cpl
        try:
            self._switch(0)
            return self.run(code, **registers)
        finally:
            self._switch(cpl)

    def _switch(self, cpl: int) -> None:
        special: SpecialRegisters = self.vcpu.get_special_registers()
        self.cpl = cpl
        self._left_cpl = False
        self._segments(special)
        self.vcpu.set_special_registers(special)

    def resume(self) -> Seen:
        """KVM_RUN as the registers are."""
        before = self.counters()
        exit_ = self.vcpu.run()
        after = self.counters()
        seen = Seen(
            exit_,
            _differences(after, before, MMU),
            _differences(after, before, BOOKKEEPING),
            self._fault(exit_),
        )
        if self.machine.ring_entries:
            entries, self._pushes = self.vcpu.peek_ring(self._pushes)
            seen.pushed = [int(offset) for offset in entries.offsets] if entries is not None else []
        return seen

    def _fault(self, exit_: Exit) -> tuple[int, int] | None:
        if not isinstance(exit_, IoOut) or exit_.port != FAULT_PORT:
            assert isinstance(exit_, DirtyRingFull) or getattr(exit_, "port", PORT) == PORT, exit_
            return None
        self._left_cpl = True
        vector = exit_.data[0]
        with_code = vector in (8, 10, 11, 12, 13, 14, 17)
        rsp = self.vcpu.get_registers().rsp
        return vector, self.value(rsp // PAGE_SIZE, rsp % PAGE_SIZE) & 0xFFFFFFFF if with_code else 0

    def store(self, address: int, value: int = 0x5A5A5A5A5A5A5A5A, size: int = 8) -> Seen:
        """mov [address], value"""
        return self.run(STORE[size], rdi=address, rax=value)

    def load(self, address: int, size: int = 8) -> Seen:
        """mov rax, [address]"""
        return self.run(LOAD[size], rdi=address)

    def write_entry(self, gfn: int, index: int, value: int) -> Seen:
        """Store a table entry as the guest, through the one-to-one map."""
        return self.store(gfn * PAGE_SIZE + index * 8, value)

    def prime(self, *pages: int, write: bool = False) -> None:
        """Have the code page mapped, and these frames (read, or written), and what was dirtied collected."""
        self.run(b"")
        for gfn in pages:
            if write:
                self.store(gfn * PAGE_SIZE)
            else:
                self.load(gfn * PAGE_SIZE)
        if self.slot.flags & SlotFlags.LOG_DIRTY_PAGES:
            self.collect()

    # --- the log -----------------------------------------------------------------------------------

    def collect(self) -> list[int]:
        """Fetch and re-arm: the gfns, of a ring in its order, of a bitmap ascending."""
        if self.machine.ring_entries:
            harvest = self.machine.collect_rings()
            return [int(offset) for entries in harvest.entries for offset in entries.offsets]
        return self.dirty()

    def dirty(self, slot: Slot | None = None) -> list[int]:
        """KVM_GET_DIRTY_LOG: the gfns, ascending."""
        return [int(gfn) for gfn in self.machine.get_dirty_log(slot or self.slot)]

    def measured(self, action: Callable[[], object]) -> dict[str, int]:
        """The statistics of MMU that an action outside of KVM_RUN moves."""
        before = self.counters()
        action()
        return _differences(self.counters(), before, MMU)

    # --- lifetime ----------------------------------------------------------------------------------

    def close(self) -> None:
        self.machine.close()
        if self._pooled:
            _FREE_MEMORIES[self.memory.size].append(self.memory)
        else:
            self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
