"""One tree of second-stage page tables, kept as what of it exists (kvm-mmu.md 11.1).

Leaves are kept by level in dictionaries and page tables in further ones, so that a tree costs what the guest
touched, not what its memory spans.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

LARGEST_LEAF: Final = 3
"""1 GiB: the level of the largest leaf."""
ENTRIES: Final = 512


class TdpRoot:
    """The tables below one root, for one address space.

    ``leaves[level]`` maps gfn >> 9*(level-1) to the leaf SPTE (levels 1 to 3; index 0 is unused).
    ``tables[level]`` maps gfn >> 9*level to whether the page table of that level, which covers that range,
    exists only because of the NX mitigation (``nx_huge_page_disallowed``); the root itself is not among them.
    A range has a leaf or a table, never both.  ``mmio`` maps a gfn without a memslot to the memslot
    generation that its MMIO SPTE carries.
    """

    __slots__ = ("as_id", "invalid", "leaves", "level", "mmio", "small", "tables")

    def __init__(self, as_id: int, level: int) -> None:
        self.as_id = as_id
        self.level = level
        self.invalid = False
        """``role.invalid``: its vCPUs take another root at their next entry."""
        self.leaves: tuple[dict[int, int], ...] = ({}, {}, {}, {})
        self.small = self.leaves[1]
        """The leaves of level 1, for speed."""
        self.tables: tuple[dict[int, bool], ...] = tuple({} for _ in range(level))
        self.mmio: dict[int, int] = {}

    def leaf(self, gfn: int) -> tuple[int, int]:
        """The SPTE that maps the gfn, and its level; (0, 0) where there is none."""
        spte = self.small.get(gfn)
        if spte is not None:
            return spte, 1
        spte = self.leaves[2].get(gfn >> 9)
        if spte is not None:
            return spte, 2
        spte = self.leaves[3].get(gfn >> 18)
        if spte is not None:
            return spte, 3
        return 0, 0

    def set_flags(self, gfn: int, flags: int) -> None:
        """The processor sets A or D in the leaf that maps the gfn."""
        spte, level = self.leaf(gfn)
        self.leaves[level][gfn >> 9 * (level - 1)] = spte | flags

    def maps_mmio(self, gfn: int) -> bool:
        """Whether the gfn has an MMIO SPTE, current or not."""
        return gfn in self.mmio

    def within(self, level: int, first: int, last: int) -> list[int]:
        """Keys of the leaves of ``level`` that map a gfn from first to last, ascending."""
        return _between(self.leaves[level], first >> 9 * (level - 1), last >> 9 * (level - 1))

    def tables_within(self, level: int, first: int, last: int) -> list[int]:
        """Keys of the page tables of ``level`` that lie wholly within gfns first to last, ascending."""
        shift = 9 * level
        return _between(self.tables[level], -(-first >> shift), (last + 1 >> shift) - 1)

    def children(self, level: int, key: int) -> Iterator[int]:
        """Keys of the leaves that are entries of the page table ``key`` of ``level``."""
        leaves = self.leaves[level]
        return (index for index in range(key << 9, key + 1 << 9) if index in leaves)


def _between(entries: dict[int, int] | dict[int, bool], first: int, last: int) -> list[int]:
    if last - first + 1 < len(entries):
        return [key for key in range(first, last + 1) if key in entries]
    return sorted(key for key in entries if first <= key <= last)
