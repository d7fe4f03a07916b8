"""The machine of the model: slots, vCPUs, dirty logs, behind KVM's interface."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

from pykvm.errors import (
    CapabilityError,
    ClearRangeError,
    DirtyRingModeError,
    KvmError,
    LoggingDisabledError,
    RingOrderError,
    RingSizeError,
    UsageError,
)
from pykvm.machine.protocols import RingHarvest, Slot, SlotFlags, Vcpu
from pykvm.machine.statistics import Statistics
from pykvm.model import rings
from pykvm.model.dirtylog import DirtyBitmap
from pykvm.model.machine_state import MachineClock
from pykvm.model.schedule import Schedule
from pykvm.model.slots import MachineMemory, ModelSlot
from pykvm.model.statistics import machine_statistics
from pykvm.model.vcpu import ModelVcpu

if TYPE_CHECKING:
    from pykvm.machine.dirty import Gfns
    from pykvm.x86.cpuid import CpuidEntry

MAX_VCPU_ID: Final = 4096
_CLOSE_SECONDS: Final = 5.0


class ModelMachine(MachineClock, MachineMemory):
    """A machine of the model; see pykvm.machine.Machine.  Closing it closes its vCPUs first.

    Dirty logging is the architecture's: exactly the pages that vCPUs wrote, page tables whose A or D bits
    their walks set included, whatever a real KVM may report beside.
    """

    backend = "model"

    def __init__(self, supported_cpuid: Sequence[CpuidEntry], seed: int, *, translate: bool = True) -> None:
        super().__init__(Schedule(seed))
        self.translate = translate
        """Whether the processors translate hot code."""
        self.watched: dict[int, tuple[int, ...]] = {}
        """Frames whose changes by the guest the processors want to know, and all that are the same memory."""
        self._vcpus: list[ModelVcpu] = []
        self._supported_cpuid = tuple(supported_cpuid)
        self._manual = False
        self.set_clock(0)

    @property
    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """The leaves of the reference processor."""
        return self._supported_cpuid

    # --- vCPUs -------------------------------------------------------------------------------------------

    @property
    def vcpus(self) -> Sequence[ModelVcpu]:
        """The vCPUs in order of creation."""
        return tuple(self._vcpus)

    def create_vcpu(self, vcpu_id: int | None = None) -> ModelVcpu:
        """KVM_CREATE_VCPU (api.rst 4.7); the id defaults to the number of vCPUs so far.

        Raises KvmError: EEXIST for an id in use, EINVAL from MAX_VCPU_ID on.
        """
        with self.schedule.visit():
            self.require_open()
            vcpu_id = len(self._vcpus) if vcpu_id is None else vcpu_id
            if not 0 <= vcpu_id < 1 << 32:
                raise UsageError(f"A vCPU id of {vcpu_id} is not an unsigned 32-bit number.")
            if vcpu_id >= MAX_VCPU_ID:
                raise KvmError(
                    errno.EINVAL, "KVM_CREATE_VCPU", f"vCPU id {vcpu_id} is beyond KVM_CAP_MAX_VCPU_ID."
                )
            if any(vcpu.id == vcpu_id for vcpu in self._vcpus):
                raise KvmError(errno.EEXIST, "KVM_CREATE_VCPU", f"this VM has a vCPU {vcpu_id} already.")
            vcpu = self._make_vcpu(vcpu_id)
            self._vcpus.append(vcpu)
            self.schedule.expect(vcpu_id)
            return vcpu

    def _make_vcpu(self, vcpu_id: int) -> ModelVcpu:
        return ModelVcpu(self, vcpu_id, rings.DirtyRing(self.ring_entries) if self.ring_entries else None)

    def create_irqchip(self) -> None:
        """The model has no interrupt controllers.  Raises CapabilityError."""
        raise CapabilityError("The reference machine has no interrupt controllers; use --backend kvm.")

    # --- slots, for machines that keep more of them ------------------------------------------------------

    def slot_created(self, slot: ModelSlot) -> None:
        pass

    def slot_changed(self, slot: ModelSlot, gpa: int, flags: SlotFlags) -> None:
        pass

    def slot_deleted(self, slot: ModelSlot) -> None:
        pass

    # --- what the processors know of memory --------------------------------------------------------------

    def memory_changed(self) -> None:
        self.watched.clear()
        for vcpu in self._vcpus:
            vcpu.forget_memory()

    def watch(self, gfn: int) -> None:
        """Tell all processors when the guest writes to the frame's memory, wherever slots show it; they must
        ask before they do."""
        same = self.aliases(gfn)
        self.watched |= dict.fromkeys(same, same)
        self._protect()

    def watched_frame_changed(self, gfn: int) -> None:
        """A vCPU wrote to a watched frame."""
        for same in self.watched[gfn]:
            for vcpu in self._vcpus:
                vcpu.cpu.watched_frame_changed(same)

    def _protect(self) -> None:
        """The next write to any page must be seen."""
        for vcpu in self._vcpus:
            vcpu.cpu.flush_writable()

    # --- dirty bitmaps -----------------------------------------------------------------------------------

    def enable_manual_protect(self, initially_set: bool = False) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (api.rst 7.18): GET only reads, CLEAR re-protects.

        ``initially_set``: bitmaps that are made from now on start all ones.
        """
        with self.schedule.visit():
            self.require_open()
            self._manual = True
            self.initially_set = initially_set

    def _bitmap(self, slot: Slot, operation: str) -> tuple[ModelSlot, DirtyBitmap]:
        own = self._own(slot)
        self.require_open()
        self._require_bitmaps(operation)
        if own.bitmap is None:
            raise LoggingDisabledError(
                errno.ENOENT,
                operation,
                "the slot is gone or does not log; set SlotFlags.LOG_DIRTY_PAGES first.",
            )
        return own, own.bitmap

    def _own(self, slot: Slot) -> ModelSlot:
        if isinstance(slot, ModelSlot):
            if slot.owner is self:
                return slot
            if slot.owner is None:
                raise slot.closed_error()
        raise UsageError("The slot belongs to another machine.")

    def _require_bitmaps(self, operation: str) -> None:
        if self.ring_entries:
            raise DirtyRingModeError(
                errno.ENXIO,
                operation,
                "this VM uses dirty rings, which replace the bitmap; use collect_rings instead.",
            )

    def get_dirty_bitmap(self, slot: Slot) -> npt.NDArray[np.uint64]:
        """KVM_GET_DIRTY_LOG (api.rst 4.8) as 64-bit words; clears unless manual protection is on.

        Raises LoggingDisabledError, DirtyRingModeError, ClosedError.
        """
        with self.schedule.visit():
            _, bitmap = self._bitmap(slot, "KVM_GET_DIRTY_LOG")
            words = bitmap.take(clear=not self._manual)
            self._protect()
            return words

    def get_dirty_log(self, slot: Slot) -> Gfns:
        """KVM_GET_DIRTY_LOG as ascending gfns; otherwise as ``get_dirty_bitmap``."""
        with self.schedule.visit():
            own, bitmap = self._bitmap(slot, "KVM_GET_DIRTY_LOG")
            pages = bitmap.take_pages(clear=not self._manual)
            self._protect()
            return pages + np.uint64(own.frames.base_gfn)

    def clear_dirty_log(self, slot: Slot, first_page: int, pages: int, words: npt.NDArray[np.uint64]) -> None:
        """KVM_CLEAR_DIRTY_LOG (api.rst 4.117): the set bits of ``words``, bit 0 being ``first_page``.

        Raises ClearRangeError, LoggingDisabledError, DirtyRingModeError; UsageError where ``words`` is too
        short.
        """
        operation = "KVM_CLEAR_DIRTY_LOG"
        own = self._own(slot)
        if not (0 <= first_page < 1 << 64 and 0 <= pages < 1 << 32):
            raise UsageError("first_page or pages is negative or too large.")
        words = np.ascontiguousarray(words, dtype=np.uint64)
        if len(words) < (pages + 63) // 64:
            raise UsageError(f"{pages} pages need {(pages + 63) // 64} words of bitmap, not {len(words)}.")
        refused = ClearRangeError(
            errno.EINVAL,
            operation,
            "first_page must be a multiple of 64, and so must the page count unless the range ends with the "
            f"slot's {own.npages} pages.",
        )
        with self.schedule.visit():
            self._require_bitmaps(operation)
            if first_page % 64:
                raise refused
            own, bitmap = self._bitmap(slot, operation)
            left = own.npages - first_page
            if left < 0 or pages > left or (pages % 64 and pages != left):
                raise refused
            bitmap.clear(first_page, words[: (pages + 63) // 64])
            self._protect()

    # --- dirty rings -------------------------------------------------------------------------------------

    def enable_dirty_ring(self, entries: int) -> None:
        """KVM_CAP_DIRTY_LOG_RING_ACQ_REL (api.rst 8.29): a ring of ``entries`` per vCPU.

        A power of two, 256 to 65536; once, before the first vCPU.  Raises RingSizeError, RingOrderError.
        """
        operation = "KVM_ENABLE_CAP(DIRTY_LOG_RING)"
        with self.schedule.visit():
            self.require_open()
            if entries <= 0 or entries & (entries - 1):
                raise RingSizeError(errno.EINVAL, operation, f"{entries} entries are not a power of two.")
            if entries > rings.MAX_ENTRIES:
                raise RingSizeError(
                    errno.E2BIG, operation, f"{entries} entries are more than the limit of 65536."
                )
            if self.ring_entries or self._vcpus:
                raise RingOrderError(
                    errno.EINVAL, operation, "the ring must be enabled once, and before the first vCPU."
                )
            if entries < rings.MIN_ENTRIES:
                raise RingSizeError(
                    errno.EINVAL, operation, f"{entries} entries are too few; 256 to 65536 are possible."
                )
            self.ring_entries = entries
            for slot in self._slots.values():
                slot.bitmap = None

    def collect_rings(self, vcpus: Iterable[Vcpu] | None = None) -> RingHarvest:
        """Harvest and reset; see pykvm.machine.Machine.collect_rings.

        Raises DirtyRingModeError, ClosedError, and UsageError for a vCPU of another machine.
        """
        with self.schedule.visit():
            self._require_rings()
            self.require_open()
            chosen = self._vcpus if vcpus is None else self._own_vcpus(vcpus)
            batches: list[rings.Batch] = []
            for vcpu in chosen:
                if vcpu.ring is not None:
                    batches += vcpu.ring.collect(vcpu.id, self._slots)
            self._protect()
            return RingHarvest(batches)

    def _require_rings(self) -> None:
        if not self.ring_entries:
            raise DirtyRingModeError(
                errno.EINVAL, "KVM_RESET_DIRTY_RINGS", "this VM has no dirty rings; enable them first."
            )

    def _own_vcpus(self, vcpus: Iterable[Vcpu]) -> list[ModelVcpu]:
        chosen = []
        for vcpu in vcpus:
            if not isinstance(vcpu, ModelVcpu) or vcpu.vm is not self:
                raise UsageError("A vCPU of another machine has its ring there; ask that machine.")
            chosen.append(vcpu)
        return sorted(chosen, key=self._vcpus.index)

    # --- the rest ----------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """KVM's statistics by their names; what only KVM's own MMU has stays 0."""
        self.require_open()
        return machine_statistics({})

    def close(self) -> None:
        """Close the machine and its vCPUs, kicking those that run; its slots let their memory go."""
        with self.schedule.visit():
            self._closed = True
            vcpus = list(self._vcpus)  # no further one can be made
        for vcpu in vcpus:
            vcpu.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        while any(vcpu.running for vcpu in vcpus) and time.monotonic() < deadline:
            time.sleep(20e-6)
        with self.schedule.visit():
            for slot in self._slots.values():
                slot.retire()
            self._slots.clear()
            self._index()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name}{' (closed)' if self._closed else ''}>"
