"""Who else marks pages, and who does not: KVM itself, the host (docs/reference/hosts.md E)."""

from __future__ import annotations

import os
from typing import Any

from pykvm.machine import SlotFlags
from pykvm.memory import PAGE_SIZE
from tests.mmu.huge import UntouchedPages
from tests.mmu_rig import (
    DATA,
    DATA_PT,
    FRESH,
    KERNEL_STACK,
    PAGE,
    PD,
    PDPT,
    PML4,
    SHADOW,
    TABLE,
    Host,
    Rig,
    hosts,
)

VA = DATA << 12
PAGES = 0x2400
WALL_CLOCK, KVMCLOCK, STEAL_TIME, PV_EOI = 0x4B564D00, 0x4B564D01, 0x4B564D03, 0x4B564D04
on_kvm = hosts()
"""What the model's machine does not have: paravirtual clocks."""


@hosts(*SHADOW)
def test_translate_dirties_tables_by_their_a_bits(shadow: Host) -> None:
    """E: KVM_TRANSLATE walks as a guest's read, outside of any run."""
    with Rig(shadow, pages=PAGES, upper=FRESH, leaf=FRESH) as rig:
        assert rig.vcpu.translate(VA + 5) == VA + 5
        assert rig.dirty() == [PML4, PDPT, PD, DATA_PT]
        assert rig.leaf(DATA) == TABLE
        assert rig.vcpu.translate(VA + 5) == VA + 5
        assert rig.dirty() == []


@hosts(*SHADOW)
def test_an_exception_dirties_the_stack_it_is_delivered_on(shadow: Host) -> None:
    """E: that of CPL 0, and nothing else."""
    with Rig(shadow, pages=PAGES, entries={(DATA_PT, 0): 0}) as rig:
        rig.prime()
        assert rig.load(VA).fault == (14, 4)
        assert rig.dirty() == [KERNEL_STACK]


@hosts(*SHADOW)
def test_stores_of_the_host_are_not_logged(shadow: Host) -> None:
    """E: through its mapping, or by a system call that writes guest memory."""
    with Rig(shadow, pages=PAGES) as rig:
        rig.prime(DATA, write=True)
        rig.memory.write(VA, b"host")
        reader, writer = os.pipe()
        try:
            os.write(writer, b"read")
            with os.fdopen(os.dup(reader), "rb", buffering=0) as pipe:
                assert pipe.readinto(rig.memory.view(VA + 0x1000, 4).data) == 4
        finally:
            os.close(reader)
            os.close(writer)
        rig.load(VA)
        assert rig.vcpu.get_registers().rax & 0xFFFFFFFF == int.from_bytes(b"host", "little")
        assert rig.dirty() == []


@hosts(*SHADOW)
def test_pages_that_the_host_drops_are_not_logged(shadow: Host) -> None:
    """E: the content becomes 0, the SPTE goes: pages_4k -1, a flush."""
    with Rig(shadow, pages=PAGES, leaf=TABLE) as rig:
        rig.prime(DATA, DATA + 1, write=True)
        before = rig.counters()["pages_4k"]
        moved = rig.measured(lambda: rig.memory.discard(VA, PAGE_SIZE))
        assert moved == {"pages_4k": -1, "remote_tlb_flush_requests": 1}
        assert rig.dirty() == []
        assert before > 1


@on_kvm
def test_the_clock_page_is_dirty_at_the_next_run(shadow: Host) -> None:
    """E: kvmclock, on the next KVM_RUN after it was set; after KVM_SET_CLOCK, KVMCLOCK_CTRL."""
    with Rig(shadow, pages=PAGES) as rig:
        rig.prime()
        rig.vcpu.set_msrs({KVMCLOCK: VA | 1})
        assert rig.dirty() == []
        rig.run(b"")
        assert rig.dirty() == [DATA]
        rig.machine.set_clock(rig.machine.get_clock().clock)
        rig.run(b"")
        assert rig.dirty() == [DATA]
        rig.vcpu.notify_paused()
        rig.run(b"")
        assert rig.dirty() == [DATA]


@on_kvm
def test_the_wall_clock_is_written_at_once(shadow: Host) -> None:
    """E: at SET_MSRS, without a run."""
    with Rig(shadow, pages=PAGES) as rig:
        rig.prime()
        rig.vcpu.set_msrs({WALL_CLOCK: VA})
        assert rig.dirty() == [DATA]


@on_kvm
def test_steal_time_is_written_at_every_load_of_the_vcpu(shadow: Host) -> None:
    """E: every KVM_RUN that does vcpu_load."""
    with Rig(shadow, pages=PAGES) as rig:
        rig.prime()
        rig.vcpu.set_msrs({STEAL_TIME: VA | 1})
        rig.dirty()
        for _ in range(3):
            rig.run(b"")
            assert rig.dirty() == [DATA]


@on_kvm
def test_the_end_of_interrupt_flag_without_interrupts(shadow: Host) -> None:
    """E: PV EOI: no mark without APIC activity."""

    def with_irqchip(machine: Any) -> None:
        machine.create_irqchip()

    with Rig(shadow, pages=PAGES, prepare=with_irqchip) as rig:
        rig.prime()
        rig.vcpu.set_msrs({PV_EOI: VA | 1})
        for _ in range(3):
            rig.run(b"")
            assert rig.dirty() == []


@on_kvm
def test_untouched_private_memory_costs_a_fault_more(shadow: Host) -> None:
    """A: a read maps the host's zero page; the write breaks that (COW), whose MMU notifier makes the first
    fault stale: pf_taken +1 that is not in pf_fixed, and a flush."""
    away = 0x8000
    with Rig(shadow, pages=PAGES, entries={(DATA_PT, 3): away << 12 | PAGE}) as rig:
        rig.prime(DATA)
        rig.machine.create_slot(UntouchedPages(PAGE_SIZE), away << 12, flags=SlotFlags.LOG_DIRTY_PAGES)
        assert rig.load(VA + 0x3000).moved == {"pf_taken": 1, "pf_fixed": 1, "pages_4k": 1}
        seen = rig.store(VA + 0x3000)
        assert seen.moved == {"pf_taken": 2, "pf_fixed": 1, "remote_tlb_flush_requests": 1}
