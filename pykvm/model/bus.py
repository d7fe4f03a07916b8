"""What the processor sees of the rest of the machine."""

from __future__ import annotations

from typing import Protocol

from pykvm.machine.exits import MmioWrite


class Bus(Protocol):
    """Guest-physical memory and what lies in its holes.  The machine implements it."""

    def ram(self, gfn: int) -> memoryview | None:
        """The 4096 bytes behind a frame for reading; None in a hole."""

    def writable(self, gfn: int) -> memoryview | None:
        """The same for writing, after marking the frame dirty; None in a hole, in a READONLY slot, and for
        a watched frame.  Valid until ``Processor.flush_writable`` is called."""

    def write(self, gpa: int, data: bytes) -> list[MmioWrite]:
        """Store within one frame: memory and dirty log, or the exits that the store needs (8 bytes each at
        most).  Tells the watchers of the frame."""

    def set_entry(self, gpa: int, size: int, value: int) -> None:
        """Store a paging-structure entry whose A or D bit the walk changed: marks the frame dirty; nothing
        happens in a READONLY slot (docs/reference/kvm-mmu.md, 13.3)."""

    def watch(self, gfn: int) -> None:
        """Have every processor's ``watched_frame_changed`` called when the guest writes to the frame.

        Views of a frame that is watched anew are taken back: every processor's ``flush_writable`` is called.
        """
