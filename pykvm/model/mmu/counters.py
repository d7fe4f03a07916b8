"""KVM's statistics as plain numbers, named as KVM names them (kvm-mmu.md 6).

Each attribute is moved only by the mechanism that moves it in KVM; docs/reference/kvm-mmu.md 6 has the exact
rule of each.
"""

from __future__ import annotations


class VmCounters:
    """The statistics of a VM.  ``mmu_unsync``, ``mmu_shadow_pages``, ``pages_*`` and ``nx_lpage_splits`` are
    present numbers, the two ``max_`` peaks, the rest cumulative."""

    __slots__ = (
        "max_mmu_page_hash_collisions",
        "max_mmu_rmap_size",
        "mmu_cache_miss",
        "mmu_flooded",
        "mmu_pde_zapped",
        "mmu_pte_write",
        "mmu_recycled",
        "mmu_shadow_pages",
        "mmu_shadow_zapped",
        "mmu_unsync",
        "nx_lpage_splits",
        "pages_1g",
        "pages_2m",
        "pages_4k",
        "remote_tlb_flush",
        "remote_tlb_flush_requests",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    remote_tlb_flush: int
    remote_tlb_flush_requests: int
    mmu_shadow_zapped: int
    mmu_pte_write: int
    mmu_pde_zapped: int
    mmu_flooded: int
    mmu_recycled: int
    mmu_cache_miss: int
    mmu_unsync: int
    mmu_shadow_pages: int
    pages_4k: int
    pages_2m: int
    pages_1g: int
    nx_lpage_splits: int
    max_mmu_rmap_size: int
    max_mmu_page_hash_collisions: int

    def as_dict(self) -> dict[str, int]:
        """Name to value."""
        return {name: getattr(self, name) for name in self.__slots__}


class VcpuCounters:
    """The statistics of a vCPU that follow from what the guest does (all cumulative)."""

    __slots__ = (
        "insn_emulation",
        "insn_emulation_fail",
        "invlpg",
        "pf_emulate",
        "pf_fast",
        "pf_fixed",
        "pf_guest",
        "pf_mmio_spte_created",
        "pf_spurious",
        "pf_taken",
        "tlb_flush",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    pf_taken: int
    pf_fixed: int
    pf_emulate: int
    pf_spurious: int
    pf_fast: int
    pf_mmio_spte_created: int
    pf_guest: int
    tlb_flush: int
    invlpg: int
    insn_emulation: int
    insn_emulation_fail: int

    def as_dict(self) -> dict[str, int]:
        """Name to value."""
        return {name: getattr(self, name) for name in self.__slots__}
