"""Reverse maps: from a gfn to the leaf SPTEs that map it (kvm-mmu.md 10.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pykvm.model.mmu.shadow_page import ShadowPage

RmapEntry = tuple["ShadowPage", int]
"""An SPTE: its shadow page and the index in it."""


class Rmap:
    """The rmap heads of one slot: by level of the leaf and gfn, the SPTEs in the order they were added."""

    __slots__ = ("heads",)

    def __init__(self) -> None:
        self.heads: tuple[dict[int, list[RmapEntry]], ...] = ({}, {}, {}, {})
        """Index is the level; index 0 is unused.  Keys are the first gfn of the leaf."""

    def entries(self, level: int, gfn: int) -> list[RmapEntry]:
        """The SPTEs of ``level`` that map the gfn (a new empty list where there are none)."""
        return self.heads[level].get(gfn >> 9 * (level - 1) << 9 * (level - 1), [])

    def add(self, level: int, gfn: int, entry: RmapEntry) -> int:
        """Add an SPTE: how many there were before."""
        chain = self.heads[level].setdefault(gfn, [])
        chain.append(entry)
        return len(chain) - 1

    def remove(self, level: int, gfn: int, entry: RmapEntry) -> None:
        """Take an SPTE out that is there."""
        chain = self.heads[level][gfn]
        if len(chain) == 1:
            del self.heads[level][gfn]
        else:
            chain.remove(entry)
