"""The TDP MMU (being written)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pykvm.model.mmu.vm import Mmu


class TdpMmu:
    """Second-stage page tables without shadow pages."""

    def __init__(self, mmu: Mmu) -> None:
        self.mmu = mmu
