"""KVM's rules as the knobs of the actors: orders of steps, and checks that can be left out.

The defaults are what KVM does.  A mutation is a set of other values (``mutations``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Repair(Enum):
    """How a write fault on a *shadow* SPTE that logging protected is fixed (locking.rst 2.1)."""

    SLOW = "slow"  # what KVM does: by a walk of the guest's tables, under mmu_lock
    COMPARE = "compare"  # lockless; nothing but the compare-and-exchange of the SPTE
    LOOK_AGAIN = "look again"  # ditto, then the gfn is read once more, and both are marked
    PIN = "pin"  # ditto, with the page frame of the gfn pinned meanwhile
    TAG = "tag"  # ditto, and the value that is compared tells the gfn, too


@dataclass(frozen=True, slots=True)
class Rules:
    """The orders are those of kvm-mmu.md; each names the section."""

    # 11.2: conditions, compare-and-exchange, then the mark
    fast_order: tuple[str, ...] = ("cmpxchg", "mark")
    fast_compares: bool = True
    fast_needs_mmu_writable: bool = True

    # 7.2: before anything else, and without mmu_lock
    fault_looks_at_tracking: bool = True

    # 7.2, 8: under mmu_lock make_spte looks at the track count once more, marks, and the SPTE is installed
    slow_rechecks_tracking: bool = True
    slow_compares: bool = True  # 11.1: the TDP MMU, whose faults share mmu_lock

    # 3.2: one ioctl; the contents are userspace's
    get_order: tuple[str, ...] = ("kick", "xchg", "protect", "flush", "read")
    manual_order: tuple[str, ...] = ("get", "clear", "protect", "flush", "read")
    clear_only_what_was_read: bool = True

    # 4.3 to 4.5
    push_order: tuple[str, ...] = ("payload", "flag")
    full_check: bool = True
    acquire: bool = True
    harvest_order: tuple[str, ...] = ("payload", "release")
    ring_order: tuple[str, ...] = ("harvest", "reset", "protect", "flush", "read")

    # 3.2, 3.1: a mark without a loaded vCPU; the last collection comes after all vCPUs left KVM_RUN
    marks_without_vcpu: bool = True
    outside_ring: bool = False  # x86 has no writers without a vCPU while rings are on (4.8)
    pause: bool = True
    pause_waits: bool = True

    # 9: count, write-protect and clear MMU-writable, flush, return
    track_order: tuple[str, ...] = ("count", "protect", "flush", "return")
    track_clears_mmu_writable: bool = True
    track_flush_by_mmu_writable: bool = True  # 8: whether a flush is due is asked of MMU-writable, not of W

    # 2: INVALID is published, readers are awaited, mappings go, then the same for the slot itself
    remove_order: tuple[str, ...] = ("invalidate", "wait", "zap", "flush", "delete", "wait", "free")

    # 3.2, 4.5: SPTEs are protected under mmu_lock
    protect_locks: bool = True

    # 10.5: unsync is seen before the SPTE lets writes through; a sync protects and flushes before it copies
    unsync_order: tuple[str, ...] = ("unsync", "writable")
    sync_order: tuple[str, ...] = ("protect", "flush", "copy", "clear")

    # 9.2, 11: the experiment of a fast page fault for shadow paging
    shadow_repair: Repair = Repair.SLOW
    shadow_compares: bool = True
    shadow_mmu_writable_needs_dirty: bool = True
    shadowing_clears_mmu_writable: bool = True
