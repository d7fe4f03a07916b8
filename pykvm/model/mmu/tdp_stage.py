"""The second stage as the processor sees it: whatever tables KVM made for a vCPU with nested paging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pykvm.model.mmu.spte import MMIO, MMU_PRESENT

if TYPE_CHECKING:
    from pykvm.model.mmu.shadow_page import ShadowPage
    from pykvm.model.mmu.vcpu import VcpuMmu


class SecondStage(Protocol):
    """Tables from guest-physical to host memory: those of the TDP MMU, or direct shadow pages."""

    @property
    def small(self) -> dict[int, int]:
        """Leaves of level 1 by gfn, as far as they are kept so: looked at first, for speed."""

    @property
    def invalid(self) -> bool:
        """Whether the tables were zapped, so that others are to be loaded."""

    def leaf(self, gfn: int) -> tuple[int, int]:
        """The SPTE that maps the gfn, and its level; (0, 0) where there is none."""

    def set_flags(self, gfn: int, flags: int) -> None:
        """The processor sets A or D in the leaf that maps the gfn."""

    def maps_mmio(self, gfn: int) -> bool:
        """Whether the gfn has an MMIO SPTE, current or not."""


class DirectPages:
    """Direct shadow pages below the vCPU's root: nested paging without the TDP MMU (kvm.tdp_mmu=N)."""

    invalid = False

    def __init__(self, vcpu: VcpuMmu) -> None:
        self._vcpu = vcpu
        self.small: dict[int, int] = {}

    def _entry(self, gfn: int) -> tuple[ShadowPage, int] | None:
        """The last page of the walk, and the index in it."""
        sp = self._vcpu.top_page(gfn << 12)
        if sp is None:
            return None
        while True:
            index = gfn >> 9 * (sp.level - 1) & 511
            child = sp.children.get(index)
            if child is None:
                return sp, index
            sp = child

    def leaf(self, gfn: int) -> tuple[int, int]:
        found = self._entry(gfn)
        if found is None:
            return 0, 0
        sp, index = found
        spte = sp.spt.get(index, 0)
        return (spte, sp.level) if spte & MMU_PRESENT else (0, 0)

    def set_flags(self, gfn: int, flags: int) -> None:
        found = self._entry(gfn)
        assert found is not None, "the gfn is mapped"
        sp, index = found
        sp.spt[index] |= flags

    def maps_mmio(self, gfn: int) -> bool:
        found = self._entry(gfn)
        return found is not None and bool(found[0].spt.get(found[1], 0) & MMIO)
