"""Dirty rings (api.rst 8.29; virt/kvm/dirty_ring.c).

The rules that callers forget are held here: entries are taken in order and with acquire/release, the
reset is repeated until everything taken is reset, pages are handed out only after it, entries of slots
that are gone are dropped and counted, and a ring that overflowed raises for ever instead of losing pages.

How an overflow shows.  The kernel only warns (once per boot) and overwrites.  A host that emulates guest
code in batches looks at the soft limit between batches only (docs/reference/hosts.md D.7).  Seen from here:
every entry of the ring is dirty at once; or the reset stops short of what was taken, since a taken entry
was overwritten; or nothing is at the head while there is something elsewhere.  Each of the three raises.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Refusals
from pykvm.errors import ClosedError, DirtyRingModeError, RingOrderError, RingOverflowError, RingSizeError
from pykvm.kvm.capabilities import Switches
from pykvm.kvm.slots import MemorySlot, VmMemory
from pykvm.machine.protocols import RingEntries, RingHarvest, SlotFrames, Vcpu

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import KvmVcpu

ENTRY_SIZE = 16
_CAP_RING = 192
_CAP_RING_ACQ_REL = 223


class VcpuRing:
    """One vCPU's ring: the mapping and the position of the next entry to take.

    SAFETY: the mapping belongs to a Python mmap object that ``_entries`` keeps alive; ``close`` only drops
    the reference, so a harvest in another thread finishes on mapped memory.
    """

    def __init__(self, vcpu_fd: int, entries: int) -> None:
        mapping = mmap.mmap(
            vcpu_fd,
            entries * ENTRY_SIZE,
            flags=mmap.MAP_SHARED,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=lib.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE,
        )
        self.entries = entries
        self.head = 0
        self.overflowed = False
        self._entries = ffi.from_buffer("struct kvm_dirty_gfn[]", mapping)
        self._slots = np.zeros(entries, dtype=np.uint32)
        self._offsets = np.zeros(entries, dtype=np.uint64)
        self._slots_pointer = ffi.cast("__u32 *", self._slots.ctypes.data)
        self._offsets_pointer = ffi.cast("__u64 *", self._offsets.ctypes.data)

    def harvest(self, vcpu_id: int) -> RingEntries | None:
        """Take everything there is; None for nothing.  Raises RingOverflowError."""
        ring = self._entries
        if ring is None:
            return None
        # SAFETY: both arrays have room for a whole ring and live as long as this object.
        n = lib.pykvm_ring_harvest(
            ring, self.entries, self.head, self.entries, self._slots_pointer, self._offsets_pointer
        )
        self.head = (self.head + n) & 0xFFFFFFFF
        if n == 0:
            if (
                lib.pykvm_ring_find_dirty(ring, self.entries) >= 0
                and not ring[self.head % self.entries].flags & 1
            ):
                self.overflowed = True
            return None
        if n == self.entries:
            self.overflowed = True
        return RingEntries(vcpu_id, self._slots[:n].copy(), self._offsets[:n].copy())

    def abandon(self) -> None:
        """Give up what is in the ring, so that its vCPU is not stopped for ever by a full ring."""
        ring = self._entries
        if ring is not None:
            self.head = (self.head + lib.pykvm_ring_abandon(ring, self.entries, self.head)) & 0xFFFFFFFF

    def close(self) -> None:
        self._entries = None


class _Batch(NamedTuple):
    """Entries and what the slots were when they were taken: (slot, generation)."""

    entries: RingEntries
    slots: list[tuple[MemorySlot, int]]


class VmRings(VmMemory, Switches):
    """The part of a VM that deals with dirty rings."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.ring_entries = 0
        self._ring_lock = threading.Lock()
        self._batches: list[_Batch] = []
        self._unreset = 0

    def _ring_vcpus(self) -> Sequence[KvmVcpu]:
        raise NotImplementedError

    def enable_dirty_ring(self, entries: int) -> None:
        """KVM_CAP_DIRTY_LOG_RING_ACQ_REL (api.rst 8.29): a ring of ``entries`` (16 bytes each) per vCPU.

        A power of two, 256 to 65536 on x86 (1024 upwards where PML is on).  Once, before the first vCPU.
        Raises RingSizeError, RingOrderError, KvmError.
        """
        size = entries * ENTRY_SIZE
        if entries <= 0 or entries & (entries - 1) or size >= 1 << 32:
            raise RingSizeError(
                errno.EINVAL, "KVM_ENABLE_CAP(DIRTY_LOG_RING)", f"{entries} entries are not a power of two."
            )
        late = self.ring_entries or self._ring_vcpus()
        refusals: Refusals = {
            errno.EINVAL: (
                (RingOrderError, "the ring must be enabled once, and before the first vCPU.")
                if late
                else (
                    RingSizeError,
                    f"{entries} entries are too few; 256 to 65536 are usual, 1024 up with PML.",
                )
            ),
            errno.E2BIG: (
                RingSizeError,
                f"{entries} entries are more than this host's limit (65536 on x86).",
            ),
        }
        self.enable_cap(_CAP_RING_ACQ_REL if self._has_acq_rel() else _CAP_RING, size, refusals=refusals)
        self.ring_entries = entries

    def _has_acq_rel(self) -> bool:
        return self.ioctl_int(lib.KVM_CHECK_EXTENSION, _CAP_RING_ACQ_REL, "KVM_CHECK_EXTENSION") > 0

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS (api.rst 4.126) once, as it is: the number of entries reset.

        ``collect_rings`` is what one wants; a bare reset is for tests of KVM itself.
        """
        refusals: Refusals = {
            errno.EINVAL: (
                DirtyRingModeError,
                "this VM has no dirty rings; enable them before the first vCPU.",
            )
        }
        return self.ioctl_int(lib.KVM_RESET_DIRTY_RINGS, 0, "KVM_RESET_DIRTY_RINGS", refusals)

    def collect_rings(self, vcpus: Iterable[Vcpu] | None = None) -> RingHarvest:
        """Harvest and reset; see pykvm.machine.Machine.collect_rings.

        May be called from any thread while vCPUs run.  Raises DirtyRingModeError, RingOverflowError,
        ClosedError.
        """
        with self._ring_lock:
            self._require_rings()
            wanted = None if vcpus is None else {vcpu.id for vcpu in vcpus}
            self._harvest(wanted)
            self._reset()
            batches, self._batches = self._batches, []
        return self._resolve(batches)

    def _require_rings(self) -> None:
        if not self.ring_entries:
            raise DirtyRingModeError(
                errno.EINVAL, "KVM_RESET_DIRTY_RINGS", "this VM has no dirty rings; enable them first."
            )
        if self.closed:
            raise ClosedError("The VM is closed; create a new one.")

    def _harvest(self, wanted: set[int] | None) -> None:
        slots: list[tuple[MemorySlot, int]] | None = None
        for vcpu in self._ring_vcpus():
            ring = vcpu.ring
            if ring is None or (wanted is not None and vcpu.id not in wanted):
                continue
            if not ring.overflowed:
                entries = ring.harvest(vcpu.id)
                if entries is not None:
                    if slots is None:
                        slots = [(slot, slot.generation) for slot in list(self._slots.values())]
                    self._batches.append(_Batch(entries, slots))
                    self._unreset += len(entries.slots)
            if ring.overflowed:
                raise self._overflow(vcpu.id)

    def _reset(self) -> None:
        """Reset until all that was taken is reset: a signal ends the ioctl early from Linux 7.2 on."""
        fruitless = 0
        while self._unreset:
            count = self.reset_dirty_rings()
            self._unreset -= count
            fruitless = 0 if count else fruitless + 1
            if fruitless == 100 or self._unreset < 0:
                for vcpu in self._ring_vcpus():
                    if vcpu.ring is not None:
                        vcpu.ring.overflowed = True
                raise self._overflow(None)

    def _overflow(self, vcpu_id: int | None) -> RingOverflowError:
        """The error to raise.  The log is beyond repair, but the guest can go on: the rings are emptied."""
        for vcpu in self._ring_vcpus():
            if vcpu.ring is not None and vcpu.ring.overflowed:
                vcpu.ring.abandon()
        self.reset_dirty_rings()
        self._batches = []
        self._unreset = 0
        whose = "A dirty ring" if vcpu_id is None else f"The dirty ring of vCPU {vcpu_id}"
        return RingOverflowError(
            f"{whose} ({self.ring_entries} entries) overflowed and pages are missing from the log: this host "
            "runs more guest code between two checks than the ring has room for. Use the bitmap, a guest at "
            "CPL 3, or a larger ring; the VM's log cannot be trusted any more."
        )

    def _before_slot_change(self) -> None:
        if self.ring_entries and self._ring_vcpus():
            with self._ring_lock:
                self._harvest(None)

    @staticmethod
    def _resolve(batches: list[_Batch]) -> RingHarvest:
        """What the offsets mean now: slots that went or moved since their entries were taken are left out."""
        return RingHarvest(
            [
                (
                    entries,
                    {
                        slot.id: SlotFrames(slot.base_gfn, slot.npages)
                        for slot, generation in slots
                        if slot.alive and slot.generation == generation
                    },
                )
                for entries, slots in batches
            ]
        )
