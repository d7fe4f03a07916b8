"""A memslot that is several: writable parts around read-only ones, and still one slot for everybody else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pykvm.errors import ClosedError
from pykvm.machine import Gfns, Slot, SlotFlags, SlotFrames
from pykvm.machine.dirty import distinct
from pykvm.memory import PAGE_SIZE

if TYPE_CHECKING:
    from pykvm.track.carved_memory import CarvedMemory


class Piece(NamedTuple):
    """``pages`` pages of a slot from page ``first`` on, in a memslot of their own."""

    first: int
    pages: int
    readonly: bool


def layout(pages: int, tracked: Iterable[int]) -> list[Piece]:
    """The fewest pieces of a slot of ``pages`` that are read-only exactly at the ``tracked`` ones."""
    pieces: list[Piece] = []
    at = 0
    for page in sorted(tracked):
        if page > at:
            pieces.append(Piece(at, page - at, readonly=False))
        if pieces and pieces[-1].readonly:
            pieces[-1] = Piece(pieces[-1].first, page + 1 - pieces[-1].first, readonly=True)
        else:
            pieces.append(Piece(page, 1, readonly=True))
        at = page + 1
    if at < pages:
        pieces.append(Piece(at, pages - at, readonly=False))
    return pieces


class DirtyPart:
    """What is dirty in a slot and in no bitmap of KVM's: page numbers within the slot.

    That is what was written to read-only pieces, and what the bitmaps of pieces held that are gone.
    """

    def __init__(self) -> None:
        self._marks: set[int] = set()
        self._kept: list[Gfns] = []

    def __bool__(self) -> bool:
        return bool(self._marks or self._kept)

    def mark(self, page: int) -> None:
        """The guest wrote the page."""
        self._marks.add(page)

    def keep(self, pages: Gfns) -> None:
        """These came out of a bitmap that does not tell them again."""
        if len(pages):
            self._kept.append(pages)

    def pages(self) -> Gfns:
        """All of them, ascending."""
        marks = np.fromiter(self._marks, dtype=np.uint64, count=len(self._marks))
        return distinct(np.concatenate((marks, *self._kept)))

    def clear(self) -> None:
        """Nothing is dirty any more."""
        self._marks.clear()
        self._kept.clear()

    def discard(self, pages: Gfns) -> None:
        """These are not dirty any more."""
        self._marks.difference_update(pages.tolist())
        left = [np.setdiff1d(kept, pages, assume_unique=True) for kept in self._kept]
        self._kept = [kept for kept in left if len(kept)]


class CarvedSlot:
    """A slot as everybody but KVM sees it; see pykvm.machine.Slot."""

    def __init__(self, machine: CarvedMemory, real: Slot) -> None:
        self.owner: CarvedMemory | None = machine
        """Its machine; None when the slot is gone."""
        self.id = real.id
        self.gpa = real.gpa
        self.size = real.size
        self.flags = real.flags
        self.memory = real.memory
        self.memory_offset = real.memory_offset
        self.bytes = real.memory.view(real.memory_offset, real.size)
        """The guest's memory here; the array keeps it mapped."""
        self.frames = SlotFrames(self.base_gfn, self.npages)
        """Another object after each move, so that older ring entries can be told from newer ones."""
        self.pieces: dict[Piece, Slot] = {Piece(0, self.npages, bool(real.flags & SlotFlags.READONLY)): real}
        self.counts: dict[int, int] = {}
        """By page of the slot, how often it is tracked."""
        self.dirty = DirtyPart()

    @property
    def alive(self) -> bool:
        return self.owner is not None

    @property
    def npages(self) -> int:
        return self.size // PAGE_SIZE

    @property
    def base_gfn(self) -> int:
        return self.gpa // PAGE_SIZE

    @property
    def readonly(self) -> bool:
        """Whether the slot is READONLY for everybody: its writes are a device's, not memory's."""
        return bool(self.flags & SlotFlags.READONLY)

    @property
    def logs(self) -> bool:
        return bool(self.flags & SlotFlags.LOG_DIRTY_PAGES)

    @property
    def whole(self) -> Slot | None:
        """The one slot of KVM's that this one is; None while it is several."""
        if len(self.pieces) > 1:
            return None
        ((piece, real),) = self.pieces.items()
        return real if piece.readonly == self.readonly else None

    @property
    def machine(self) -> CarvedMemory:
        """The slot's machine.  Raises ClosedError when the slot is gone."""
        if self.owner is None:
            raise ClosedError(f"Slot {self.id} was deleted; create a new one.")
        return self.owner

    def place(self, gpa: int) -> None:
        """Note that KVM moved it."""
        self.gpa = gpa
        self.frames = SlotFrames(self.base_gfn, self.npages)

    def set_flags(self, flags: SlotFlags) -> None:
        self.machine.change_flags(self, SlotFlags(flags))

    def move(self, gpa: int) -> None:
        self.machine.move_slot(self, gpa)

    def delete(self) -> None:
        self.machine.delete_slot(self)

    def __repr__(self) -> str:
        state = "" if self.alive else " (deleted)"
        return (
            f"<CarvedSlot {self.id} [{self.gpa:#x}, {self.gpa + self.size:#x}) in {len(self.pieces)} "
            f"pieces{state}>"
        )
