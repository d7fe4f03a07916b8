"""MMIO SPTEs: which accesses they are known by (kvm-mmu.md 7.1, 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.mmu import spte

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu


def mmio_gfn(vcpu: VcpuMmu, address: int) -> int | None:
    """The gfn that an MMIO SPTE of the present generation has for an address; None where there is none."""
    sp = vcpu.top_page(address)
    while sp is not None:
        index = address >> 3 + 9 * sp.level & 511
        child = sp.children.get(index)
        if child is None:
            entry = sp.spt.get(index, 0)
            if entry & spte.MMIO and sp.mmio_generation.get(index) == vcpu.mmu.memslots.generations[0]:
                return (entry & spte.ADDRESS & ~spte.MMIO) >> 12
            return None
        sp = child
    return None
