"""Memslots of the model and what the guest sees through them (api.rst 4.35, docs/reference/kvm-mmu.md, 2).

Refusals are KVM's, in its order of checks.  Nothing here follows the size of a slot but its dirty bitmap,
whose untouched parts the host does not provide either.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Final, NamedTuple

from pykvm.errors import (
    ClosedError,
    KvmError,
    PykvmError,
    SlotAlignmentError,
    SlotChangeError,
    SlotError,
    SlotOverlapError,
    UsageError,
)
from pykvm.machine.protocols import Slot, SlotFlags, SlotFrames
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.model.dirtylog import DirtyBitmap
from pykvm.model.schedule import Schedule

MAX_SLOTS: Final = 32764  # KVM_USER_MEM_SLOTS
_MAX_PAGES: Final = (1 << 31) - 1
_FRAMES_KEPT: Final = 1 << 17
_OPERATION: Final = "KVM_SET_USER_MEMORY_REGION"
_KNOWN_FLAGS: Final = SlotFlags.LOG_DIRTY_PAGES | SlotFlags.READONLY


class Frame(NamedTuple):
    """A guest frame: its bytes, and which page of which slot it is."""

    page: memoryview
    slot: ModelSlot
    number: int


class ModelSlot:
    """A live memslot of the model; see pykvm.machine.Slot.  It pins its GuestMemory."""

    def __init__(
        self,
        machine: MachineMemory,
        slot_id: int,
        gpa: int,
        size: int,
        flags: SlotFlags,
        memory: GuestMemory,
        offset: int,
    ) -> None:
        self.owner: MachineMemory | None = machine
        """The slot's machine; None when the slot is gone."""
        self.id = slot_id
        self.gpa = gpa
        self.size = size
        self.flags = flags
        self.memory = memory
        self.memory_offset = offset
        self.bytes = memoryview(b"")
        self.userspace_addr = 0
        """The host address of its memory."""
        self.frames = SlotFrames(gpa // PAGE_SIZE, size // PAGE_SIZE)
        """Another object after each move, so that older ring entries can be told from newer ones."""
        self.bitmap: DirtyBitmap | None = None
        self.written: set[int] = set()
        """In ring mode, the pages whose writes need no further entry until they are reset."""

    @property
    def alive(self) -> bool:
        return self.owner is not None

    @property
    def npages(self) -> int:
        return self.size // PAGE_SIZE

    @property
    def machine(self) -> MachineMemory:
        """The slot's machine.  Raises ClosedError when the slot is gone."""
        if self.owner is None:
            raise self.closed_error()
        return self.owner

    def closed_error(self) -> ClosedError:
        """To raise when the slot is used after its end."""
        return ClosedError(f"Slot {self.id} was deleted; create a new one.")

    def set_flags(self, flags: SlotFlags) -> None:
        self.machine.change_slot(self, self.gpa, SlotFlags(flags))

    def move(self, gpa: int) -> None:
        self.machine.change_slot(self, gpa, self.flags)

    def delete(self) -> None:
        self.machine.delete_slot(self)

    def retire(self) -> None:
        """Nobody uses the memory any more: let it go."""
        if self.owner is not None:
            self.owner = None
            self.bytes = memoryview(b"")
            self.memory.unpin()

    def __repr__(self) -> str:
        state = "" if self.alive else " (deleted)"
        return f"<ModelSlot {self.id} [{self.gpa:#x}, {self.gpa + self.size:#x}) {self.flags!r}{state}>"


class MachineMemory(ABC):
    """The part of a machine that deals with memslots.

    ``highest_end`` is where the last slot may end.
    """

    highest_end: ClassVar[int] = 1 << 52

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.ring_entries = 0
        self.initially_set = False
        self._closed = False
        self._slots: dict[int, ModelSlot] = {}
        self._bases: list[int] = []
        self._sorted: list[ModelSlot] = []
        self._frames: dict[int, Frame] = {}

    @property
    def name(self) -> str:
        return "The VM"

    @property
    def closed(self) -> bool:
        return self._closed

    def require_open(self) -> None:
        """Raises ClosedError."""
        if self._closed:
            raise ClosedError(f"{self.name} is closed; create a new one.")

    @property
    def slots(self) -> Mapping[int, Slot]:
        """Live slots by id (a read-only view)."""
        return MappingProxyType(self._slots)

    @abstractmethod
    def memory_changed(self) -> None:
        """Slots changed: every processor forgets what it knows of memory."""

    @abstractmethod
    def slot_created(self, slot: ModelSlot) -> None:
        """A slot is about to appear; KvmError if it may not."""

    @abstractmethod
    def slot_changed(self, slot: ModelSlot, gpa: int, flags: SlotFlags) -> None:
        """A slot is about to move or to have other flags; KvmError if it may not."""

    @abstractmethod
    def slot_deleted(self, slot: ModelSlot) -> None:
        """A slot is about to go."""

    # --- frames ------------------------------------------------------------------------------------------

    def frame(self, gfn: int) -> Frame | None:
        """What the guest sees at a frame; None in a hole."""
        found = self._frames.get(gfn)
        if found is not None:
            return found
        at = bisect_right(self._bases, gfn) - 1
        if at < 0:
            return None
        slot = self._sorted[at]
        index = gfn - slot.frames.base_gfn
        if index >= slot.frames.pages:
            return None
        if len(self._frames) >= _FRAMES_KEPT:
            self._frames.clear()
        start = index * PAGE_SIZE
        frame = self._frames[gfn] = Frame(slot.bytes[start : start + PAGE_SIZE], slot, index)
        return frame

    def aliases(self, gfn: int) -> tuple[int, ...]:
        """The frames with the same memory as this one, itself included: slots may share memory."""
        frame = self.frame(gfn)
        if frame is None:
            return (gfn,)
        memory, offset = frame.slot.memory, frame.slot.memory_offset + frame.number * PAGE_SIZE
        return tuple(
            slot.frames.base_gfn + (offset - slot.memory_offset) // PAGE_SIZE
            for slot in self._sorted
            if slot.memory is memory and slot.memory_offset <= offset < slot.memory_offset + slot.size
        )

    def _index(self) -> None:
        self._sorted = sorted(self._slots.values(), key=lambda slot: slot.frames.base_gfn)
        self._bases = [slot.frames.base_gfn for slot in self._sorted]
        self._frames.clear()
        self.memory_changed()

    # --- slots as objects --------------------------------------------------------------------------------

    def create_slot(
        self,
        memory: GuestMemory,
        gpa: int,
        *,
        size: int | None = None,
        memory_offset: int = 0,
        slot_id: int | None = None,
        flags: SlotFlags = SlotFlags.NONE,
    ) -> ModelSlot:
        """Show ``memory`` to the guest at ``gpa``; see pykvm.machine.Machine.create_slot.

        ``slot_id`` defaults to the lowest free one.
        """
        size = memory.size - memory_offset if size is None else size
        if memory_offset < 0 or size <= 0 or memory_offset + size > memory.size:
            raise UsageError(
                f"The slot's {size:#x} bytes from offset {memory_offset:#x} on are outside its memory of "
                f"{memory.size:#x} bytes."
            )
        if not 0 <= gpa < 1 << 64:
            raise UsageError(f"guest_phys_addr {gpa:#x} does not fit in 64 bits.")
        flags = SlotFlags(flags)
        with self.schedule.visit():
            self.require_open()
            if slot_id is None:
                slot_id = next(n for n in range(1 << 16) if n not in self._slots)
            elif slot_id in self._slots:
                raise UsageError(f"Slot {slot_id} exists; change it through its own methods.")
            address = memory.pin()
            try:
                self._check_new(slot_id, gpa, size, memory_offset, flags)
                slot = ModelSlot(self, slot_id, gpa, size, flags, memory, memory_offset)
                slot.userspace_addr = address + memory_offset
                slot.bytes = memory.view(memory_offset, size).data
                self.slot_created(slot)
            except PykvmError:
                memory.unpin()
                raise
            self._log(slot, flags)
            self._slots[slot_id] = slot
            self._index()
            return slot

    def change_slot(self, slot: ModelSlot, gpa: int, flags: SlotFlags) -> None:
        """Move a slot or change its flags (one of both, as with KVM)."""
        if not 0 <= gpa < 1 << 64:
            raise UsageError(f"guest_phys_addr {gpa:#x} does not fit in 64 bits.")
        with self.schedule.visit():
            if not slot.alive:
                raise slot.closed_error()
            self._check_region(slot.id, gpa, slot.size, slot.memory_offset, flags)
            if (slot.flags ^ flags) & SlotFlags.READONLY:
                raise SlotChangeError(
                    errno.EINVAL,
                    _OPERATION,
                    "READONLY of a live slot cannot change; delete it and create another.",
                )
            if gpa != slot.gpa:
                self._check_overlap(gpa, slot.size, slot)
            if gpa != slot.gpa or flags != slot.flags:
                self.slot_changed(slot, gpa, flags)
            if gpa != slot.gpa:
                slot.gpa = gpa
                slot.frames = SlotFrames(gpa // PAGE_SIZE, slot.npages)
                slot.written.clear()
                self._index()
            elif flags != slot.flags:
                self._log(slot, flags)
                slot.flags = flags
                self.memory_changed()

    def delete_slot(self, slot: ModelSlot) -> None:
        """Remove a slot; dirty bits that nobody fetched are lost."""
        with self.schedule.visit():
            if not slot.alive:
                raise ClosedError(f"Slot {slot.id} was deleted already.")
            self.slot_deleted(slot)
            del self._slots[slot.id]
            slot.retire()
            self._index()

    def _log(self, slot: ModelSlot, flags: SlotFlags) -> None:
        """Logging begins with an empty log, or one of all pages; with its end the log is gone."""
        slot.written.clear()
        if not flags & SlotFlags.LOG_DIRTY_PAGES:
            slot.bitmap = None
        elif slot.bitmap is None and not self.ring_entries:
            slot.bitmap = DirtyBitmap(slot.npages, full=self.initially_set)

    # --- refusals ----------------------------------------------------------------------------------------

    def _check_new(self, slot_id: int, gpa: int, size: int, offset: int, flags: SlotFlags) -> None:
        if not 0 <= slot_id < 1 << 32:
            raise UsageError(f"slot {slot_id:#x} does not fit in 32 bits.")
        self._check_region(slot_id, gpa, size, offset, flags)
        self._check_overlap(gpa, size, None)

    def _check_region(self, slot_id: int, gpa: int, size: int, offset: int, flags: SlotFlags) -> None:
        kind: type[KvmError] = SlotError
        why = (
            f"slot id {slot_id}, flags {int(flags):#x} or the range [{gpa:#x}, {gpa + size:#x}) is beyond "
            "what the model allows (KVM_CAP_NR_MEMSLOTS: 32764, 52 address bits, 2^31-1 pages)."
        )
        if (gpa | size | offset) % PAGE_SIZE:
            kind = SlotAlignmentError
            why = "guest address, size and host address must be multiples of 4096."
        elif (
            not int(flags) & ~int(_KNOWN_FLAGS)
            and slot_id < MAX_SLOTS
            and gpa + size <= self.highest_end
            and size // PAGE_SIZE <= _MAX_PAGES
        ):
            return
        raise kind(errno.EINVAL, _OPERATION, why)

    def _check_overlap(self, gpa: int, size: int, but: ModelSlot | None) -> None:
        for other in self._slots.values():
            if other is not but and gpa < other.gpa + other.size and other.gpa < gpa + size:
                raise SlotOverlapError(
                    errno.EEXIST,
                    _OPERATION,
                    f"[{gpa:#x}, {gpa + size:#x}) overlaps another slot; move one.",
                )
