"""The MMU's memory grows with what the guest touches, not with the guest."""

from __future__ import annotations

import tracemalloc

import pytest

from pykvm.memory import GuestMemory
from pykvm.model.mmu.memslots import LOG_DIRTY_PAGES
from pykvm.model.mmu.vcpu import ControlChange
from pykvm.model.mmu.vm import Mmu
from pykvm.profiles import KINDS, profile
from tests.model.mmu.shadow_guest import HOST, LONG, PAGE, STORE, TABLE

TOUCHED = 200
_APART = 1 << 8


def used(kind: str, size: int) -> int:
    """Bytes that Python allocated for a guest of ``size`` bytes that wrote to TOUCHED pages, far apart."""
    with GuestMemory(size) as memory:
        tracemalloc.start()
        mmu = Mmu(profile(kind))
        view = memory.view(0, size).data
        slot = mmu.memslots.set_region(0, LOG_DIRTY_PAGES, 0, size, HOST, view)
        assert slot is not None
        words = slot.words
        step = size // 4096 // _APART // 2
        # One leaf table maps pages all over the guest.
        for table, below in ((0x10, 0x11), (0x11, 0x12), (0x12, 0x13)):
            words[table * 512] = below << 12 | TABLE
        for index in range(TOUCHED):
            words[0x13 * 512 + index] = (0x100 + index * step) << 12 | PAGE
        vcpu = mmu.create_vcpu()
        mmu.loaded = vcpu
        vcpu.set_control(LONG._replace(cr3=0x10 << 12), ControlChange.HOST)
        assert vcpu.enter()
        for index in range(TOUCHED):
            vcpu.translate(index << 12, STORE)
        assert slot.dirty_bitmap is not None
        marked = [0x100 + index * step for index in range(TOUCHED)]
        assert all(slot.dirty_bitmap.is_marked(gfn) for gfn in marked)
        result = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del words, slot, mmu, vcpu, view
        return result


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "amd-npt-oldmmu"])
def test_a_guest_of_a_tebibyte_costs_no_more_than_a_small_one(kind: str) -> None:
    """Not the older direct MMU: the further its pages lie apart, the more tables of its own it needs."""
    used(kind, 1 << 30)  # what is cached for ever is there now
    small, large = used(kind, 1 << 30), used(kind, 1 << 40)
    assert large < 1.5 * small + 50_000
