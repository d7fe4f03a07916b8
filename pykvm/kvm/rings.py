"""Dirty rings (api.rst 8.29, in newer editions 7.36; virt/kvm/dirty_ring.c).

The rules that callers forget are held here: entries are taken in order and with acquire/release, the
reset is repeated until everything taken is reset, pages are handed out only after it, entries of slots
that are gone are dropped and counted, and a ring that overflowed raises for ever instead of losing pages.

How an overflow shows.  The kernel only warns (once per boot) and overwrites.  A host that emulates guest
code in batches looks at the soft limit between batches only (docs/reference/hosts.md D.7).  Seen from here:
every entry of the ring is dirty at once; or the reset stops short of what was taken, since a taken entry
was overwritten; or nothing is at the head while there is something elsewhere.  Each of the three raises.
One case leaves no trace until the next entry: the overwriting one falls between the two instructions with
which the kernel's reset reads and clears that very entry.

The guest can go on nevertheless.  The kernel counts in free-running indices that it keeps to itself: one
of the next entry to write, one of the next to reset.  A vCPU is stopped as long as they are far apart, and
is so for ever if the second one passes the first.  So a ring that overflowed is reset by exactly as much as
is known to lie between them, and its true position is measured on the way (``VcpuRing.realign``).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Refusals
from pykvm.errors import (
    CapabilityError,
    ClosedError,
    DirtyRingModeError,
    RingOrderError,
    RingOverflowError,
    RingSizeError,
    UsageError,
    from_errno,
)
from pykvm.kvm.capabilities import Capability, Extensions, Switches
from pykvm.kvm.slots import VmMemory
from pykvm.machine.protocols import RingEntries, RingHarvest, SlotFrames, Vcpu

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import KvmVcpu

ENTRY_SIZE = 16
RESERVED = 64
"""KVM_DIRTY_RING_RSVD_ENTRIES: the soft limit is at least this much below the size."""
_FRUITLESS = 100
_CAPABILITIES = (Capability.DIRTY_LOG_RING_ACQ_REL, Capability.DIRTY_LOG_RING)
_RESET_REFUSALS: Refusals = {
    errno.EINVAL: (DirtyRingModeError, "this VM has no dirty rings; enable them before the first vCPU.")
}


class VcpuRing:
    """One vCPU's ring: the mapping and the position of the next entry to take.

    SAFETY: the mapping belongs to a Python mmap object that ``_entries`` and ``_flags`` keep alive; ``close``
    only drops the references, so a harvest in another thread finishes on mapped memory.
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
        self.behind = False
        """Overflowed by a whole ring or more; where the kernel's reset index stands is unknown."""
        self._flags = np.frombuffer(mapping, dtype=np.uint32)[:: ENTRY_SIZE // 4]
        self._entries = ffi.from_buffer("struct kvm_dirty_gfn[]", mapping)
        self._slots = np.zeros(entries, dtype=np.uint32)
        self._offsets = np.zeros(entries, dtype=np.uint64)
        self._slots_pointer = ffi.cast("__u32 *", self._slots.ctypes.data)
        self._offsets_pointer = ffi.cast("__u64 *", self._offsets.ctypes.data)

    def harvest(self, vcpu_id: int) -> RingEntries | None:
        """Take everything there is; None for nothing.  Sets ``overflowed``."""
        ring = self._entries
        if ring is None:
            return None
        # SAFETY: both arrays have room for a whole ring and live as long as this object.
        n = lib.pykvm_ring_harvest(
            ring, self.entries, self.head, self.entries, self._slots_pointer, self._offsets_pointer
        )
        self.head = (self.head + n) & 0xFFFFFFFF
        if n == 0:
            elsewhere = lib.pykvm_ring_find_dirty(ring, self.entries) >= 0
            if elsewhere and not ring[self.head % self.entries].flags & lib.KVM_DIRTY_GFN_F_DIRTY:
                self.overflowed = True
            return None
        if n == self.entries:
            self.overrun()
        return RingEntries(vcpu_id, self._slots[:n].copy(), self._offsets[:n].copy())

    def peek(self, vcpu_id: int, since: int) -> tuple[RingEntries | None, int]:
        """The entries from the ``since``-th that KVM ever pushed on, as far as nobody took them yet, without
        taking them; and how many it pushed altogether.  For a vCPU that is outside the guest."""
        ring = self._entries
        if ring is None:
            return None, since
        dirty, size = lib.KVM_DIRTY_GFN_F_DIRTY, self.entries
        begin = end = max(since, self.head)
        while (
            end - self.head < size and ring[end % size].flags & (dirty | lib.KVM_DIRTY_GFN_F_RESET) == dirty
        ):
            end += 1
        found = [ring[index % size] for index in range(begin, end)]
        if not found:
            return None, end
        slots = np.array([entry.slot for entry in found], dtype=np.uint32)
        return RingEntries(vcpu_id, slots, np.array([entry.offset for entry in found], dtype=np.uint64)), end

    # --- after an overflow -----------------------------------------------------------------------

    def is_short(self) -> bool:
        """Whether the kernel wrote over an entry before its reset.

        Then a reset that took all it could left harvested entries behind, or the ring is dirty all over.
        """
        flags = self._flags
        return bool((flags & lib.KVM_DIRTY_GFN_F_RESET).any() or (flags & lib.KVM_DIRTY_GFN_F_DIRTY).all())

    def overrun(self) -> None:
        """The kernel is a whole ring or more ahead of its resets.  Freezes those until ``realign``."""
        self.overflowed = self.behind = True
        self._flags[:] = 0

    def realign(self, reset: Callable[[], int]) -> None:
        """Reset the ring once around and find out where the kernel's reset index stands.

        ``reset`` resets until nothing is left and tells how many; the vCPU is outside the guest.  With every
        entry marked but the first one, the count is the distance from the index to that entry.
        """
        flags = self._flags
        flags[1:] = lib.KVM_DIRTY_GFN_F_RESET
        flags[0] = 0
        distance = reset()
        flags[0] = lib.KVM_DIRTY_GFN_F_RESET
        reset()
        self.head = -distance % self.entries
        self.behind = False

    def give_up(self, full: bool) -> None:
        """Mark what is in the ring as harvested, with the empty entries in between that the kernel passed.

        A vCPU that stopped with ``full`` has more entries than the soft limit between the kernel's indices,
        even if none is visible, and that limit is at least the 64 entries which the kernel keeps in reserve.
        """
        order = np.arange(self.head, self.head + self.entries) % self.entries
        dirty = np.flatnonzero(self._flags[order] & lib.KVM_DIRTY_GFN_F_DIRTY)
        n = int(dirty[-1]) + 1 if len(dirty) else RESERVED if full else 0
        self._flags[order[:n]] = lib.KVM_DIRTY_GFN_F_RESET
        self.head = (self.head + n) & 0xFFFFFFFF

    def close(self) -> None:
        self._entries = None
        self._flags = np.empty(0, dtype=np.uint32)


class _Batch(NamedTuple):
    """Entries and where the slots were when they were taken."""

    entries: RingEntries
    slots: dict[int, SlotFrames]


class VmRings(VmMemory, Extensions, Switches):
    """The part of a VM that deals with dirty rings."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.ring_entries = 0
        self._ring_lock = threading.Lock()
        self._batches: list[_Batch] = []
        self._unreset = 0
        self._owner_pid = os.getpid()

    def _ring_vcpus(self) -> Sequence[KvmVcpu]:
        raise NotImplementedError

    def enable_dirty_ring(self, entries: int) -> None:
        """KVM_CAP_DIRTY_LOG_RING_ACQ_REL (api.rst 8.29): a ring of ``entries`` (16 bytes each) per vCPU.

        A power of two, 256 to 65536 on x86 (1024 upwards where PML is on).  Once, before the first vCPU.
        Raises CapabilityError, RingSizeError, RingOrderError, KvmError.
        """
        capability = next((cap for cap in _CAPABILITIES if self.check_extension(cap)), None)
        if capability is None:
            raise CapabilityError("This kernel has no dirty rings (Linux 5.11 and up do); use the bitmap.")
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
        self.enable_cap(capability, size, refusals=refusals)
        self.ring_entries = entries

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS (api.rst 8.29) once, as it is: the number of entries reset.

        ``collect_rings`` is what one wants; a bare reset is for tests of KVM itself.
        """
        count = self.ioctl_int(lib.KVM_RESET_DIRTY_RINGS, 0, "KVM_RESET_DIRTY_RINGS", _RESET_REFUSALS)
        self._unreset = max(self._unreset - count, 0)
        return count

    def collect_rings(self, vcpus: Iterable[Vcpu] | None = None) -> RingHarvest:
        """Harvest and reset; see pykvm.machine.Machine.collect_rings.

        May be called from any thread while vCPUs run.  Raises DirtyRingModeError, RingOverflowError,
        ClosedError, and UsageError for a vCPU of another machine.
        """
        with self._ring_lock:
            self._require_rings()
            wanted = None if vcpus is None else self._own_ids(vcpus)
            now = self._harvest(wanted)
            self._raise_overflow()
            self._reset()
            batches, self._batches = self._batches, []
        # Slots that went or moved since their entries were taken denote nothing any more.
        return RingHarvest(
            [
                batch
                if batch.slots is now
                else _Batch(batch.entries, {n: at for n, at in batch.slots.items() if now.get(n) is at})
                for batch in batches
            ]
        )

    def _own_ids(self, vcpus: Iterable[Vcpu]) -> set[int]:
        chosen = list(vcpus)
        ours = self._ring_vcpus()
        if any(all(vcpu is not own for own in ours) for vcpu in chosen):
            raise UsageError("A vCPU of another machine has its ring there; ask that machine.")
        return {vcpu.id for vcpu in chosen}

    def _require_rings(self) -> None:
        if not self.ring_entries:
            raise DirtyRingModeError(
                errno.EINVAL, "KVM_RESET_DIRTY_RINGS", "this VM has no dirty rings; enable them first."
            )
        if self.closed:
            raise ClosedError("The VM is closed; create a new one.")
        if os.getpid() != self._owner_pid:
            # Harvesting marks entries in memory that is shared with the parent; the reset would then fail.
            raise from_errno(errno.EIO, "KVM_RESET_DIRTY_RINGS")

    def _harvest(self, wanted: set[int] | None) -> dict[int, SlotFrames]:
        """Take what there is; returns where the slots are after that."""
        taken = []
        for vcpu in self._ring_vcpus():
            ring = vcpu.ring
            if ring is None or ring.overflowed or (wanted is not None and vcpu.id not in wanted):
                continue
            entries = ring.harvest(vcpu.id)
            if entries is not None:
                taken.append(entries)
                self._unreset += len(entries.slots)
        slots = {slot.id: slot.frames for slot in list(self._slots.values())}
        self._batches += [_Batch(entries, slots) for entries in taken]
        return slots

    def _reset(self) -> None:
        """Reset until all that was taken is reset: a signal ends the ioctl early from Linux 7.2 on."""
        fruitless = 0
        while self._unreset:
            fruitless = 0 if self.reset_dirty_rings() else fruitless + 1
            if fruitless == _FRUITLESS:
                rings = [vcpu.ring for vcpu in self._ring_vcpus() if vcpu.ring is not None]
                short = [ring for ring in rings if ring.is_short()]
                for ring in short:
                    ring.overrun()
                for ring in () if short else rings:
                    ring.overflowed = True
                self._raise_overflow()

    def _raise_overflow(self) -> None:
        """Raise if a ring overflowed.  The log is beyond repair, but the guest can go on: empty the ring."""
        lost = [vcpu for vcpu in self._ring_vcpus() if vcpu.ring is not None and vcpu.ring.overflowed]
        if not lost:
            return
        self._batches = []
        self._reset_all()
        for vcpu in lost:
            # One that is inside the guest stops at its limit, and is seen to then.
            if vcpu.ring is not None and not vcpu.running:
                full = vcpu.take_ring_full()
                if vcpu.ring.behind:
                    vcpu.ring.realign(self._reset_all)
                else:
                    vcpu.ring.give_up(full)
                    self._reset_all()
        raise RingOverflowError(
            f"The dirty ring of vCPU {lost[0].id} ({self.ring_entries} entries) overflowed and pages are "
            "missing from the log: this host runs more guest code between two checks than the ring can hold. "
            "Use the bitmap, a guest at CPL 3, or a larger ring; the VM's log cannot be trusted any more."
        )

    def _reset_all(self) -> int:
        """Reset until there is nothing more; how many entries that were."""
        total = fruitless = 0
        while fruitless < 2:
            count = self.reset_dirty_rings()
            total += count
            fruitless = 0 if count else fruitless + 1
        self._unreset = 0
        return total

    @contextlib.contextmanager
    def _slot_change(self) -> Iterator[None]:
        """First take in the entries that still mean the slots as they are, then keep collectors out: entries
        of a slot whose new place they do not know yet would be dropped, or mean other pages to them."""
        if not (self.ring_entries and self._ring_vcpus()):
            yield
            return
        with self._ring_lock:
            self._harvest(None)
            yield
