"""How guest accesses reach memory on a host: through its MMU, natively or in KVM's emulator.

Natively a store is translated when it is made and carried out when the instruction completes, like those of
the plain processor; the frame was marked by the fault that made it writable.  The emulator stores at once,
page by page, so that what it did before a fault stays (kvm-mmu.md 12.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pykvm.machine.exits import MmioRead, MmioWrite
from pykvm.model.cpu.access import Translations
from pykvm.model.cpu.faults import Fault, NeedInput
from pykvm.model.cpu.processor import Processor
from pykvm.model.mmu.outcomes import GuestPageFault
from pykvm.model.paging import Access
from pykvm.model.profiled.emulators import reads_first
from pykvm.x86.bits import PageFault
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.bus import Bus
    from pykvm.model.mmu.vcpu import VcpuMmu
    from pykvm.x86.cpuid import CpuidEntry

_PAGE: Final = 0x1000
_OFFSET: Final = 0xFFF
_MMIO_BYTES: Final = 8
_LOCKED_BYTES: Final = frozenset({1, 2, 4, 8})
_AREA: Final = 512
"""Bytes of FXSAVE's area."""
_HOT: Final = 64
"""Guests of a few steps are many, and translating code takes as long as interpreting it so often."""
_READ, _WRITE, _FETCH = int(Access.READ), int(Access.WRITE), int(Access.FETCH)
_USER, _IMPLICIT = int(Access.USER), int(Access.IMPLICIT)


class Raced(Exception):
    """A locked store of the emulator found memory changed since it read: the instruction starts again.

    A single vCPU does that to itself by a locked operation on the very entry that maps it: D is set between.
    """


class HostAccess(Processor):
    """The memory side of a processor on a host."""

    def __init__(self, bus: Bus, cpuid: Sequence[CpuidEntry], mmu: VcpuMmu) -> None:
        self.mmu = mmu
        mmu.restarts = True
        self.untracked = False
        """The emulator's stores go by write_std."""
        self.gathering = False
        """The emulator's stores are put together and made as one."""
        self._gathered: list[tuple[int, bytes]] = []
        self.probing = False
        """Page faults of the emulator's accesses may come to nothing: they are not injected yet."""
        self.locking = False
        """The emulator's stores are locked ones."""
        self.exit_gpa: int | None = None
        """The guest-physical address that made KVM emulate, where it stands for the operand."""
        self.reads_first = reads_first(mmu.mmu.profile)
        """An operand that is read and written faults as one that is read."""
        self.original = b""
        """What the emulator read of an operand that it updates."""
        self.fragments = 0
        """Parts of the read at hand that lie in MMIO, as far as it came: together they are one exit."""
        self._cached = tuple(_cached(mmu, user) for user in (0, _USER))
        self._flushes = 0
        super().__init__(bus, cpuid, translate=mmu.tdp is None)
        if self._translator is not None:
            self._translator.hot = _HOT

    # --- translation ---------------------------------------------------------------------------------

    @property
    def translations(self) -> Translations:
        """The processor's TLB, for translated code: natively what it holds may be used without asking."""
        return self._cached[self.cpl == 3]

    def refresh_views(self) -> None:
        """Before translated code runs: the TLB may have been flushed."""
        if self._flushes != self.mmu.flushes:
            self._flushes = self.mmu.flushes
            self.flush_writable()

    def holds_tables(self, frame: int) -> bool:
        return frame in self.mmu.mmu.shadow.by_gfn

    def watched_frame_changed(self, gfn: int) -> None:
        self.epoch += 1

    def _kind(self, access: int, system: bool) -> int:
        if system:
            return access | _IMPLICIT
        return access | _USER if self.cpl == 3 else access

    def reach(self, address: int, access: int, system: bool = False) -> int:
        """The guest-physical address behind a linear one.

        Raises Fault; natively also Refault, LeaveGuest and EmulateInstruction.
        """
        mmu = self.mmu
        kind = self._kind(access, system)
        try:
            if self.emulating:
                if self.exit_gpa is not None and self._is_exit_address(address, access, system):
                    return self.exit_gpa
                return mmu.emulator_translate(address, kind, probing=self.probing)
            return mmu.translate(address, kind)
        except GuestPageFault as fault:
            raise Fault(Vector.PF, fault.error, address=fault.address) from None

    def _is_exit_address(self, address: int, access: int, system: bool) -> bool:
        """Whether the emulator takes the exit's address without a walk (``emulator_read_write_onepage``).

        It looks at the offset in the page alone, which misleads it where the fault was at one of the guest's
        tables.
        """
        assert self.exit_gpa is not None
        if system or access == _FETCH or self.untracked or (self.locking and access == _WRITE):
            return False
        return not (address ^ self.exit_gpa) & _OFFSET

    # --- reading -------------------------------------------------------------------------------------

    def load_for_update(self, segment: int, offset: int, size: int) -> int:
        address = self.linear(segment, offset, size, True)
        if not self.emulating:
            last = self._wrap(address + size - 1)
            if not self.reads_first:
                self.reach(address, _WRITE)
                if last & -_PAGE != address & -_PAGE:
                    self.reach(last & -_PAGE, _WRITE)
            return int.from_bytes(self.load_linear(address, size), "little")
        try:
            self.original = self.load_linear(address, size)
            return int.from_bytes(self.original, "little")
        except Fault as fault:
            if fault.vector == Vector.PF:
                # The emulator reads, but tells the guest of a write (x86_emulate_insn).
                raise Fault(Vector.PF, (fault.error or 0) | PageFault.WR, address=fault.address) from None
            raise

    def load_task_state(self, address: int) -> int:
        if not self.emulating:
            return super().load_task_state(address)
        self.probing = True
        try:
            return super().load_task_state(address)
        except (Fault, NeedInput):
            # emulator_io_permited: whatever keeps it from reading means that the port is not allowed.
            raise Fault.gp() from None
        finally:
            self.probing = False

    def require_writable(self, segment: int, offset: int, size: int) -> None:
        if not self.emulating and not self.reads_first:  # KVM's emulator does not look before it stores
            super().require_writable(segment, offset, size)

    def load_linear(self, address: int, size: int, *, system: bool = False) -> bytes:
        if self.dr7 & 0xFF:
            self._hit_breakpoints(address, size, write=False)
        self.fragments = 0
        if (address & _OFFSET) + size <= _PAGE:
            return self._read(self.reach(address, _READ, system), size)
        pieces: list[bytes | tuple[int, int]] = []
        while size:
            part = min(size, _PAGE - (address & _OFFSET))
            gpa = self.reach(address, _READ, system)
            # The emulator reads memory as it goes, and asks for the rest once all is translated.
            at_once = self.emulating and self.bus.ram(gpa >> 12) is not None
            pieces.append(self._read(gpa, part) if at_once else (gpa, part))
            address = self._wrap(address + part)
            size -= part
        return b"".join(each if isinstance(each, bytes) else self._read(*each) for each in pieces)

    def fetch_bytes(self, linear: int, size: int) -> bytes:
        gpa = self.reach(linear, _FETCH)
        page = self.bus.ram(gpa >> 12)
        if page is None:
            raise self.no_code()
        return bytes(page[gpa & _OFFSET : (gpa & _OFFSET) + size])

    def no_code(self) -> Exception:
        """What to raise for code in a hole."""
        raise NotImplementedError

    # --- writing -------------------------------------------------------------------------------------

    def store_linear(self, address: int, data: bytes, *, system: bool = False) -> None:
        if self.dr7 & 0xFF:
            self._hit_breakpoints(address, len(data), write=True)
        if self.gathering:
            self._gathered.append((address, data))
            return
        whole = len(data)
        fragments: list[MmioWrite] = []
        while data:
            part = data[: _PAGE - (address & _OFFSET)]
            gpa = self.reach(address, _WRITE, system)
            if self.emulating:
                locked = self.locking and len(part) == whole
                fragments += self._write_now(gpa, part, locked=locked, system=system)
            else:
                self._queue.append((gpa, part))
            data = data[len(part) :]
            address = self._wrap(address + len(part))
        self.exits += fragments

    def _write_now(
        self, gpa: int, data: bytes, *, locked: bool = False, system: bool = False
    ) -> list[MmioWrite]:
        """Store within a page; the exits that it takes where there is no memory."""
        locked = locked and len(data) in _LOCKED_BYTES
        if locked and not self._unchanged(gpa, len(data)):
            raise Raced
        tracked = not (system or self.untracked)
        if self.mmu.emulator_write(gpa, data, locked=locked, tracked=tracked):
            self.epoch += 1
            return []
        return [MmioWrite(gpa + at, data[at : at + _MMIO_BYTES]) for at in range(0, len(data), _MMIO_BYTES)]

    def _unchanged(self, gpa: int, size: int) -> bool:
        """Whether memory is what the emulator read before; if not, the page is marked nevertheless (12.4)."""
        page = self.bus.ram(gpa >> 12)
        if page is None or page[gpa & _OFFSET : (gpa & _OFFSET) + size] == self.original:
            return True
        mmu = self.mmu.mmu
        slot = mmu.memslots.visible(gpa >> 12)
        if slot is not None:
            mmu.mark_page_dirty(slot, gpa >> 12)
        return False

    def discard(self) -> None:
        super().discard()
        self._gathered.clear()

    def commit(self) -> None:
        if self.emulating:
            self.gathering = False
            for address, data in _joined(self._gathered):
                # The host module writes the whole area, what is reserved in it as zeros.
                self.store_linear(address, data.ljust(_AREA, b"\0") if self.lenient else data)
            self._gathered.clear()
        else:
            for gpa, data in self._queue:
                self.bus.write(gpa, data)
        self._queue.clear()
        if self._asked:
            del self.replies[: self._asked]
            self._asked = 0

    def _ask(self, exit: MmioRead) -> bytes:
        self.fragments += 1
        return self.ask(exit, exit.size)

    # --- caches that this processor does not have --------------------------------------------------------

    def flush_writable(self) -> None:
        for cache in self._cached:
            if cache.views is not None:
                cache.views.clear()

    def flush_tlb(self) -> None:
        """Rights that are looked up live have changed."""
        self.live_control()

    def live_control(self) -> None:
        """RFLAGS.AC and the protection keys count from now on as they are."""


def _cached(mmu: VcpuMmu, user: int) -> Translations:
    found = Translations()
    found.read, found.write, found.fetch = (mmu.cached(user | kind) for kind in (_READ, _WRITE, _FETCH))
    return found


def _joined(stores: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The same stores as one, which spans them; they leave no gaps."""
    if not stores:
        return []
    ordered = sorted(stores)
    return [(ordered[0][0], b"".join(data for _, data in ordered))]
