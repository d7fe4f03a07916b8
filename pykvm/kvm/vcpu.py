"""A vCPU: running it, kicking it, answering its exits (api.rst 4.10 and section 5)."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.errors import GuestTimeoutError, UsageError
from pykvm.kvm.capabilities import Switches
from pykvm.kvm.debug import VcpuDebug
from pykvm.kvm.exits import decode
from pykvm.kvm.ioevents import VcpuCoalesced
from pykvm.kvm.rings import VcpuRing
from pykvm.kvm.snapshot import VcpuSnapshot
from pykvm.kvm.statistics import VcpuStatistics
from pykvm.kvm.sync import VcpuSync
from pykvm.machine.exits import Exit, IoIn, IoOut, Kicked, MmioRead

if TYPE_CHECKING:
    from pykvm.abi.library import CData
    from pykvm.kvm.vm import KvmVm
    from pykvm.machine.protocols import RingEntries

_run = lib.pykvm_vcpu_run
_PACKED_IO = lib.PYKVM_RUN_PACKED_IO
_KICKED = lib.PYKVM_RUN_KICKED
_INTERRUPTED = lib.PYKVM_RUN_INTERRUPTED
_POLL_SECONDS = 20e-6
_PORT_BYTES = 0x10000 // 8


@lru_cache(maxsize=1024)
def _unpack(code: int) -> IoOut | IoIn:
    """The port access in pykvm_vcpu_run's result (hot/run.c).

    Remembered, since a guest makes the same few accesses over and over, and making a tuple takes as long as
    the way to the kernel and back.
    """
    port, size = code >> 20 & 0xFFFF, code >> 16 & 7
    return IoOut(port, size, (code >> 36).to_bytes(size, "little")) if code & 0x4000 else IoIn(port, size)


class KvmVcpu(VcpuSnapshot, VcpuCoalesced, VcpuDebug, VcpuSync, VcpuStatistics, Switches):
    """A vCPU of a real VM; see pykvm.machine.Vcpu.

    SAFETY: the kvm_run page belongs to a Python mmap object that ``_page`` keeps alive.  Closing drops the
    reference only; a method that is using the page holds one of its own, so the page is unmapped by
    whoever lets go last.
    """

    def __init__(self, vm: KvmVm, vcpu_id: int, fd: int, mmap_size: int, ring_entries: int) -> None:
        self.vm = vm
        self.id = vcpu_id
        self._state = ffi.new("struct pykvm_vcpu *")
        super().__init__(ffi.addressof(self._state, "handle"))
        lib.pykvm_handle_init(self._handle, fd, 1)
        self._page: CData | None = None
        self.ring: VcpuRing | None = None
        self._answer: tuple[int, int] | None = None
        self._full_entry = 0
        try:
            mapping = mmap.mmap(fd, mmap_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self._mapping: mmap.mmap | None = mapping
            self._page = ffi.from_buffer("struct pykvm_run_page *", mapping)
            if ring_entries:
                self.ring = VcpuRing(fd, ring_entries)
            self.prepare_statistics()
        except BaseException:
            self.close()
            raise
        self.listen(None)

    @property
    def name(self) -> str:
        return f"vCPU {self.id}"

    # --- running ---------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return bool(self._state.tid)

    @property
    def occupied(self) -> bool:
        """Whether any call is on its way into, in, or out of the kernel: more than ``running`` tells."""
        return bool(self._handle.users)

    @property
    def entries(self) -> int:
        """How often KVM_RUN was called for this vCPU."""
        return int(self._state.entries)

    def run(self) -> Exit:
        """KVM_RUN (api.rst 4.10) until an exit that somebody must see; see pykvm.machine.Vcpu.run.

        Raises ClosedError, BusyError, and KvmError: EFAULT where host memory behind a guest page is
        inaccessible, EIO after a fork.
        """
        page = self._page
        if page is None:
            raise self._closed_error()
        self._answer = None
        code = _run(self._state, page)
        while code == _INTERRUPTED:
            # Between two calls the interpreter runs Python's signal handlers, Ctrl-C among them.
            code = _run(self._state, page)
        if code > _PACKED_IO:
            result = _unpack(code)
            if isinstance(result, IoIn):
                self._answer = (page.u.io.data_offset, result.size)
            return result
        return self._slow(code, page)

    def _slow(self, code: int, page: CData) -> Exit:
        if code == _KICKED:
            return Kicked()
        if code < 0:
            raise self._error(code, "KVM_RUN")
        result = decode(page, self._code_bits)
        if isinstance(result, IoIn):
            self._answer = (page.u.io.data_offset, result.size * result.repeat)
        elif isinstance(result, MmioRead):
            offset = ffi.offsetof("struct pykvm_run_page", "u") + ffi.offsetof(
                "struct pykvm_run_mmio", "data"
            )
            self._answer = (offset, result.size)
        return result

    def _code_bits(self) -> int:
        cs = self.get_special_registers().cs
        return 64 if cs.l else 32 if cs.db else 16

    def reply(self, data: bytes) -> None:
        """Answer the IoIn or MmioRead just returned.  Raises UsageError where there is none, or for a
        length other than the exit's."""
        page, answer = self._page, self._answer
        if page is None:
            raise self._closed_error()
        if answer is None:
            raise UsageError(f"{self.name} has no IoIn or MmioRead to answer.")
        offset, length = answer
        if len(data) != length:
            raise UsageError(f"The answer must have {length} bytes, not {len(data)}.")
        # SAFETY: KVM chose offset and length within the vCPU mapping; ``page`` keeps it mapped.
        ffi.memmove(ffi.cast("char *", page) + offset, data, length)
        self._answer = None

    def kick(self, wait: float | None = None) -> None:
        """Make the current or else the next run return Kicked; see pykvm.machine.Vcpu.kick."""
        page = self._page
        if page is None:
            raise self._closed_error()
        state = self._state
        if wait is None:
            lib.pykvm_vcpu_kick(state, page)
            return
        if not state.tid:
            return
        lib.pykvm_vcpu_kick(state, page)
        deadline = time.monotonic() + wait
        while state.kick and state.tid:
            if time.monotonic() > deadline:
                raise GuestTimeoutError(
                    f"{self.name} did not leave the guest within {wait} s; allow it more time."
                )
            time.sleep(_POLL_SECONDS)

    def listen(self, ports: Iterable[int] | None) -> None:
        """Which ports make ``run`` return; None means all.  Raises UsageError beyond 0xffff."""
        if ports is None:
            bits = bytearray(b"\xff" * _PORT_BYTES)
        else:
            bits = bytearray(_PORT_BYTES)
            for port in ports:
                if not 0 <= port <= 0xFFFF:
                    raise UsageError(f"I/O port {port:#x} is not in 0 to 0xffff.")
                bits[port // 8] |= 1 << port % 8
        # SAFETY: ``_state`` owns the words, x86 is little-endian, and whoever runs sees old or new bits.
        ffi.memmove(self._state.ports, bits, _PORT_BYTES)

    @property
    def swallowed(self) -> int:
        """Port accesses that were answered without Python, since nobody listens there."""
        return int(self._state.swallowed)

    def peek_ring(self, since: int) -> tuple[RingEntries | None, int]:
        """Entries of the ring that nobody took yet, from the ``since``-th push on, and the number of pushes.

        Takes nothing out, so that it changes nothing; the vCPU must be outside the guest.
        """
        return self.ring.peek(self.id, since) if self.ring is not None else (None, since)

    def take_ring_full(self) -> bool:
        """Whether the last exit was DirtyRingFull; true once for each of them.

        The page is only read: another thread may just have come out of ``run`` and not have looked at it yet.
        """
        page, entry = self._page, self.entries
        if page is None or page.exit_reason != lib.KVM_EXIT_DIRTY_RING_FULL or entry == self._full_entry:
            return False
        self._full_entry = entry
        return True

    def request_interrupt_window(self, wanted: bool = True) -> None:
        """Make ``run`` return InterruptWindow as soon as the guest can take an interrupt."""
        page = self._page
        if page is None:
            raise self._closed_error()
        page.request_interrupt_window = int(wanted)

    # --- lifetime --------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the vCPU; a thread inside ``run`` is kicked out and its next call raises ClosedError.

        Its dirty ring stays with the VM: what it holds was written and is still to be collected.
        """
        page = self._page
        inside = lib.pykvm_handle_close(self._handle)
        if page is not None and inside:
            lib.pykvm_vcpu_kick(self._state, page)
        self._page = None
        self._mapping = None
        self.close_statistics()
