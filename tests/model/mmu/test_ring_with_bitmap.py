"""Rings with a bitmap beside them: the contract of architectures that write without a vCPU (kvm-mmu.md 4.8).

x86 does not offer it: each writer there has a vCPU loaded.  The dirty-ring review of 2019 named those of
other architectures that have none; each is a case here, on the rules of an architecture with the bitmap and
on those of x86, where the write would be lost.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pykvm.errors import DirtyRingModeError, RingOrderError
from pykvm.model.mmu.memslots import Memslot
from tests.model.mmu.foundation import Rig


def rig_with_bitmap(**options: int) -> Rig:
    """A VM of an architecture that has the capability, with rings and the bitmap on."""
    return Rig(ring_bytes=4096, with_bitmap=True, ring_with_bitmap=True, **options)


# --- enabling --------------------------------------------------------------------------------------


def test_x86_does_not_offer_it() -> None:
    """4.8: not compiled in: EINVAL, whatever else is right."""
    rig = Rig(vcpus=0, ring_bytes=4096)
    with pytest.raises(RingOrderError) as caught:
        rig.mmu.enable_ring_with_bitmap()
    assert caught.value.errno == errno.EINVAL


def test_it_needs_rings_first() -> None:
    """4.8: after the ring."""
    rig = Rig(vcpus=0, ring_with_bitmap=True)
    with pytest.raises(RingOrderError) as caught:
        rig.mmu.enable_ring_with_bitmap()
    assert caught.value.errno == errno.EINVAL
    rig.mmu.enable_dirty_ring(4096)
    rig.mmu.enable_ring_with_bitmap()


def test_it_comes_before_any_slot() -> None:
    """4.8: EINVAL while some slot is not empty; all deleted again is as good as none."""
    rig = Rig(vcpus=0, ring_bytes=4096, ring_with_bitmap=True)
    rig.slot()
    with pytest.raises(RingOrderError) as caught:
        rig.mmu.enable_ring_with_bitmap()
    assert caught.value.errno == errno.EINVAL
    rig.set(pages=0)
    rig.mmu.enable_ring_with_bitmap()


def test_it_may_come_after_the_vcpus() -> None:
    """4.8: only the ring must precede the vCPUs."""
    rig = Rig(vcpus=2, ring_bytes=4096, ring_with_bitmap=True)
    rig.mmu.enable_ring_with_bitmap()


# --- where marks go ----------------------------------------------------------------------------------


def test_marks_with_a_vcpu_go_to_the_ring_and_others_to_the_bitmap() -> None:
    """4.8: never to both."""
    rig = rig_with_bitmap()
    slot = rig.slot()
    rig.mark(slot, 1)
    rig.load(None)
    rig.mark(slot, 2)
    rig.load(0)
    rig.mark(slot, 3)
    assert rig.pushed() == [(0, 1), (0, 3)]
    assert rig.log(slot) == [2]
    assert rig.mmu.dirty_log.lost == 0


def test_get_and_clear_work_beside_the_ring() -> None:
    """``kvm_use_dirty_bitmap`` decides about the allocation and about ENXIO."""
    rig = rig_with_bitmap()
    slot = rig.slot()
    rig.load(None)
    rig.mark(slot, 7)
    assert rig.log(slot) == [7]
    assert rig.log(slot) == []
    without = Rig(ring_bytes=4096)
    with pytest.raises(DirtyRingModeError) as caught:
        without.log(without.slot())
    assert caught.value.errno == errno.ENXIO


def test_resets_arm_pages_of_the_bitmap_mode_too() -> None:
    """Both logs arm through the same protection: a page in both is armed by whichever is collected."""
    rig = rig_with_bitmap()
    slot = rig.slot()
    rig.mark(slot, 9)
    rig.load(None)
    rig.mark(slot, 9)
    rig.harvest()
    rig.tables.take()
    assert rig.mmu.dirty_log.reset_rings() == 1
    assert rig.tables.take() == [("write_protect_masked", 0, 9, 1)]
    assert rig.log(slot) == [9]
    assert rig.tables.take() == [("write_protect_masked", 0, 0, 1 << 9)]


# --- the writers without a vCPU that the review named --------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Somebody in KVM who writes to guest memory: its device ioctl or host event, whether a vCPU is loaded on
    the writing thread, and which pages it writes."""

    who: str
    when: str
    has_vcpu: bool
    pages: tuple[int, ...]


WRITERS = (
    Writer("arm64 ITS", "KVM_DEV_ARM_ITS_SAVE_TABLES: device, collection and translation tables", False,
           (10, 11, 12)),
    Writer("arm64 ITS", "KVM_DEV_ARM_ITS_RESTORE_TABLES: pending bits read back and consumed", False, (13,)),
    Writer("arm64 VGIC v3", "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES: a bit for each LPI", False, (20, 21)),
    Writer("s390 adapter", "adapter interrupt: indicator and summary bits set by an irqfd's thread", False,
           (30, 31)),
    Writer("arm64 steal time", "KVM_REQ_RECORD_STEAL at vcpu_load", True, (40,)),
    Writer("any", "a store of the guest that faulted", True, (41,)),
)  # fmt: skip
NAMES = [f"{writer.who}: {writer.when.split(':')[0]}" for writer in WRITERS]


def write(rig: Rig, slot: Memslot, writer: Writer) -> None:
    """Let it write: device ioctls and host threads have no vCPU loaded."""
    rig.load(0 if writer.has_vcpu else None)
    rig.mark(slot, *writer.pages)
    rig.load(0)


@pytest.mark.parametrize("writer", WRITERS, ids=NAMES)
def test_no_writer_is_lost_with_the_bitmap(writer: Writer) -> None:
    rig = rig_with_bitmap()
    slot = rig.slot()
    write(rig, slot, writer)
    ring = [offset for _, offset in rig.pushed()]
    assert (ring, rig.log(slot)) == (
        (list(writer.pages), []) if writer.has_vcpu else ([], list(writer.pages))
    )


@pytest.mark.parametrize("writer", WRITERS, ids=NAMES)
@pytest.mark.parametrize("era", ["6.1", "6.12", "7.2"])
def test_which_writers_x86_s_rules_would_lose(writer: Writer, era: str) -> None:
    """4.7: in ring mode without the bitmap exactly those without a vCPU; that is why x86 must have none."""
    rig = Rig(era=era, ring_bytes=4096)
    slot = rig.slot()
    write(rig, slot, writer)
    assert [offset for _, offset in rig.pushed()] == (list(writer.pages) if writer.has_vcpu else [])
    assert rig.mmu.dirty_log.lost == (0 if writer.has_vcpu else len(writer.pages))


@pytest.mark.parametrize("writer", WRITERS, ids=NAMES)
def test_bitmap_mode_loses_none_of_them_since_6_12(writer: Writer) -> None:
    """3.2: [6.1] dropped what had no vCPU even there."""
    for era, kept in (("6.1", writer.has_vcpu), ("6.12", True)):
        rig = Rig(era=era)
        slot = rig.slot()
        write(rig, slot, writer)
        assert rig.log(slot) == (list(writer.pages) if kept else [])


# --- collected last -----------------------------------------------------------------------------------


def final_collection(order: str) -> set[int]:
    """A final round with the guest stopped: rings are collected, devices are saved, the bitmap is fetched."""
    rig = rig_with_bitmap()
    slot = rig.slot()
    rig.mark(slot, 1, 2)
    sent: set[int] = set()

    def rings() -> None:
        sent.update(offset for _, offset in rig.pushed())
        rig.harvest()
        rig.mmu.dirty_log.reset_rings()

    def save() -> None:
        for writer in WRITERS:
            if not writer.has_vcpu:
                write(rig, slot, writer)

    def bitmap() -> None:
        sent.update(rig.log(slot))

    steps: dict[str, Callable[[], None]] = {"r": rings, "s": save, "b": bitmap}
    for step in order:
        steps[step]()
    return sent


def test_the_bitmap_is_collected_last_and_once() -> None:
    """4.8, contract: after all device-save ioctls.  Collected before them, their pages are missing."""
    written = {1, 2} | {page for writer in WRITERS if not writer.has_vcpu for page in writer.pages}
    assert final_collection("rsb") == written
    assert final_collection("srb") == written
    assert final_collection("rbs") == {1, 2}
