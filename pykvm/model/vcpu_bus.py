"""What one vCPU sees of the machine: memory through the slots, with its writes logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.machine.exits import DirtyRingFull, MmioWrite
from pykvm.machine.protocols import SlotFlags
from pykvm.memory import PAGE_SIZE

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor
    from pykvm.model.machine import ModelMachine
    from pykvm.model.rings import DirtyRing
    from pykvm.model.slots import Frame

_OFFSET: Final = PAGE_SIZE - 1
_MMIO_BYTES: Final = 8


class VcpuBus:
    """The Bus of one processor; see pykvm.model.bus.Bus.  The memory is the machine's, the ring its own."""

    def __init__(self, machine: ModelMachine, ring: DirtyRing | None) -> None:
        self._machine = machine
        self._frame = machine.frame
        self._watched = machine.watched
        self.ring = ring
        self.cpu: Processor | None = None

    def ram(self, gfn: int) -> memoryview | None:
        frame = self._frame(gfn)
        return frame.page if frame is not None else None

    def writable(self, gfn: int) -> memoryview | None:
        frame = self._frame(gfn)
        if frame is None or frame.slot.flags & SlotFlags.READONLY or gfn in self._watched:
            return None
        self._log(frame)
        return frame.page

    def write(self, gpa: int, data: bytes) -> list[MmioWrite]:
        gfn = gpa >> 12
        frame = self._frame(gfn)
        if frame is None or frame.slot.flags & SlotFlags.READONLY:
            return [
                MmioWrite(gpa + at, data[at : at + _MMIO_BYTES]) for at in range(0, len(data), _MMIO_BYTES)
            ]
        offset = gpa & _OFFSET
        frame.page[offset : offset + len(data)] = data
        self._log(frame)
        if gfn in self._watched:
            self._machine.watched_frame_changed(gfn)
        return []

    def set_entry(self, gpa: int, size: int, value: int) -> None:
        frame = self._frame(gpa >> 12)
        if frame is None or frame.slot.flags & SlotFlags.READONLY:
            return
        offset = gpa & _OFFSET
        frame.page[offset : offset + size] = value.to_bytes(size, "little")
        self._log(frame)

    def watch(self, gfn: int) -> None:
        if gfn not in self._watched:
            self._machine.watch(gfn)

    def _log(self, frame: Frame) -> None:
        slot = frame.slot
        if not slot.flags & SlotFlags.LOG_DIRTY_PAGES:
            return
        if slot.bitmap is not None:
            slot.bitmap.mark(frame.number)
        elif self.ring is not None and frame.number not in slot.written:
            slot.written.add(frame.number)
            self.ring.push(slot, frame.number)
            if self.ring.full and self.cpu is not None:
                # It ends the processor's run after this instruction; what counts then is the ring itself.
                self.cpu.exits.append(DirtyRingFull())
