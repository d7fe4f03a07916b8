"""Building guest page tables, in every paging mode, with chosen flags per mapping (SDM vol. 3, chapter 4)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final, NamedTuple

import numpy as np

from pykvm.errors import UsageError
from pykvm.memory import GuestMemory
from pykvm.x86.bits import PAGE_SHIFT, PAGE_SIZE, Pte


class PagingMode(Enum):
    """The paging modes (SDM vol. 3, 4.1.1)."""

    LEGACY32 = "32-bit"
    PAE = "PAE"
    LONG4 = "4-level"
    LONG5 = "5-level"


class _Level(NamedTuple):
    shift: int  # of the lowest linear-address bit that indexes the table
    bits: int  # how many bits index it
    leaf: bool  # whether its entries may map a page


class _Format(NamedTuple):
    entry: int  # bytes per entry
    linear: int  # bits of a linear address
    physical: int  # bits of a physical address that an entry can hold
    levels: tuple[_Level, ...]


_LOW = (_Level(30, 9, True), _Level(21, 9, True), _Level(12, 9, True))
_FORMATS: Final = {
    PagingMode.LEGACY32: _Format(4, 32, 32, (_Level(22, 10, True), _Level(12, 10, True))),
    PagingMode.PAE: _Format(8, 32, 52, (_Level(30, 2, False), _Level(21, 9, True), _Level(12, 9, True))),
    PagingMode.LONG4: _Format(8, 48, 52, (_Level(39, 9, False), *_LOW)),
    PagingMode.LONG5: _Format(8, 57, 52, (_Level(48, 9, False), _Level(39, 9, False), *_LOW)),
}

SUPERVISOR: Final = Pte.P | Pte.RW | Pte.A | Pte.D
USER: Final = SUPERVISOR | Pte.US
"""Leaf flags with A and D set, so that the CPU never writes the tables by itself."""

_TABLE: Final = Pte.P | Pte.RW | Pte.US | Pte.A


class PageTables:
    """Page tables under construction.

    Tables are written into ``memory``, where offset and guest-physical address must be the same, into pages
    that ``allocate`` hands out (their gpa; zeroed by this class).  Mapping 1 TiB with 2 MiB pages takes 4 MiB
    of tables, with 4 KiB pages 2 GiB.
    """

    def __init__(self, mode: PagingMode, memory: GuestMemory, allocate: Callable[[], int]) -> None:
        self.mode = mode
        self._memory = memory
        self._allocate = allocate
        self._format = _FORMATS[mode]
        self._tables: list[int] = []
        self._children: dict[int, int] = {}  # gpa of an entry: gpa of the table it points to
        self._root = self._new_table()

    @property
    def cr3(self) -> int:
        """The value for CR3."""
        return self._root

    @property
    def tables(self) -> tuple[int, ...]:
        """The gfns of all tables in the order they were made, the root first."""
        return tuple(gpa >> PAGE_SHIFT for gpa in self._tables)

    def map(
        self,
        linear: int,
        physical: int,
        size: int,
        *,
        page_size: int = PAGE_SIZE,
        flags: int = USER,
        table_flags: int = _TABLE,
    ) -> None:
        """Map ``size`` bytes at ``linear`` to ``physical`` with pages of ``page_size`` bytes.

        ``flags`` go into the leaf entries as they are (PS is added where the level needs it), ``table_flags``
        into tables that this call creates (PAE's top level takes only P, PWT and PCD of them).  4 KiB pages
        exist in all modes, 4 MiB in 32-bit mode (CR4.PSE), 2 MiB in the others, 1 GiB in 4- and 5-level mode
        (CPUID 0x80000001 EDX bit 26).  Raises UsageError for misaligned or unrepresentable addresses, a page
        size that the mode lacks, and linear addresses that are already mapped.
        """
        depth = self._leaf_depth(page_size)
        self._check(linear, physical, size, page_size)
        level = self._format.levels[depth]
        linear &= (1 << self._format.linear) - 1
        if page_size > PAGE_SIZE:
            flags |= Pte.PS
        pages = size // page_size
        while pages:
            table = self._descend(linear, depth, table_flags)
            index = linear >> level.shift & (1 << level.bits) - 1
            count = min(pages, (1 << level.bits) - index)
            self._fill(table, index, count, physical, page_size, flags)
            pages -= count
            linear += count * page_size
            physical += count * page_size

    def entry_address(self, linear: int, page_size: int = PAGE_SIZE) -> int:
        """The gpa of the leaf entry for ``linear``, whose tables must exist (UsageError otherwise)."""
        depth = self._leaf_depth(page_size)
        linear &= (1 << self._format.linear) - 1
        table = self._root
        for level in self._format.levels[:depth]:
            at = self._entry(table, linear, level)
            if at not in self._children:
                raise UsageError(f"Linear address {linear:#x} has no page table.")
            table = self._children[at]
        return self._entry(table, linear, self._format.levels[depth])

    # --- inside ----------------------------------------------------------------------------------

    def _leaf_depth(self, page_size: int) -> int:
        for depth, level in enumerate(self._format.levels):
            if level.leaf and 1 << level.shift == page_size:
                return depth
        raise UsageError(f"{self.mode.value} paging has no pages of {page_size:#x} bytes.")

    def _check(self, linear: int, physical: int, size: int, page_size: int) -> None:
        if size <= 0 or (linear | physical | size) % page_size:
            raise UsageError(f"linear, physical and size must be multiples of the page size {page_size:#x}.")
        if physical < 0 or physical + size > 1 << self._format.physical:
            raise UsageError(
                f"Physical [{physical:#x}, {physical + size:#x}) does not fit a page-table entry."
            )
        half = 1 << self._format.linear - 1
        last = linear + size - 1
        if self._format.linear == 32:
            fits = linear >= 0 and last < 1 << 32
        else:
            fits = (linear >= 0 and last < half) or ((1 << 64) - half <= linear and last < 1 << 64)
        if not fits:
            raise UsageError(
                f"Linear [{linear:#x}, {linear + size:#x}) is not a canonical range of the mode."
            )

    def _entry(self, table: int, linear: int, level: _Level) -> int:
        return table + (linear >> level.shift & (1 << level.bits) - 1) * self._format.entry

    def _new_table(self) -> int:
        gpa = self._allocate()
        self._memory.write(gpa, bytes(PAGE_SIZE))
        self._tables.append(gpa)
        return gpa

    def _descend(self, linear: int, depth: int, table_flags: int) -> int:
        table = self._root
        for number, level in enumerate(self._format.levels[:depth]):
            at = self._entry(table, linear, level)
            if at not in self._children:
                if any(self._memory.read(at, self._format.entry)):
                    raise UsageError(f"Linear address {linear:#x} is already mapped by a larger page.")
                child = self._new_table()
                flags = table_flags
                if self.mode is PagingMode.PAE and number == 0:
                    flags &= Pte.P | Pte.PWT | Pte.PCD
                self._memory.write(at, (child | flags).to_bytes(self._format.entry, "little"))
                self._children[at] = child
            table = self._children[at]
        return table

    def _fill(self, table: int, index: int, count: int, physical: int, page_size: int, flags: int) -> None:
        at = table + index * self._format.entry
        if any(self._memory.read(at, count * self._format.entry)):
            raise UsageError(f"Part of the linear range for {physical:#x} is already mapped.")
        entries = np.arange(count, dtype=np.uint64) * np.uint64(page_size) + np.uint64(physical | flags)
        self._memory.write(at, entries.astype(f"<u{self._format.entry}").tobytes())
