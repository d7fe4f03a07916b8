"""What KVM's metadata about memory costs, by the rules of the model (kvm-mmu.md 2 and 9).

A VM of the profile is made with slots of the asked size, and the moments at which KVM allocates are gone
through: the model's own slots say what they hold then, so the figures follow the rules and not a formula
beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from pykvm.errors import UsageError
from pykvm.model.mmu.dirty_ring import ENTRY_BYTES
from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES, MAX_PAGES, PAGE
from pykvm.model.mmu.vm import Mmu
from pykvm.profiles import Profile, WriteTrackAllocation

ARRAYS: Final = ("rmap", "lpage_info", "gfn_write_track", "dirty_bitmap", "dirty_ring", "vmalloc")
"""What is allocated: four arrays of each slot, the rings of the vCPUs, and what the kernel's vmalloc keeps of
all of them: a pointer to each of their pages."""
_POINTER: Final = 8
_HOST: Final = 1 << 40
_GIB: Final = 1 << 30


@dataclass(frozen=True)
class Moment:
    """A point in the life of a VM, and the bytes of each array from then on."""

    name: str
    arrays: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all arrays."""
        return sum(self.arrays.values())


@dataclass(frozen=True)
class Overhead:
    """The cost under one policy of allocating write-track counts.

    ``moments``: with its slots alone; after a first shadow root (a nested guest's, under two-dimensional
    paging); after a first external user of write tracking; when it logs.  Each is a VM of its own.
    """

    policy: WriteTrackAllocation
    memory: int
    slots: int
    moments: tuple[Moment, ...]


class _Nobody:
    """An external user of write tracking that does nothing."""

    def track_write(self, gpa: int, new: bytes) -> None:
        """Not interested."""

    def track_remove_region(self, gfn: int, pages: int) -> None:
        """Not interested."""


class _Vm:
    """A VM with its memory in as few slots as possible."""

    def __init__(self, profile: Profile, memory: int, vcpus: int, ring: int) -> None:
        self.mmu = Mmu(profile)
        if ring:
            self.mmu.enable_dirty_ring(ring * ENTRY_BYTES)
        self._regions: list[tuple[int, int, int]] = []
        most = (MAX_PAGES * PAGE) // _GIB * _GIB
        self._data = memoryview(bytearray(PAGE))
        for number, at in enumerate(range(0, memory, most)):
            self._regions.append((number, at, min(most, memory - at)))
        self._vcpus = vcpus
        self.set_flags(0)

    def set_flags(self, flags: int) -> None:
        """Create the slots, or change whether they log."""
        for number, at, size in self._regions:
            self.mmu.memslots.set_region(number, flags, at, size, _HOST + at, self._data)

    def cost(self) -> dict[str, int]:
        """Bytes by array."""
        total = dict.fromkeys(ARRAYS, 0)
        for slot in self.mmu.memslots.all():
            arrays = slot.metadata_bytes(
                rmap=slot.rmap is not None,
                write_track=slot.gfn_write_track is not None,
                ring=slot.dirty_bitmap is None,
            )
            for name, size in arrays.items():
                total[name] += size
        total["dirty_ring"] = self._vcpus * self.mmu.ring_entries * ENTRY_BYTES
        total["vmalloc"] = _POINTER * sum(-(-size // PAGE) for size in total.values())
        return total


def overhead(
    profile: Profile, policy: WriteTrackAllocation, memory: int, *, vcpus: int = 1, ring: int = 0
) -> Overhead:
    """The cost for ``memory`` bytes on a host of the profile, ``ring`` entries for each vCPU (0: bitmaps).

    The profile is taken as built with external write tracking unless the policy knows none.  Raises
    UsageError for a size that is no multiple of 4096, SlotError beyond the host's addresses, RingSizeError.
    """
    if memory <= 0 or memory % PAGE:
        raise UsageError(f"Guest memory of {memory} bytes: use a multiple of 4096.")
    external = policy is not WriteTrackAllocation.SHADOW_ROOT
    host = replace(profile, write_track_allocation=policy, external_write_tracking=external)

    def shadowed(vm: _Vm) -> None:
        vm.mmu.shadow.first_shadow_root()

    def tracked(vm: _Vm) -> None:
        if external:
            vm.mmu.page_track.register(_Nobody())

    def logged(vm: _Vm) -> None:
        vm.set_flags(LOG_DIRTY_PAGES)

    steps: tuple[tuple[str, Callable[[_Vm], None]], ...] = (
        ("slots", lambda vm: None),
        ("first shadow root", shadowed),
        ("first external user", tracked),
        ("logging", logged),
    )
    moments = []
    slots = 0
    for name, step in steps:
        vm = _Vm(host, memory, vcpus, ring)
        step(vm)
        moments.append(Moment(name, vm.cost()))
        slots = len(vm.mmu.memslots.all())
    return Overhead(policy, memory, slots, tuple(moments))
