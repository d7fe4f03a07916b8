"""What the actors share: guest memory, SPTEs, TLBs, dirty log, track counts, the slot, locks.

One slot, a handful of 4 KiB pages, one SPTE per page (a direct MMU: the SPTE of a gfn is fixed).
HOST_WRITABLE is always set and left out.  Contents of a page are the number of stores that it has taken, so
two contents differ exactly if a store lies between them.  docs/interleavings.md says what is not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeVar

from pykvm.model.interleave.explorer import BrokenProperty, Record

T = TypeVar("T")


class Spte(NamedTuple):
    """A 4 KiB SPTE by the facts that matter here (kvm-mmu.md 8)."""

    present: bool
    mmu_writable: bool
    writable: bool
    dirty: bool  # D; looked at under PML only


NO_SPTE = Spte(False, False, False, False)
WRITABLE = Spte(True, True, True, True)
LOG_PROTECTED = Spte(True, True, False, False)  # the fast page fault may fix it
READ_ONLY = Spte(True, False, False, False)  # tracked: it may not
CLEAN = Spte(True, True, True, False)  # PML: writable, and the processor logs the first write


class Mode(Enum):
    """Where a vCPU is."""

    GUEST = "guest"
    HOST = "host"  # handling an exit inside of KVM_RUN, within an SRCU read section
    USER = "user"  # outside of KVM_RUN


class Slot(Enum):
    """The memslot as a lookup finds it, and at last its memory: bitmap, rmap, the struct itself."""

    VALID = "valid"
    INVALID = "invalid"
    ABSENT = "absent"
    FREED = "freed"


class Entry(NamedTuple):
    """An entry of a dirty ring: flags and the page of its slot and offset (kvm-mmu.md 4.1)."""

    flags: int
    gfn: int


FREE, DIRTY, HARVESTED = 0, 1, 2


@dataclass
class Vm(Record):
    """Everything that more than one actor sees.  Tuples are indexed by gfn, or by vCPU where said so."""

    memory: tuple[int, ...]
    spte: tuple[Spte, ...]
    tlb: tuple[tuple[bool, ...], ...]
    """By vCPU, then gfn: whether a translation is cached that lets stores through without a walk."""

    mode: tuple[Mode, ...]  # by vCPU
    mmu_lock: str = ""  # the actor that holds it for writing
    sharers: int = 0  # faults of the TDP MMU that hold it for reading

    logging: bool = True
    bitmap: int = 0
    rings: tuple[tuple[Entry, ...], ...] = ()  # by vCPU
    pushed: tuple[int, ...] = ()  # by vCPU: dirty_index
    reset: tuple[int, ...] = ()  # by vCPU: reset_index
    pml: tuple[tuple[int, ...], ...] = ()  # by vCPU: gfns in its PML buffer; empty tuple without PML

    copied: tuple[int, ...] = ()  # contents that the collector last read
    paused: bool = False  # all vCPUs are out of KVM_RUN for good
    quiet: bool = False  # the guest writes no more

    tracked: tuple[int, ...] = ()  # gfn_write_track
    promised: tuple[bool, ...] = ()  # an add has returned, no removal began

    slot: Slot = Slot.VALID
    memslots: int = 0  # how often new memslots were published
    readers: tuple[int | None, ...] = ()  # by vCPU: memslots at its srcu_read_lock
    outside: bool = False  # a write without a vCPU is under way

    @classmethod
    def create(cls, pages: int, vcpus: int, *, ring_size: int = 0, pml: bool = False) -> Vm:
        """All pages logged, protected and copied; nothing cached, nothing tracked; vCPUs in the guest."""
        none = (0,) * pages
        return cls(
            memory=none,
            spte=((CLEAN if pml else LOG_PROTECTED),) * pages,
            tlb=((False,) * pages,) * vcpus,
            mode=(Mode.GUEST,) * vcpus,
            rings=((Entry(FREE, 0),) * ring_size,) * vcpus if ring_size else (),
            pushed=(0,) * vcpus,
            reset=(0,) * vcpus,
            pml=((),) * vcpus if pml else (),
            copied=none,
            tracked=none,
            promised=(False,) * pages,
            readers=(None,) * vcpus,
        )

    @property
    def pages(self) -> range:
        return range(len(self.memory))

    @property
    def vcpus(self) -> range:
        return range(len(self.mode))

    def lock(self, name: str) -> bool:
        """Take mmu_lock for writing; whether ``name`` has it now."""
        if not self.mmu_lock and not self.sharers:
            self.mmu_lock = name
        return self.mmu_lock == name

    def set_spte(self, gfn: int, spte: Spte) -> None:
        self.spte = put(self.spte, gfn, spte)

    def set_mode(self, vcpu: int, mode: Mode) -> None:
        self.mode = put(self.mode, vcpu, mode)

    def cache(self, vcpu: int, gfn: int, writable: bool) -> None:
        """What the vCPU's TLB has for the page from now on."""
        self.tlb = put(self.tlb, vcpu, put(self.tlb[vcpu], gfn, writable))

    def flush(self, vcpu: int) -> None:
        """Drop all of a vCPU's translations: it is out of the guest, or taken out for a moment."""
        self.tlb = put(self.tlb, vcpu, (False,) * len(self.memory))

    def mark(self, gfn: int, did: str) -> None:
        """Set the page's bit in the bitmap; ``did`` is what the step has done, for a broken property."""
        self.check_slot(did, "the dirty bitmap")
        self.bitmap |= 1 << gfn

    def check_slot(self, did: str, what: str) -> None:
        """Raises BrokenProperty if the slot's memory was freed: ``what`` is the part of it that is used."""
        if self.slot is Slot.FREED:
            raise BrokenProperty(did, f"{what} of the slot is used after it was freed")


def put(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    """The tuple with one value replaced."""
    return (*values[:index], value, *values[index + 1 :])


def pages_of(mask: int) -> list[int]:
    """The gfns whose bits are set."""
    return [gfn for gfn in range(mask.bit_length()) if mask >> gfn & 1]


def words(pages: Sequence[int]) -> str:
    """Pages for a schedule: ``page 0``, ``pages 0 and 1``, ``no page``."""
    if not pages:
        return "no page"
    listed = " and ".join(str(page) for page in pages)
    return f"page{'s' if len(pages) > 1 else ''} {listed}"
