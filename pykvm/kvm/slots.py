"""Memslots and the dirty bitmap (api.rst 4.35, 4.8, 4.117).

The kernel answers every kind of wrong slot with EINVAL.  It stays the judge: the ioctl is made first, and
only its refusal is then explained from the arguments, in the kernel's own order of checks
(virt/kvm/kvm_main.c, kvm_set_memory_region).
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import (
    ClearRangeError,
    ClosedError,
    DirtyRingModeError,
    KvmError,
    LoggingDisabledError,
    PykvmError,
    SlotAbsentError,
    SlotAlignmentError,
    SlotChangeError,
    SlotError,
    SlotOverlapError,
    UsageError,
)
from pykvm.machine.protocols import Slot, SlotFlags, SlotFrames
from pykvm.memory import PAGE_SIZE

if TYPE_CHECKING:
    from pykvm.abi.library import CData
    from pykvm.machine.dirty import Gfns
    from pykvm.memory import GuestMemory

_dirty_log = lib.pykvm_dirty_log
_MOST_WORD = 64
"""The pages of one word of a bitmap: pykvm_dirty_log wants room for them before it takes the word on."""
_FEW = 512
"""Gfns that are copied out of the kept array; more go out as they are, and a new array is made."""
_SPARE = 64
"""How many times _FEW the kept array may have room for before it is given up for a small one."""

_LOG_REFUSALS: Refusals = {
    errno.ENOENT: (
        LoggingDisabledError,
        "the slot is gone or does not log; set SlotFlags.LOG_DIRTY_PAGES first.",
    ),
    errno.ENXIO: (
        DirtyRingModeError,
        "this VM uses dirty rings, which replace the bitmap; use collect_rings instead.",
    ),
}


class MemorySlot:
    """A live memslot of a real VM; see pykvm.machine.Slot.

    SAFETY: KVM keeps the host address as long as the slot exists.  The slot pins its GuestMemory, and lets
    go only after the kernel has deleted the slot or destroyed the VM.
    """

    def __init__(
        self,
        vm: VmMemory,
        slot_id: int,
        gpa: int,
        size: int,
        flags: SlotFlags,
        memory: GuestMemory,
        offset: int,
    ) -> None:
        self.owner: VmMemory | None = vm
        """The slot's VM; None when the slot is gone."""
        self.id = slot_id
        self.gpa = gpa
        self.size = size
        self.flags = flags
        self.memory = memory
        self.memory_offset = offset
        self.host_address = 0
        self.guest_memfd: tuple[int, int] | None = None
        self.frames = SlotFrames(self.base_gfn, self.npages)
        """Another object after each move, so that older ring entries can be told from newer ones."""
        self.log_lock = threading.Lock()
        self.log: LogBuffer | None = None

    @property
    def alive(self) -> bool:
        return self.owner is not None

    @property
    def base_gfn(self) -> int:
        return self.gpa // PAGE_SIZE

    @property
    def npages(self) -> int:
        return self.size // PAGE_SIZE

    @property
    def vm(self) -> VmMemory:
        """The slot's VM.  Raises ClosedError when the slot is gone."""
        vm = self.owner
        if vm is None:
            raise self.closed_error()
        return vm

    def closed_error(self) -> ClosedError:
        """To raise when the slot is used after its end."""
        return ClosedError(f"Slot {self.id} was deleted; create a new one.")

    def set_flags(self, flags: SlotFlags) -> None:
        self.vm.change_slot(self, self.gpa, SlotFlags(flags))

    def move(self, gpa: int) -> None:
        self.vm.change_slot(self, gpa, self.flags)

    def delete(self) -> None:
        self.vm.delete_slot(self)

    def retire(self) -> None:
        """The kernel no longer uses the memory: let it go."""
        if self.owner is not None:
            self.owner = None
            self.memory.unpin()

    def __repr__(self) -> str:
        state = "" if self.alive else " (deleted)"
        return f"<MemorySlot {self.id} [{self.gpa:#x}, {self.gpa + self.size:#x}) {self.flags!r}{state}>"


class LogBuffer:
    """Where a slot's dirty bitmap is fetched to.

    It is kept, since a fresh one for each call would be page-faulted in anew: 2 MiB for 64 GiB.

    SAFETY: the kernel writes ceil(npages / 64) words, exactly the size of ``words``, which ``request`` points
    to and this object keeps alive.
    """

    def __init__(self, slot: MemorySlot) -> None:
        self.words: npt.NDArray[np.uint64] = np.zeros((slot.npages + 63) // 64, dtype=np.uint64)
        self.pointer = ffi.from_buffer("__u64[]", self.words)
        self.request = ffi.new("struct pykvm_dirty_log *")
        self.request.slot = slot.id
        self.request.words = len(self.words)
        self.request.base_gfn = slot.base_gfn
        self.request.bitmap = self.pointer
        self._make_room(0)

    def _make_room(self, pages: int) -> None:
        """Have an array for a log of ``pages`` and some more; what is not written costs nothing."""
        self._room = pages + pages // 8 + _MOST_WORD
        self._found: Gfns = np.empty(self._room, dtype=np.uint64)
        self._found_pointer = ffi.from_buffer("__u64[]", self._found)

    def gfns(self, vm: CData) -> Gfns | int:
        """Fetch the log: its gfns, ascending, or the error of the ioctl.  The caller holds ``log_lock``."""
        # SAFETY: C writes at most ``_room`` gfns into the array, which this object holds.
        count = _dirty_log(vm, self.request, self._found_pointer, self._room)
        fits = count <= self._room - _MOST_WORD
        if count <= _FEW and fits:
            if count < 0:
                return count
            # A copy costs less than an array of its own for the next log.
            few = self._found[:count].copy()
            if self._room > _SPARE * _FEW:
                self._make_room(count)
            return few
        if fits:
            gfns = self._found[:count]
        else:
            gfns = np.empty(count, dtype=np.uint64)
            lib.pykvm_bitmap_to_gfns(
                self.pointer, len(self.words), self.request.base_gfn, ffi.from_buffer("__u64[]", gfns)
            )
        self._make_room(count)
        return gfns


class VmMemory(Managed):
    """The part of a VM that deals with memslots and their dirty bitmaps."""

    def __init__(self, fd: int) -> None:
        super().__init__(self.new_handle(fd))
        self._slots: dict[int, MemorySlot] = {}
        self._slots_lock = threading.RLock()

    @property
    def slots(self) -> Mapping[int, Slot]:
        """Live slots by id (a read-only view)."""
        return MappingProxyType(self._slots)

    # --- the two ioctls --------------------------------------------------------------------------

    def set_user_memory_region(self, slot: int, flags: int, gpa: int, size: int, host_address: int) -> None:
        """KVM_SET_USER_MEMORY_REGION (api.rst 4.35) as it is; size 0 deletes.

        Raises SlotOverlapError, SlotAlignmentError, SlotChangeError, SlotAbsentError, SlotError.  Nothing
        keeps the memory alive or the address valid here: use ``create_slot`` unless that is the point.
        """
        region = ffi.new("struct kvm_userspace_memory_region *")
        self._fill(region, slot, flags, gpa, size, host_address)
        refusals = self._refusals(slot, flags, gpa, size, host_address)
        self.ioctl(lib.KVM_SET_USER_MEMORY_REGION, region, "KVM_SET_USER_MEMORY_REGION", refusals)

    def set_user_memory_region2(
        self,
        slot: int,
        flags: int,
        gpa: int,
        size: int,
        host_address: int,
        guest_memfd: int = 0,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2 (api.rst 4.140, KVM_CAP_USER_MEMORY2): as above, plus guest_memfd.

        The guest_memfd fields count only with KVM_MEM_GUEST_MEMFD (4) in ``flags``.
        """
        region = ffi.new("struct kvm_userspace_memory_region2 *")
        self._fill(region, slot, flags, gpa, size, host_address)
        region.guest_memfd = guest_memfd
        region.guest_memfd_offset = guest_memfd_offset
        refusals = self._refusals(slot, flags, gpa, size, host_address)
        self.ioctl(lib.KVM_SET_USER_MEMORY_REGION2, region, "KVM_SET_USER_MEMORY_REGION2", refusals)

    @staticmethod
    def _fill(region: object, slot: int, flags: int, gpa: int, size: int, host_address: int) -> None:
        values = {
            "slot": (slot, 32),
            "flags": (flags, 32),
            "guest_phys_addr": (gpa, 64),
            "memory_size": (size, 64),
            "userspace_addr": (host_address, 64),
        }
        for name, (value, bits) in values.items():
            if not 0 <= value < 1 << bits:
                raise UsageError(f"{name} {value:#x} does not fit in {bits} bits.")
            setattr(region, name, value)

    def _refusals(self, slot: int, flags: int, gpa: int, size: int, host_address: int) -> Refusals:
        """Why the kernel would refuse this slot, in the kernel's order."""
        old = self._slots.get(slot)
        kind: type[KvmError]
        if (gpa | size | host_address) % PAGE_SIZE:
            kind, why = SlotAlignmentError, "guest address, size and host address must be multiples of 4096."
        elif size == 0 and old is None:
            kind, why = SlotAbsentError, f"there is no slot {slot} to delete."
        elif old and (old.size, old.host_address) != (size, host_address):
            kind, why = (
                SlotChangeError,
                "a live slot keeps its size and memory; delete it and create another.",
            )
        elif old and (int(old.flags) ^ flags) & lib.KVM_MEM_READONLY:
            kind, why = (
                SlotChangeError,
                "READONLY of a live slot cannot change; delete it and create another.",
            )
        else:
            kind = SlotError
            why = (
                f"slot id {slot}, flags {flags:#x} or the range [{gpa:#x}, {gpa + size:#x}) is beyond what "
                "this host allows (KVM_CAP_NR_MEMSLOTS, KVM_CAP_MULTI_ADDRESS_SPACE, MAXPHYADDR, 2^31-1 "
                "pages)."
            )
        return {
            errno.EINVAL: (kind, why),
            errno.EEXIST: (SlotOverlapError, f"[{gpa:#x}, {gpa + size:#x}) overlaps another slot; move one."),
        }

    # --- slots as objects ------------------------------------------------------------------------

    def create_slot(
        self,
        memory: GuestMemory,
        gpa: int,
        *,
        size: int | None = None,
        memory_offset: int = 0,
        slot_id: int | None = None,
        flags: SlotFlags = SlotFlags.NONE,
        guest_memfd: tuple[int, int] | None = None,
    ) -> MemorySlot:
        """Show ``memory`` to the guest at ``gpa``; see pykvm.machine.Machine.create_slot.

        ``slot_id`` defaults to the lowest free one of address space 0.  ``guest_memfd`` is (descriptor,
        offset) and needs KVM_CAP_GUEST_MEMFD; the ioctl is then KVM_SET_USER_MEMORY_REGION2.
        """
        size = memory.size - memory_offset if size is None else size
        if memory_offset < 0 or size <= 0 or memory_offset + size > memory.size:
            raise UsageError(
                f"The slot's {size:#x} bytes from offset {memory_offset:#x} on are outside its memory of "
                f"{memory.size:#x} bytes."
            )
        with self._slots_lock:
            if slot_id is None:
                slot_id = next(n for n in range(1 << 16) if n not in self._slots)
            elif slot_id in self._slots:
                raise UsageError(f"Slot {slot_id} exists; change it through its own methods.")
            slot = MemorySlot(self, slot_id, gpa, size, SlotFlags(flags), memory, memory_offset)
            slot.host_address = memory.pin() + memory_offset
            slot.guest_memfd = guest_memfd
            try:
                with self._slot_change():
                    self._set(slot, gpa, SlotFlags(flags))
                    self._slots[slot_id] = slot
            except PykvmError:
                memory.unpin()  # after anything else (Ctrl-C) the kernel may have the slot: its memory stays
                raise
            return slot

    def _set(self, slot: MemorySlot, gpa: int, flags: SlotFlags, size: int | None = None) -> None:
        size = slot.size if size is None else size
        if slot.guest_memfd is None:
            self.set_user_memory_region(slot.id, int(flags), gpa, size, slot.host_address)
        else:
            self.set_user_memory_region2(
                slot.id, int(flags) | lib.KVM_MEM_GUEST_MEMFD, gpa, size, slot.host_address, *slot.guest_memfd
            )

    def change_slot(self, slot: MemorySlot, gpa: int, flags: SlotFlags) -> None:
        """Move a slot or change its flags (one of both, as the kernel demands)."""
        with self._slots_lock:
            if not slot.alive:
                raise slot.closed_error()
            moves = gpa != slot.gpa
            with self._slot_change() if moves else contextlib.nullcontext(), slot.log_lock:
                self._set(slot, gpa, flags)
                if moves:
                    slot.gpa = gpa
                    slot.frames = SlotFrames(slot.base_gfn, slot.npages)
                    slot.log = None
                slot.flags = flags
                if not flags & SlotFlags.LOG_DIRTY_PAGES:
                    slot.log = None

    def delete_slot(self, slot: MemorySlot) -> None:
        """Remove a slot; dirty bits that nobody fetched are lost."""
        with self._slots_lock:
            if not slot.alive:
                raise ClosedError(f"Slot {slot.id} was deleted already.")
            # Deletion is a region of size 0; the other fields do not matter but stay what they were.
            region = ffi.new("struct kvm_userspace_memory_region *")
            self._fill(region, slot.id, 0, slot.gpa, 0, slot.host_address)
            # SAFETY: not while KVM_GET_DIRTY_LOG is under way with a buffer of this slot's size: a larger
            # slot that takes over the id would have the kernel write past its end.
            with self._slot_change(), slot.log_lock:
                self.ioctl(lib.KVM_SET_USER_MEMORY_REGION, region, "KVM_SET_USER_MEMORY_REGION")
                del self._slots[slot.id]
                slot.retire()

    @contextlib.contextmanager
    def _slot_change(self) -> Iterator[None]:
        """Held while the kernel's slots and ours may differ; ring mode has to know (see rings.py)."""
        yield

    # --- the dirty bitmap ------------------------------------------------------------------------

    def _own(self, slot: Slot) -> MemorySlot:
        if isinstance(slot, MemorySlot):
            if slot.owner is self:
                return slot
            if slot.owner is None:
                raise slot.closed_error()
        raise UsageError("The slot belongs to another machine.")

    def get_dirty_bitmap(self, slot: Slot) -> npt.NDArray[np.uint64]:
        """KVM_GET_DIRTY_LOG (api.rst 4.8) as 64-bit words.

        Clears and re-protects unless manual protection is on.  Raises LoggingDisabledError,
        DirtyRingModeError, ClosedError.
        """
        with self._own(slot).log_lock:
            own = self._own(slot)
            log = own.log or self._new_log(own)
            request = ffi.new("struct kvm_dirty_log *")
            request.slot = own.id
            request.dirty_bitmap = log.pointer
            self.ioctl(lib.KVM_GET_DIRTY_LOG, request, "KVM_GET_DIRTY_LOG", _LOG_REFUSALS)
            return log.words.copy()

    def get_dirty_log(self, slot: Slot) -> Gfns:
        """KVM_GET_DIRTY_LOG as ascending gfns; otherwise as ``get_dirty_bitmap``."""
        own = self._own(slot)
        with own.log_lock:
            if own.owner is not self:
                raise own.closed_error()
            gfns = (own.log or self._new_log(own)).gfns(self._handle)
        if isinstance(gfns, int):
            raise self._error(gfns, "KVM_GET_DIRTY_LOG", _LOG_REFUSALS)
        return gfns

    @staticmethod
    def _new_log(slot: MemorySlot) -> LogBuffer:
        slot.log = LogBuffer(slot)
        return slot.log

    def clear_dirty_log(self, slot: Slot, first_page: int, pages: int, words: npt.NDArray[np.uint64]) -> None:
        """KVM_CLEAR_DIRTY_LOG (api.rst 4.117, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).

        Clears and re-protects the set bits of ``words``, bit 0 being ``first_page`` of the slot.  Raises
        ClearRangeError, LoggingDisabledError, DirtyRingModeError; UsageError where ``words`` is too short.
        """
        own = self._own(slot)
        if not (0 <= first_page < 1 << 64 and 0 <= pages < 1 << 32):
            raise UsageError("first_page or pages is negative or too large.")
        words = np.ascontiguousarray(words, dtype=np.uint64)
        if len(words) < (pages + 63) // 64:
            raise UsageError(f"{pages} pages need {(pages + 63) // 64} words of bitmap, not {len(words)}.")
        log = ffi.new("struct kvm_clear_dirty_log *")
        log.slot = own.id
        log.first_page = first_page
        log.num_pages = pages
        # SAFETY: ``words`` is held by this frame and long enough; the kernel only reads it.
        log.dirty_bitmap = ffi.cast("void *", words.ctypes.data)
        refusals: Refusals = {
            **_LOG_REFUSALS,
            errno.EINVAL: (
                ClearRangeError,
                "first_page must be a multiple of 64, and so must the page count unless the range ends with "
                f"the slot's {own.npages} pages.",
            ),
        }
        # The lock keeps the id this slot's until the marks are cleared.
        with own.log_lock:
            if own.owner is not self:
                raise own.closed_error()
            self.ioctl(lib.KVM_CLEAR_DIRTY_LOG, log, "KVM_CLEAR_DIRTY_LOG", refusals)
