"""The shadow MMU (being written)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pykvm.model.mmu.vm import Mmu


class ShadowMmu:
    """Shadow pages of a VM."""

    def __init__(self, mmu: Mmu) -> None:
        self.mmu = mmu
        self.uses_rmaps = True

    def memory_resized(self) -> None:
        """Slots came or went."""
