"""KVM's counters in the cross-check: which are compared (level L3), by which rule, and which are noise.

Every statistic of a real KVM is in exactly one of the two tables (a test holds that), so that a new one
cannot stay unnoticed.  Evidence: docs/reference/hosts.md, section A; meanings: kvm-mmu.md, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

from pykvm.machine import Machine, Vcpu
from pykvm.machine.protocols import RingEntries

DETERMINISTIC: Final[Mapping[str, str]] = {
    "remote_tlb_flush_requests": "kvm-mmu.md 6: one per kvm_flush_remote_tlbs",
    "mmu_shadow_zapped": "kvm-mmu.md 6: one per shadow page zapped, again when an invalid root is freed",
    "mmu_pte_write": "kvm-mmu.md 6: one per emulated write while there are indirect shadow pages",
    "mmu_pde_zapped": "kvm-mmu.md 6: one per upper-level SPTE hit by a write of 4 or 8 bytes, not zero",
    "mmu_flooded": "kvm-mmu.md 6: one per shadow page zapped for flooding or a misaligned write",
    "mmu_recycled": "kvm-mmu.md 6: shadow pages zapped to stay within the budget",
    "mmu_cache_miss": "kvm-mmu.md 6: one per shadow page created",
    "mmu_unsync": "kvm-mmu.md 6: shadow pages that are unsync now",
    "mmu_shadow_pages": "kvm-mmu.md 6: shadow pages in existence (from 7.2 on)",
    "pages_4k": "kvm-mmu.md 6: present 4 KiB leaf SPTEs",
    "pages_2m": "kvm-mmu.md 6: present 2 MiB leaf SPTEs",
    "pages_1g": "kvm-mmu.md 6: present 1 GiB leaf SPTEs",
    "nx_lpage_splits": "kvm-mmu.md 6: shadow pages made for the NX huge page mitigation only",
    "max_mmu_rmap_size": "kvm-mmu.md 6: the longest chain that an SPTE was added to",
    "max_mmu_page_hash_collisions": "kvm-mmu.md 6: the most pages of other gfns passed in a lookup",
    "pf_taken": "kvm-mmu.md 6: one per page fault that reaches the fault handler",
    "pf_fixed": "kvm-mmu.md 6: faults with RET_PF_FIXED",
    "pf_emulate": "kvm-mmu.md 6: faults with RET_PF_EMULATE",
    "pf_spurious": "kvm-mmu.md 6: faults with RET_PF_SPURIOUS",
    "pf_fast": "kvm-mmu.md 6: faults that fast_page_fault served, direct MMUs only",
    "pf_mmio_spte_created": "kvm-mmu.md 6: MMIO SPTEs that faults wrote",
    "pf_guest": "kvm-mmu.md 6: page faults injected into the guest",
    "tlb_flush": "kvm-mmu.md 6: requests to flush the TLB that a vCPU served",
    "invlpg": "kvm-mmu.md 6: INVLPG intercepted or emulated",
    "io_exits": "kvm-mmu.md 6: IN and OUT that exited",
    "mmio_exits": "kvm-mmu.md 6: emulation that left for MMIO",
    "insn_emulation": "kvm-mmu.md 6: one per decode by the emulator",
    "insn_emulation_fail": "kvm-mmu.md 6: instructions that the emulator gave up",
    "hypercalls": "hosts.md A: VMCALL and VMMCALL",
    "irq_injections": "hosts.md A: interrupts injected",
    "nmi_injections": "hosts.md A: NMIs injected",
}
"""Counters that are equal in every repetition, with the rule that moves them."""

NOISY: Final[Mapping[str, str]] = {
    "remote_tlb_flush": "counts only if some vCPU was in guest mode on another processor at that moment",
    "exits": "host interrupts end a native run at any time; exits - irq_exits would be stable",
    "irq_exits": "interrupts of the host",
    "request_irq_exits": "interrupts of the host",
    "irq_window_exits": "when an interrupt can be taken depends on when it comes",
    "nmi_window_exits": "as irq_window_exits",
    "signal_exits": "signals come when they come",
    "req_event": "1 or 2 per run on the same guest (hosts.md A)",
    "host_state_reload": "how often the host scheduled something else",
    "fpu_reload": "as host_state_reload: a host context switch in between adds one",
    "preemption_reported": "how often the host scheduled something else",
    "preemption_other": "how often the host scheduled something else",
    "l1d_flush": "depends on exits",
    "halt_exits": "with an irqchip depends on when interrupts come",
    "halt_successful_poll": "time",
    "halt_attempted_poll": "time",
    "halt_poll_invalid": "time",
    "halt_wakeup": "time",
    "halt_poll_success_ns": "time",
    "halt_poll_fail_ns": "time",
    "halt_wait_ns": "time",
    "halt_poll_success_hist": "time",
    "halt_poll_fail_hist": "time",
    "halt_wait_hist": "time",
    "blocking": "the state of a moment",
    "guest_mode": "the state of a moment",
    "nested_run": "nested guests are not part of the scenarios",
    "directed_yield_attempted": "how the host schedules",
    "directed_yield_successful": "how the host schedules",
    "notify_window_exits": "time",
    "mmu_kicks_spared": "kvm_pvm's own, as the next two; contention with other threads moves them",
    "pf_parked": "kvm_pvm's own",
    "pf_park_timeouts": "kvm_pvm's own",
}
"""Counters that are not compared, with the reason."""


@runtime_checkable
class Counting(Protocol):
    """A machine or vCPU that gives its single-valued statistics fast."""

    def counters(self) -> Mapping[str, int]: ...


@runtime_checkable
class Peeking(Protocol):
    """A vCPU whose ring can be looked into without taking anything out."""

    def peek_ring(self, since: int) -> tuple[RingEntries | None, int]:
        """The entries that KVM pushed from the ``since``-th on and that nobody harvested yet, and how many
        were pushed altogether."""


class Counters:
    """Reads the deterministic counters of a machine and its vCPUs, as cheaply as they allow."""

    def __init__(self, machine: Machine) -> None:
        sources: list[tuple[str, Machine | Vcpu]] = [
            ("machine", machine),
            *((f"vcpu{number}", vcpu) for number, vcpu in enumerate(machine.vcpus)),
        ]
        self._sources = [
            (_reader(source), {name: f"{prefix}.{name}" for name in DETERMINISTIC})
            for prefix, source in sources
        ]

    def read(self) -> dict[str, int]:
        """By name, ``machine.pages_4k`` or ``vcpu0.pf_taken``."""
        return {
            names[name]: value
            for read, names in self._sources
            for name, value in read().items()
            if name in names
        }


def _reader(source: Machine | Vcpu) -> Callable[[], Mapping[str, int]]:
    if isinstance(source, Counting):
        return source.counters
    return lambda: {name: each.value for name, each in source.statistics().items()}


def rule_of(name: str) -> str:
    """The rule for a counter as ``Counters.read`` names it."""
    return DETERMINISTIC[name.partition(".")[2]]


def differing(one: Mapping[str, int], other: Mapping[str, int]) -> Sequence[str]:
    """The counters that both have and whose values differ, the most telling first."""
    if one == other:
        return ()
    order = {name: number for number, name in enumerate(_TELLING)}
    names = [name for name, value in one.items() if name in other and other[name] != value]
    return sorted(names, key=lambda name: order.get(name.partition(".")[2], len(order)))


_TELLING: Final = (
    "pf_taken", "pf_guest", "pf_emulate", "pf_fixed", "pf_spurious", "mmu_cache_miss", "mmu_unsync",
    "mmu_pte_write", "mmu_pde_zapped", "mmu_flooded", "mmu_shadow_zapped", "insn_emulation", "pages_4k",
)  # fmt: skip
"""What happened comes before what followed from it."""
