"""What a machine is, whoever implements it: the interface of the real KVM and of the reference model.

Everything above this room (guests, trackers, migration, reports, commands) knows only these Protocols, so
whatever runs on one runs on the other.  Semantics, errors and limits are those of KVM's documentation
(``api.rst``); the implementations add only what is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntFlag
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from pykvm.machine.dirty import DirtyPages, Gfns, distinct
from pykvm.machine.exits import Exit
from pykvm.machine.statistics import Statistics
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import Registers, SpecialRegisters

if TYPE_CHECKING:
    from pykvm.machine.state import MachineState, VcpuState
    from pykvm.memory import GuestMemory


class SlotFlags(IntFlag):
    """Flags of a memslot (api.rst 4.35)."""

    NONE = 0
    LOG_DIRTY_PAGES = 1
    READONLY = 2


class Slot(Protocol):
    """A memslot: ``size`` bytes of ``memory`` from ``memory_offset`` on, seen by the guest at ``gpa``."""

    @property
    def id(self) -> int: ...
    @property
    def gpa(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def flags(self) -> SlotFlags: ...
    @property
    def memory(self) -> GuestMemory: ...
    @property
    def memory_offset(self) -> int: ...
    @property
    def alive(self) -> bool:
        """False once the slot was deleted or its machine closed."""

    def set_flags(self, flags: SlotFlags) -> None:
        """Change LOG_DIRTY_PAGES; READONLY of a live slot cannot change (SlotChangeError)."""

    def move(self, gpa: int) -> None:
        """Let the guest see the memory at another address.

        The dirty bitmap moves along; ring entries pushed before are dropped and counted as stale.  Either way
        treat all of its pages as written.
        """

    def delete(self) -> None:
        """Remove the slot; dirty bits that nobody fetched are lost (api.rst 4.35)."""


class RingEntries(NamedTuple):
    """Entries of one vCPU's dirty ring in the order KVM pushed them, with repeats.

    ``slots`` are ids, ``offsets`` page offsets into the slot; both arrays have the same length.
    """

    vcpu: int
    slots: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.uint64]


class SlotFrames(NamedTuple):
    """Where a slot's pages are: what turns a ring entry's offset into a gfn."""

    base_gfn: int
    pages: int


class RingHarvest:
    """Everything harvested and reset by one ``collect_rings``.

    ``entries`` are the raw entries per vCPU in KVM's order.  What they mean is worked out when first asked
    for: a harvest takes 50 ns an entry, most of it KVM's, and nothing here may slow that down.
    """

    def __init__(self, batches: Sequence[tuple[RingEntries, Mapping[int, SlotFrames]]] = ()) -> None:
        """``batches``: entries, none of them empty, and by id the slots that they still denote pages of."""
        self.entries = tuple(entries for entries, _ in batches)
        self._batches = batches

    @property
    def batches(self) -> Sequence[tuple[RingEntries, Mapping[int, SlotFrames]]]:
        """What it was made of, for somebody who knows the slots by other names."""
        return self._batches

    @property
    def stale(self) -> int:
        """Entries of slots that were deleted or moved after KVM pushed them: they denote nothing any more."""
        return self._resolved[1]

    @property
    def pages(self) -> DirtyPages:
        """The distinct pages."""
        return self._resolved[0]

    @cached_property
    def _resolved(self) -> tuple[DirtyPages, int]:
        marks: dict[int, list[Gfns]] = {}
        stale = 0
        for entries, slots in self._batches:
            ids = entries.slots
            first = int(ids[0])
            same = bool((ids == first).all())
            for slot_id in (first,) if same else np.unique(ids).tolist():
                offsets = entries.offsets if same else entries.offsets[ids == slot_id]
                frames = slots.get(slot_id)
                if frames is None:
                    stale += len(offsets)
                    continue
                if int(offsets.max()) >= frames.pages:
                    inside = offsets < frames.pages
                    stale += int(len(offsets) - inside.sum())
                    offsets = offsets[inside]
                marks.setdefault(slot_id, []).append(offsets + np.uint64(frames.base_gfn))
        pages = {
            slot: distinct(parts[0] if len(parts) == 1 else np.concatenate(parts))
            for slot, parts in marks.items()
        }
        return DirtyPages(pages), stale


class Vcpu(Protocol):
    """A virtual CPU.  One thread at a time may be inside it: others get BusyError, except ``kick``."""

    @property
    def id(self) -> int: ...
    @property
    def running(self) -> bool:
        """Whether a thread is inside ``run`` right now."""

    def run(self) -> Exit:
        """Run the guest on the calling thread until it needs its host, and say why it stopped.

        Raises ClosedError, BusyError, KvmError.  EINTR is handled inside; Python signal handlers run.
        """

    def reply(self, data: bytes) -> None:
        """The answer to the IoIn or MmioRead that ``run`` just returned; its length is the exit's."""

    def kick(self, wait: float | None = None) -> None:
        """From any thread: make the current run, or else the next one, return Kicked.  Exactly one does.

        With ``wait`` (seconds) a vCPU that is not running is left alone, and for one that is the call
        returns only after it left the guest; GuestTimeoutError if it does not in time.
        """

    def listen(self, ports: Iterable[int] | None) -> None:
        """Which I/O ports make ``run`` return; None (the default) means all.

        Others are answered inside: OUT is dropped, IN reads all ones, as on a bus where nobody answers.
        """

    def get_registers(self) -> Registers: ...
    def set_registers(self, registers: Registers) -> None: ...
    def get_special_registers(self) -> SpecialRegisters: ...
    def set_special_registers(self, registers: SpecialRegisters) -> None: ...
    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None: ...

    def save_state(self) -> VcpuState:
        """Everything that another vCPU needs to go on from here; completes a pending I/O first."""

    def load_state(self, state: VcpuState) -> None: ...
    def statistics(self) -> Statistics: ...
    def close(self) -> None: ...


class Machine(Protocol):
    """A virtual machine: memslots, vCPUs, dirty logging.  A context manager; closing closes its vCPUs."""

    @property
    def backend(self) -> str:
        """``kvm`` or ``model``."""

    @property
    def slots(self) -> Mapping[int, Slot]:
        """Live slots by id."""

    @property
    def vcpus(self) -> Sequence[Vcpu]: ...

    @property
    def ring_entries(self) -> int:
        """Entries of each vCPU's dirty ring; 0 in bitmap mode."""

    @property
    def supported_cpuid(self) -> Sequence[CpuidEntry]:
        """What the host can give a guest (KVM_GET_SUPPORTED_CPUID)."""

    def create_slot(
        self,
        memory: GuestMemory,
        gpa: int,
        *,
        size: int | None = None,
        memory_offset: int = 0,
        slot_id: int | None = None,
        flags: SlotFlags = SlotFlags.NONE,
    ) -> Slot:
        """Show ``memory`` to the guest at ``gpa``; ``size`` defaults to all behind ``memory_offset``.

        gpa, size and offset in bytes, multiples of 4096.  Raises SlotOverlapError, SlotAlignmentError,
        UsageError, KvmError.
        """

    def create_vcpu(self, vcpu_id: int | None = None) -> Vcpu: ...

    def enable_dirty_ring(self, entries: int) -> None:
        """Dirty rings instead of bitmaps; before the first vCPU.  Raises RingSizeError, RingOrderError."""

    def enable_manual_protect(self, initially_set: bool = False) -> None:
        """GET only reads, CLEAR re-protects (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, api.rst 7.18)."""

    def get_dirty_bitmap(self, slot: Slot) -> npt.NDArray[np.uint64]:
        """The slot's dirty bitmap as 64-bit words, bit 0 of word 0 being its first page (api.rst 4.8)."""

    def get_dirty_log(self, slot: Slot) -> Gfns:
        """The slot's dirty pages as ascending gfns.  Raises LoggingDisabledError, DirtyRingModeError."""

    def clear_dirty_log(self, slot: Slot, first_page: int, pages: int, words: npt.NDArray[np.uint64]) -> None:
        """KVM_CLEAR_DIRTY_LOG (api.rst 4.117) for pages [first_page, first_page+pages) of the slot.

        first_page is a multiple of 64, so is pages unless the range ends with the slot.  Raises
        ClearRangeError, LoggingDisabledError, DirtyRingModeError.
        """

    def collect_rings(self, vcpus: Iterable[Vcpu] | None = None) -> RingHarvest:
        """Harvest the rings (of ``vcpus``, by default all), reset them, then yield what was harvested.

        Only after the reset may the contents of the pages be read (api.rst 8.29), hence no way to have
        the pages before it.  Raises RingOverflowError when entries were or may have been overwritten.
        """

    def statistics(self) -> Statistics: ...
    def save_state(self) -> MachineState: ...
    def load_state(self, state: MachineState) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class System(Protocol):
    """A source of machines: /dev/kvm, or the model."""

    @property
    def backend(self) -> str:
        """``kvm`` or ``model``."""

    @property
    def description(self) -> str:
        """Which backend this is and why it was chosen, in a few words."""

    def create_machine(self) -> Machine: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
