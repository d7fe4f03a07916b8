"""How instructions reach memory: segmentation, alignment, translation, and stores that wait for the end.

A store is checked and translated when the semantic function makes it and carried out when the instruction
completes, so an instruction that faults has written nothing.  Loads of the same instruction see its stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pykvm.machine.exits import Exit, MmioRead
from pykvm.model import paging
from pykvm.model.bus import Bus
from pykvm.model.cpu.faults import Fault, NeedInput
from pykvm.model.cpu.instruction import RSP, SS
from pykvm.model.cpu.state import State
from pykvm.model.cpu.translator.views import Views
from pykvm.model.paging import Access
from pykvm.x86.bits import Cr0, Cr4, Rflags
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.exceptions import Vector

_PAGE: Final = 0x1000
_OFFSET: Final = 0xFFF
_MMIO_BYTES: Final = 8
_TLB_PAGES: Final = 1 << 16
_AC: Final = int(Rflags.AC)

_MISALIGNED: Final = {2: 1, 4: 3, 8: 7, 10: 7, 14: 1, 16: 15, 28: 3, 94: 1, 108: 3}
"""The address bits that must be 0 under RFLAGS.AC, by the size of the operand: integers, 80-bit numbers, SSE
operands, and the x87 environment and state of 16- and 32-bit code (SDM vol. 3, table 6-7; host)."""

Tlb = dict[int, int]
"""From linear page number to guest-physical page address."""


class Translations:
    """Cached walks of one kind of access context (user or supervisor, RFLAGS.AC)."""

    __slots__ = ("fetch", "read", "views", "write")

    def __init__(self) -> None:
        self.read: Tlb = {}
        self.write: Tlb = {}
        self.fetch: Tlb = {}
        self.views: Views | None = None
        """The pages behind them, as translated code sees them."""


class MemoryAccess(State):
    """The memory side of a processor.

    The caches are coherent: they are dropped when an instruction says so, and also when the guest writes
    to a page that a walk read.  Real processors may go on using stale entries; a guest that relies on
    either has no defined behaviour.
    """

    emulating = False
    """Whether a hypervisor's emulator carries the instruction out, not a processor; never here."""

    lenient = False
    """Whether a host module carries the instruction out, which does not look at alignment; never here."""

    def __init__(self, bus: Bus, cpuid: Sequence[CpuidEntry]) -> None:
        super().__init__(cpuid)
        self.bus = bus
        self.exits: list[Exit] = []
        """What the instruction makes the host see, in order."""
        self.replies: list[bytes] = []
        """The host's answers to the instruction's questions so far."""
        self._asked = 0
        self._queue: list[tuple[int, bytes]] = []
        self._translations: dict[int, Translations] = {}
        self._system = Translations()
        self._tables: set[int] = set()
        self.debug_hits = 0
        """DR6 bits 3:0 of data breakpoints that the instruction hit."""

    # --- segmentation --------------------------------------------------------------------------------

    def linear(self, segment: int, offset: int, size: int, write: bool = False) -> int:
        """The linear address of ``size`` bytes at ``offset``; #GP(0) or #SS(0) where the segment forbids it
        or the address is not canonical (SDM vol. 3, 5.3; vol. 1, 3.3.7.1)."""
        base, first, last, readable, writable = self.windows[segment]
        if self.bits64:
            address = base + offset & 0xFFFFFFFFFFFFFFFF
            top = address >> self.canonical_shift
            end = (address + size - 1 & 0xFFFFFFFFFFFFFFFF) >> self.canonical_shift
            high = 0xFFFFFFFFFFFFFFFF >> self.canonical_shift
            if (top and top != high) or (end and end != high):
                raise Fault.ss() if segment == SS else Fault.gp()
        else:
            if not (writable if write else readable) or offset < first or offset + size - 1 > last:
                raise Fault.ss() if segment == SS else Fault.gp()
            address = base + offset & 0xFFFFFFFF
        if self.checks_alignment and address & _MISALIGNED.get(size, 0):
            raise Fault(Vector.AC, 0)
        return address

    # --- the accesses of semantic functions ------------------------------------------------------------

    def load(self, segment: int, offset: int, size: int) -> int:
        """Read ``size`` bytes as a little-endian integer."""
        return int.from_bytes(self.load_linear(self.linear(segment, offset, size), size), "little")

    def load_for_update(self, segment: int, offset: int, size: int) -> int:
        """The read of a read-modify-write: it faults as a write does."""
        address = self.linear(segment, offset, size, True)
        self._translate_write(address)
        last = self._wrap(address + size - 1)
        if last & -_PAGE != address & -_PAGE:
            self._translate_write(last & -_PAGE)
        return int.from_bytes(self.load_linear(address, size), "little")

    def require_writable(self, segment: int, offset: int, size: int) -> None:
        """Fault as a write would, where nothing is written, or not all of it at once."""
        self.load_for_update(segment, offset, size)

    def store(self, segment: int, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes when the instruction completes."""
        self.store_linear(self.linear(segment, offset, size, True), value.to_bytes(size, "little"))

    def load_bytes(self, segment: int, offset: int, size: int) -> bytes:
        """As ``load``, for areas of any size."""
        return self.load_linear(self.linear(segment, offset, size), size)

    def store_bytes(self, segment: int, offset: int, data: bytes) -> None:
        """As ``store``, for areas of any size."""
        self.store_linear(self.linear(segment, offset, len(data), True), data)

    def push(self, value: int, size: int) -> None:
        """Push ``size`` bytes; only SP's part of RSP changes (SDM vol. 1, 6.2.3)."""
        rsp = self.regs[RSP]
        sp = rsp - size & self.stack_mask
        self.store(SS, sp, size, value)
        self.regs[RSP] = sp if self.stack_size > 2 else rsp & ~0xFFFF | sp

    def pop(self, size: int) -> int:
        """Pop ``size`` bytes."""
        rsp = self.regs[RSP]
        value = self.load(SS, rsp & self.stack_mask, size)
        sp = rsp + size & self.stack_mask
        self.regs[RSP] = sp if self.stack_size > 2 else rsp & ~0xFFFF | sp
        return value

    def load_task_state(self, address: int) -> int:
        """The two bytes of the I/O permission bitmap, or of its offset, at a linear address."""
        return self.load_system(address, 2)

    def load_system(self, address: int, size: int) -> int:
        """Read a descriptor table or TSS: an implicit supervisor access (SDM vol. 3, 4.6)."""
        return int.from_bytes(self.load_linear(self._wrap(address), size, system=True), "little")

    def store_system(self, address: int, size: int, value: int) -> None:
        """Write to a descriptor table or TSS."""
        self.store_linear(self._wrap(address), value.to_bytes(size, "little"), system=True)

    # --- linear addresses --------------------------------------------------------------------------------

    def load_linear(self, address: int, size: int, *, system: bool = False) -> bytes:
        """Read from linear addresses, which wrap at the end of the address space."""
        if self.dr7 & 0xFF:
            self._hit_breakpoints(address, size, write=False)
        pieces = []
        while size:
            part = min(size, _PAGE - (address & _OFFSET))
            cache = self._system if system else self.translations
            page = cache.read.get(address >> 12)
            if page is None:
                page = self._walk(address, Access.READ, system)
            pieces.append((page | address & _OFFSET, part))
            address = self._wrap(address + part)
            size -= part
        # Only now: a device must not be asked for half of a load that faults.
        return b"".join([self._read(gpa, part) for gpa, part in pieces])

    def store_linear(self, address: int, data: bytes, *, system: bool = False) -> None:
        """Write to linear addresses when the instruction completes; every page is checked now."""
        if self.dr7 & 0xFF:
            self._hit_breakpoints(address, len(data), write=True)
        pieces = []
        while data:
            part = min(len(data), _PAGE - (address & _OFFSET))
            pieces.append((self._translate_write(address, system), data[:part]))
            data = data[part:]
            address = self._wrap(address + part)
        self._queue += pieces

    def _wrap(self, address: int) -> int:
        return address & (0xFFFFFFFFFFFFFFFF if self.long_mode else 0xFFFFFFFF)

    def _translate_write(self, address: int, system: bool = False) -> int:
        cache = self._system if system else self.translations
        page = cache.write.get(address >> 12)
        if page is None:
            page = self._walk(address, Access.WRITE, system)
        return page | address & _OFFSET

    def _read(self, gpa: int, size: int) -> bytes:
        """Bytes within one frame, with what this instruction stored there."""
        page = self.bus.ram(gpa >> 12)
        if page is None:
            return b"".join(
                self._ask(MmioRead(gpa + at, min(size - at, _MMIO_BYTES)))
                for at in range(0, size, _MMIO_BYTES)
            )
        data = bytes(page[gpa & _OFFSET : (gpa & _OFFSET) + size])
        for at, stored in self._queue:
            if at < gpa + size and gpa < at + len(stored):
                image = bytearray(data)
                first, last = max(at, gpa), min(at + len(stored), gpa + size)
                image[first - gpa : last - gpa] = stored[first - at : last - at]
                data = bytes(image)
        return data

    def ask(self, exit: Exit, size: int) -> bytes:
        """Put a question to the host: its answer of ``size`` bytes, or NeedInput until there is one."""
        if self._asked == len(self.replies):
            raise NeedInput(exit)
        reply = self.replies[self._asked]
        self._asked += 1
        return reply.ljust(size, b"\0")[:size]

    def _ask(self, exit: MmioRead) -> bytes:
        return self.ask(exit, exit.size)

    def commit(self) -> None:
        """Carry out the stores so far; the host's answers are used up."""
        for gpa, data in self._queue:
            self.exits += self.bus.write(gpa, data)
        self._queue.clear()
        if self._asked:
            del self.replies[: self._asked]
            self._asked = 0

    def discard(self) -> None:
        """Forget the stores so far; answers are kept for the next attempt."""
        self._queue.clear()
        self._asked = 0

    def _hit_breakpoints(self, address: int, size: int, *, write: bool) -> None:
        """Note data breakpoints (SDM vol. 3, 18.2.4 and 18.2.5)."""
        for number in range(4):
            if not self.dr7 >> 2 * number & 3:
                continue
            kind = self.dr7 >> 16 + 4 * number & 3
            length = (1, 2, 8, 4)[self.dr7 >> 18 + 4 * number & 3]
            start = self.dr[number] & -length
            if (kind == 3 or (kind == 1 and write)) and start < address + size and address < start + length:
                self.debug_hits |= 1 << number

    # --- translation -------------------------------------------------------------------------------------

    @property
    def translations(self) -> Translations:
        """The cache for explicit accesses as the processor is now."""
        context = (self.cpl == 3) | (self.rflags & _AC)
        found = self._translations.get(context)
        if found is None:
            found = self._translations[context] = Translations()
        return found

    def paging_control(self) -> paging.Control:
        """What decides about walks."""
        features = self.features
        return paging.Control(
            cr0=self.cr0,
            cr3=self.cr3,
            cr4=self.cr4,
            efer=self.efer,
            ac=bool(self.rflags & Rflags.AC),
            pkru=self.pkru,
            pkrs=self.pkrs,
            pdptrs=self.pdptrs,
            physical_bits=features.physical_bits,
            pages_1g=features.pages_1g,
            pse36=features.pse36,
            amd=features.amd,
        )

    def _walk(self, address: int, access: Access, system: bool = False) -> int:
        """Translate, update A and D, and remember; #PF with CR2 where it is not allowed."""
        cache = self._system if system else self.translations
        if not self.cr0 & Cr0.PG:
            page = address & -_PAGE
        else:
            kind = access | (Access.IMPLICIT if system else Access.USER if self.cpl == 3 else Access(0))
            result = paging.walk(self._read_entry, self.paging_control(), address, kind)
            if result.error is not None:
                raise Fault(Vector.PF, result.error, address=address)
            for update in result.updates:
                self.bus.set_entry(update.gpa, update.size, update.new)
            page = result.gpa & -_PAGE
        number = address >> 12
        table = cache.write if access & Access.WRITE else cache.fetch if access & Access.FETCH else cache.read
        if len(table) >= _TLB_PAGES:
            table.clear()
        table[number] = page
        if access & Access.WRITE:
            cache.read.setdefault(number, page)
        return page

    def _read_entry(self, gpa: int, size: int) -> int | None:
        page = self.bus.ram(gpa >> 12)
        if page is None:
            return None
        frame = gpa >> 12
        if frame not in self._tables:
            self._tables.add(frame)
            self.bus.watch(frame)
            self.epoch += 1
        return int.from_bytes(page[gpa & _OFFSET : (gpa & _OFFSET) + size], "little")

    def holds_tables(self, frame: int) -> bool:
        """Whether walks that are remembered read the frame."""
        return frame in self._tables

    def flush_writable(self) -> None:
        """The dirty log was cleared, or slots changed: ask the bus again before each write.

        Another vCPU's thread may call it while this processor's sets registers.
        """
        for cache in list(self._translations.values()):
            if cache.views is not None:
                cache.views.clear()

    def host_changed_control(self) -> None:
        """The host replaced control registers, or what CPUID tells."""
        self.flush_tlb()

    def control_changed(self, *, loads_cr3: bool = False, keeps_pcid: bool = False) -> None:
        """The guest changed CR0, CR4 or EFER, or (``loads_cr3``) it loaded CR3, with bit 63 set if
        ``keeps_pcid``."""
        self.flush_tlb()

    def flush_tlb(self) -> None:
        """Drop all translations."""
        self.flush_writable()
        self._translations.clear()
        self._system = Translations()
        self._tables.clear()
        self.epoch += 1

    def flush_pcid(self, kind: int, pcid: int, address: int) -> None:
        """INVPCID of a type: more than asked for may be dropped."""
        self.flush_tlb()

    def flush_page(self, address: int) -> None:
        """INVLPG: drop the translations of one linear page."""
        for cache in (*self._translations.values(), self._system):
            for table in (cache.read, cache.write, cache.fetch):
                table.pop(address >> 12, None)
            if cache.views is not None:
                cache.views.drop(address >> 12)
        self.epoch += 1

    def load_pdptrs(self) -> tuple[int, int, int, int]:
        """The PDPTE registers as CR3 asks for; #GP(0) for reserved bits (SDM vol. 3, 4.4.1)."""
        entries = paging.read_pdptes(self._read_entry, self.cr3, self.features.physical_bits)
        if entries is None:
            raise Fault.gp()
        return entries

    @property
    def pae_paging(self) -> bool:
        """Paging with PDPTE registers."""
        return bool(self.cr0 & Cr0.PG and self.cr4 & Cr4.PAE and not self.long_mode)
