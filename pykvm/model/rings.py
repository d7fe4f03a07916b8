"""Dirty rings of the model (api.rst 8.29, docs/reference/kvm-mmu.md, 4).

A page gets an entry in the ring of the vCPU that writes to it first, and the next one after its reset.  The
vCPU stops before its next instruction once the ring is full but for the reserve, which no single instruction
can use up: a ring never overflows here.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from pykvm.machine.protocols import RingEntries, SlotFrames

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pykvm.model.slots import ModelSlot

MIN_ENTRIES: Final = 256
MAX_ENTRIES: Final = 65536
RESERVED: Final = 64
"""KVM_DIRTY_RING_RSVD_ENTRIES: what lies between the soft limit and the size."""

Batch = tuple[RingEntries, "Mapping[int, SlotFrames]"]


class _Entry(NamedTuple):
    slot: int
    offset: int
    frames: SlotFrames


class DirtyRing:
    """One vCPU's ring."""

    def __init__(self, entries: int) -> None:
        self._limit = entries - RESERVED
        self._entries: list[_Entry] = []

    @property
    def full(self) -> bool:
        """At the soft limit or above."""
        return len(self._entries) >= self._limit

    def push(self, slot: ModelSlot, page: int) -> None:
        """The guest wrote to the page."""
        self._entries.append(_Entry(slot.id, page, slot.frames))

    def collect(self, vcpu: int, slots: Mapping[int, ModelSlot]) -> list[Batch]:
        """Take and reset all entries, in their order, with the slots that they still denote pages of."""
        entries, self._entries = self._entries, []
        now = {number: slot.frames for number, slot in slots.items()}
        batches: list[Batch] = []
        for fresh, group in groupby(entries, key=lambda entry: now.get(entry.slot) is entry.frames):
            part = list(group)
            if fresh:
                for entry in part:
                    slots[entry.slot].written.discard(entry.offset)
            batches.append(
                (
                    RingEntries(
                        vcpu,
                        np.array([entry.slot for entry in part], dtype=np.uint32),
                        np.array([entry.offset for entry in part], dtype=np.uint64),
                    ),
                    now if fresh else {},
                )
            )
        return batches
