"""Statistics under KVM's names (api.rst 4.133).

The architecture knows exits and instructions; how a real KVM's MMU serves its guest it does not, so those
counters are there and stay 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pykvm.machine.exits import Exit, Halted, InterruptWindow, IoIn, IoOut, Kicked, MmioRead, MmioWrite
from pykvm.machine.statistics import Statistic, Statistics, StatisticType, StatisticUnit

COUNTED_EXITS: Final[dict[type[Exit] | tuple[type[Exit], ...], str]] = {
    (IoIn, IoOut): "io_exits",
    (MmioRead, MmioWrite): "mmio_exits",
    Halted: "halt_exits",
    Kicked: "signal_exits",
    InterruptWindow: "irq_window_exits",
}
"""Which counter an exit moves, beside ``exits``."""

_MACHINE: Final = (
    "remote_tlb_flush", "remote_tlb_flush_requests", "mmu_shadow_zapped", "mmu_pte_write", "mmu_pde_zapped",
    "mmu_flooded", "mmu_recycled", "mmu_cache_miss", "mmu_unsync", "pages_4k", "pages_2m", "pages_1g",
    "nx_lpage_splits", "max_mmu_rmap_size", "max_mmu_page_hash_collisions",
)  # fmt: skip
_VCPU: Final = (
    "halt_successful_poll", "halt_attempted_poll", "halt_poll_invalid", "halt_wakeup", "blocking", "pf_taken",
    "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", "pf_mmio_spte_created", "pf_guest", "tlb_flush",
    "invlpg", "exits", "io_exits", "mmio_exits", "signal_exits", "irq_window_exits", "nmi_window_exits",
    "l1d_flush", "halt_exits", "request_irq_exits", "irq_exits", "host_state_reload", "fpu_reload",
    "insn_emulation", "insn_emulation_fail", "hypercalls", "irq_injections", "nmi_injections", "req_event",
    "nested_run", "directed_yield_attempted", "directed_yield_successful", "preemption_reported",
    "preemption_other", "guest_mode", "notify_window_exits",
)  # fmt: skip
_INSTANT: Final = frozenset(
    {"mmu_unsync", "mmu_shadow_pages", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits"}
)
_PEAK: Final = frozenset({"max_mmu_rmap_size", "max_mmu_page_hash_collisions"})
_BOOLEAN: Final = frozenset({"blocking", "guest_mode"})


def _statistic(name: str, value: int) -> Statistic:
    boolean = name in _BOOLEAN
    kind = (
        StatisticType.INSTANT
        if boolean or name in _INSTANT
        else StatisticType.PEAK
        if name in _PEAK
        else StatisticType.CUMULATIVE
    )
    unit = StatisticUnit.BOOLEAN if boolean else StatisticUnit.NONE
    return Statistic(name, (value,), kind, unit, 10, 0, 0)


def machine_statistics(counts: Mapping[str, int]) -> Statistics:
    """A machine's: ``counts`` by name, others of KVM's are 0."""
    names = dict.fromkeys((*_MACHINE, *counts))
    return Statistics("model", {name: _statistic(name, counts.get(name, 0)) for name in names})


def vcpu_statistics(vcpu: int, counts: Mapping[str, int]) -> Statistics:
    """A vCPU's, likewise."""
    return Statistics(f"model/vcpu-{vcpu}", {name: _statistic(name, counts.get(name, 0)) for name in _VCPU})
