"""Memslots around tracked pages: which slots KVM has for the slots that everybody else sees."""

from __future__ import annotations

import contextlib
import errno
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from pykvm.errors import (
    ClosedError,
    PykvmError,
    RingOverflowError,
    SlotAbsentError,
    SlotChangeError,
    UsageError,
)
from pykvm.machine import MAX_TRACK_COUNT, Machine, RingEntries, Slot, SlotFlags, SlotFrames, TrackNode, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.track.carved_slot import CarvedSlot, Piece, layout
from pykvm.track.gate import Gate

TOP_SLOT: Final = 32763
"""Pieces get their ids from here downwards (KVM_USER_MEM_SLOTS - 1), where nobody else looks for one."""
NOWHERE: Final = 0xFFFFFFFF
"""The slot id of ring entries that denote nothing any more."""

RingBatch = tuple[RingEntries, Mapping[int, SlotFrames]]


class CarvedMemory(ABC):
    """The slots of ``machine``, which belongs to this object from now on: it deletes and makes slots there.

    Slot objects of the machine that exist already are dead once a page of theirs is tracked; use those in
    ``slots`` instead.
    """

    def __init__(self, machine: Machine) -> None:
        self.real = machine
        self.gate = Gate()
        self.initially_set = False
        """New bitmaps start all ones."""
        self.manual = False
        """KVM_GET_DIRTY_LOG only reads."""
        self._lock = threading.RLock()
        """Held by whoever changes slots or counts, collects, or applies a write and reports it.

        A vCPU's thread takes it only outside of the guest, so its holder may wait for vCPUs to come out.
        """
        self._slots = {slot_id: CarvedSlot(self, slot) for slot_id, slot in machine.slots.items()}
        self._nodes: list[TrackNode] = []
        self._harvested: list[RingBatch] = []
        """Entries that had to be taken out of the rings before their slots went."""
        self._marks: dict[int, dict[tuple[CarvedSlot, int], None]] = {}
        """In ring mode, by vCPU: writes to tracked pages that no ring has, in order and once each."""

    @property
    def slots(self) -> Mapping[int, Slot]:
        """Live slots by id (a read-only view): those that were asked for, not KVM's pieces of them."""
        return MappingProxyType(self._slots)

    # --- slots -------------------------------------------------------------------------------------------

    def create_slot(
        self,
        memory: GuestMemory,
        gpa: int,
        *,
        size: int | None = None,
        memory_offset: int = 0,
        slot_id: int | None = None,
        flags: SlotFlags = SlotFlags.NONE,
    ) -> CarvedSlot:
        """See pykvm.machine.Machine.create_slot."""
        with self._lock:
            if slot_id is not None and slot_id in self.real.slots and slot_id not in self._slots:
                raise UsageError(f"Slot id {slot_id} is in use for a tracked page; choose a lower one.")
            if slot_id is None:
                slot_id = next(
                    n for n in range(TOP_SLOT) if n not in self._slots and n not in self.real.slots
                )
            real = self.real.create_slot(
                memory, gpa, size=size, memory_offset=memory_offset, slot_id=slot_id, flags=flags
            )
            slot = self._slots[slot_id] = CarvedSlot(self, real)
            return slot

    def change_flags(self, slot: CarvedSlot, flags: SlotFlags) -> None:
        """Switch logging on or off; READONLY stays what it is, as KVM has it (kvm-mmu.md 2)."""
        with self._lock:
            self._require(slot)
            if (flags ^ slot.flags) & SlotFlags.READONLY:
                raise SlotChangeError(
                    errno.EINVAL,
                    "KVM_SET_USER_MEMORY_REGION",
                    "READONLY of a live slot cannot change; delete it and create another.",
                )
            for piece, real in slot.pieces.items():
                if slot.readonly or not piece.readonly:
                    real.set_flags(flags)
            if not flags & SlotFlags.LOG_DIRTY_PAGES:
                slot.dirty.clear()
            elif not slot.logs and self.initially_set and not self.real.ring_entries and slot.counts:
                slot.dirty.keep(np.array(sorted(slot.counts), dtype=np.uint64))
            slot.flags = flags

    def move_slot(self, slot: CarvedSlot, gpa: int) -> None:
        """Its counts are gone, as with any slot of KVM's that moves; the dirty bits move along.

        Nodes are told the old place after the move.  KVM itself refuses to move a slot while it has external
        users of tracking [>=6.12].
        """
        if gpa == slot.gpa:
            return
        with self._lock, self.gate.held():
            self._require(slot)
            counts, slot.counts = slot.counts, {}
            try:
                self._carve(slot)
                (real,) = slot.pieces.values()
                real.move(gpa)
            except PykvmError:
                slot.counts = counts
                self._carve(slot)
                raise
            old = slot.base_gfn
            slot.place(gpa)
            self._tell_removal(old, slot.npages)

    def delete_slot(self, slot: CarvedSlot) -> None:
        """Nodes are told first, when it is in nobody's sight any more."""
        with self._lock, self.gate.held():
            if not slot.alive:
                raise ClosedError(f"Slot {slot.id} was deleted already.")
            slot.owner = None
            del self._slots[slot.id]
            slot.counts.clear()
            try:
                self._tell_removal(slot.base_gfn, slot.npages)
            finally:
                for real in slot.pieces.values():
                    real.delete()

    @staticmethod
    def _require(slot: CarvedSlot) -> None:
        if not slot.alive:
            raise ClosedError(f"Slot {slot.id} was deleted; create a new one.")

    def _tell_removal(self, gfn: int, pages: int) -> None:
        for node in tuple(self._nodes):
            node.track_remove_region(gfn, pages)

    def slot_at(self, gfn: int) -> CarvedSlot | None:
        """The slot that shows the frame."""
        for slot in self._slots.values():
            if 0 <= gfn - slot.base_gfn < slot.npages:
                return slot
        return None

    # --- tracking ----------------------------------------------------------------------------------------

    def track_add_gfn(self, gfn: int) -> None:
        """See pykvm.machine.PageTracking; the slot is split where the page was not tracked yet."""
        with self._lock:
            slot = self._slot_of(gfn, "kvm_write_track_add_gfn")
            page = gfn - slot.base_gfn
            count = slot.counts.get(page, 0)
            if count >= MAX_TRACK_COUNT:
                raise UsageError(
                    f"gfn {gfn:#x} is tracked {count} times, the most that 16 bits count; remove one first."
                )
            slot.counts[page] = count + 1
            if count == 0:
                try:
                    self._carve(slot)
                except BaseException:
                    del slot.counts[page]
                    raise

    def track_remove_gfn(self, gfn: int) -> None:
        """See pykvm.machine.PageTracking."""
        with self._lock:
            slot = self._slot_of(gfn, "kvm_write_track_remove_gfn")
            page = gfn - slot.base_gfn
            count = slot.counts.get(page, 0)
            if count == 0:
                raise UsageError(f"gfn {gfn:#x} is not tracked; add it first.")
            if count > 1:
                slot.counts[page] = count - 1
                return
            del slot.counts[page]
            try:
                self._carve(slot)
            except BaseException:
                slot.counts[page] = count
                raise

    def _slot_of(self, gfn: int, operation: str) -> CarvedSlot:
        slot = self.slot_at(gfn)
        if slot is None:
            raise SlotAbsentError(errno.EINVAL, operation, f"gfn {gfn:#x} lies in no slot; create one first.")
        return slot

    def register_track_notifier(self, node: TrackNode) -> None:
        """See pykvm.machine.PageTracking."""
        with self._lock:
            if node in self._nodes:
                raise UsageError("The node is registered already; unregister it first.")
            self._nodes.insert(0, node)

    def unregister_track_notifier(self, node: TrackNode) -> None:
        """See pykvm.machine.PageTracking."""
        with self._lock:
            if node not in self._nodes:
                raise UsageError("The node is not registered.")
            self._nodes.remove(node)

    # --- pieces ------------------------------------------------------------------------------------------

    def _carve(self, slot: CarvedSlot) -> None:
        """Have the slot read-only exactly where it is tracked.

        Between deleting and making slots the guest would find a hole, so all vCPUs are outside meanwhile.
        """
        if slot.readonly:
            return
        wanted = layout(slot.npages, slot.counts)
        if slot.pieces.keys() == set(wanted):
            return
        if any(getattr(real, "guest_memfd", None) is not None for real in slot.pieces.values()):
            raise UsageError("KVM makes no slot with guest_memfd read-only; its pages cannot be tracked.")
        with self.gate.held():
            before = dict(slot.pieces)
            gone = {piece: real for piece, real in before.items() if piece not in wanted}
            self._rescue(slot, gone)
            try:
                for piece in gone:
                    slot.pieces.pop(piece).delete()
                self._make(slot, wanted)
            except BaseException:
                for piece in slot.pieces.keys() - before.keys():
                    slot.pieces.pop(piece).delete()
                self._make(slot, before)
                raise
            finally:
                slot.pieces = dict(sorted(slot.pieces.items()))

    def _make(self, slot: CarvedSlot, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece not in slot.pieces:
                slot.pieces[piece] = self._make_piece(slot, piece)

    def _make_piece(self, slot: CarvedSlot, piece: Piece) -> Slot:
        real = self.real.create_slot(
            slot.memory,
            slot.gpa + piece.first * PAGE_SIZE,
            size=piece.pages * PAGE_SIZE,
            memory_offset=slot.memory_offset + piece.first * PAGE_SIZE,
            slot_id=self._free_id(slot),
            flags=SlotFlags.READONLY if piece.readonly else slot.flags,
        )
        if self.initially_set and slot.logs and not piece.readonly and not self.real.ring_entries:
            # All ones would say that everything was written anew.
            words = self.real.get_dirty_bitmap(real)
            self.real.clear_dirty_log(real, 0, piece.pages, words)
        return real

    def _free_id(self, slot: CarvedSlot) -> int:
        used = self.real.slots
        if slot.id not in used:
            return slot.id
        return next(n for n in range(TOP_SLOT, -1, -1) if n not in used and n not in self._slots)

    def _rescue(self, slot: CarvedSlot, gone: Mapping[Piece, Slot]) -> None:
        """Take over the dirty state that goes with these pieces."""
        if not slot.logs:
            return
        if self.real.ring_entries:
            with contextlib.suppress(RingOverflowError):  # the next collection raises it again
                self._harvested += self.harvest()
            return
        for piece, real in gone.items():
            if not piece.readonly:
                self.fetch(slot, piece, real)

    def fetch(self, slot: CarvedSlot, piece: Piece, real: Slot) -> None:
        """KVM_GET_DIRTY_LOG of a piece into what we know of its slot."""
        pages = self.real.get_dirty_log(real) - np.uint64(slot.base_gfn)
        slot.dirty.keep(pages)

    @abstractmethod
    def harvest(self, vcpus: Iterable[Vcpu] | None = None) -> list[RingBatch]:
        """Empty the rings; entries under the ids of the slots that everybody sees."""
