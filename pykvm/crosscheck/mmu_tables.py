"""Random page tables for scenarios of KVM's MMU, and all the ways that lead through them.

The tables are plain numbers until they are written into guest memory: a page is its frame number, and its
entries are by index.  Few indices are used at each level, so that random accesses and random rewrites meet.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pykvm.crosscheck.programs import Source, chance, choose
from pykvm.memory import PAGE_SIZE
from pykvm.x86.bits import Pte

SYSTEM_PAGES: Final = 16
"""Frames 0 to 15: code, handlers, descriptor tables, stacks."""
TABLE_PAGES: Final = range(16, 48)
DATA_PAGES: Final = range(48, 80)
PAGES: Final = 80
ALIAS_GFN: Final = 0x60
"""Where another slot may show some of the frames again."""
HIGH_GFN: Final = 0x200
"""The second frame of 2 MiB."""
LEVELS: Final = 4
SYSTEM_FLAGS: Final = int(Pte.P | Pte.RW | Pte.US | Pte.A)
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_RESERVED: Final = 1 << 51
_STYLES: Final = (
    *(0x67,) * 6, *(0x27,) * 5, *(0x07,) * 6, 0x47, 0x47,
    0x25, 0x05, 0x65, 0x63, 0x23, 0x03, 0x01, 0x66, 0x00,
)  # fmt: skip
"""Low flags of an entry: mostly writable user pages with A and D in all states, then rights that lack."""
_TABLE_STYLES: Final = (
    *(0x27,) * 7, *(0x07,) * 7, 0x67, 0x25, 0x05, 0x23, 0x03, 0x26, 0x00,
)  # fmt: skip
_INDICES: Final = {
    4: (1, 2, 4, 300, 511),
    3: (0, 1, 2, 511),
    2: (0, 1, 2, 511),
    1: (0, 1, 2, 3, 7, 8, 100, 511),
}
"""Which entries are used at a level; index 0 of the root leads to the system's pages, 256 is refused by some
hosts (hosts.md C.1)."""
_MOST_WAYS: Final = 250
_FREE: Final = int(Pte.RW | Pte.US)
_PRESENT, _LARGE = int(Pte.P), int(Pte.PS)


class Way(NamedTuple):
    """A linear address that translates: to frame ``gfn`` by a leaf at ``level``, through the entries
    ``path`` (frame, index) from the root down, all of which allow ``rights`` (RW and US)."""

    linear: int
    gfn: int
    level: int
    path: tuple[tuple[int, int], ...]
    rights: int

    @property
    def free(self) -> bool:
        """Whether user code may store there."""
        return self.rights == _FREE


def canonical(linear: int) -> int:
    """The linear address with its bits 63:48 made copies of bit 47."""
    return linear | 0xFFFF << 48 if linear >> 47 & 1 else linear


@dataclass(slots=True)
class Tables:
    """Tables under construction: ``entries`` by frame and index, ``levels`` by frame."""

    entries: dict[int, dict[int, int]] = field(default_factory=dict)
    levels: dict[int, int] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)
    system: list[tuple[int, int]] = field(default_factory=list)
    """Entries on the way to the system's pages: what breaks them ends the guest."""

    def of_level(self, level: int) -> list[int]:
        """The frames of tables of a level."""
        return [frame for frame, each in self.levels.items() if each == level]

    def ways(self, root: int) -> list[Way]:
        """The ways from a root, as far as entries are present; rights do not matter."""
        found: list[Way] = []
        for way in self._descend(root, LEVELS, 0, (), _FREE):
            found.append(way)
            if len(found) == _MOST_WAYS:
                break
        return found

    def _descend(
        self, frame: int, level: int, linear: int, path: tuple[tuple[int, int], ...], rights: int
    ) -> Iterator[Way]:
        shift = 12 + 9 * (level - 1)
        for index, value in self.entries.get(frame, {}).items():
            if not value & _PRESENT:
                continue
            address, gfn = linear | index << shift, (value & _ADDRESS) >> 12
            steps = (*path, (frame, index))
            left = 0 if value & _RESERVED else rights & value
            if level == 1 or (value & _LARGE and level < LEVELS):
                yield Way(canonical(address), gfn, level, steps, left)
            else:
                yield from self._descend(gfn, level - 1, address, steps, left)

    def image(self, frame: int) -> bytes:
        """The entries of a frame as bytes."""
        data = bytearray(PAGE_SIZE)
        for index, value in self.entries[frame].items():
            struct.pack_into("<Q", data, 8 * index, value)
        return bytes(data)


def random_tables(source: Source) -> Tables:
    """One to three roots over a few shared tables."""
    tables = Tables()
    free = iter(TABLE_PAGES)

    def new(level: int) -> int:
        frame = next(free)
        tables.levels[frame], tables.entries[frame] = level, {}
        return frame

    for level, most in ((4, 3), (3, 2), (2, 3), (1, 4)):
        for _ in range(source.integer(1, most)):
            new(level)
    tables.roots = tables.of_level(4)
    _add_system(source, tables, [new(level) for level in (3, 2, 1)])
    for frame, level in list(tables.levels.items()):
        if (frame, 0) in tables.system and level < LEVELS:
            continue
        for index in _INDICES[level]:
            if chance(source, 30):
                continue
            tables.entries[frame][index] = random_entry(source, tables, level, frame)
    return tables


def _add_system(source: Source, tables: Tables, chain: Sequence[int]) -> None:
    """Frames 0 to 79 at the linear addresses that equal their own, for all roots."""
    flags = choose(source, (SYSTEM_FLAGS, SYSTEM_FLAGS & ~int(Pte.A)))
    third, second, first = chain
    for root in tables.roots:
        tables.entries[root][0] = third << 12 | flags
        tables.system.append((root, 0))
    tables.entries[third][0] = second << 12 | flags
    tables.entries[second][0] = first << 12 | flags
    tables.system += [(third, 0), (second, 0), *((first, index) for index in range(SYSTEM_PAGES))]
    for frame in range(PAGES):
        style = flags if frame < SYSTEM_PAGES else choose(source, _STYLES)
        tables.entries[first][frame] = frame << 12 | style
    for index in _INDICES[2][1:]:
        if chance(source, 40):
            tables.entries[second][index] = random_entry(source, tables, 2, second)


def random_entry(source: Source, tables: Tables, level: int, frame: int) -> int:
    """An entry for a table of ``level``: what it points to usually is what belongs there."""
    flags = choose(source, _STYLES if level == 1 else _TABLE_STYLES)
    if level == 2 and chance(source, 15):
        flags = choose(source, _STYLES) | int(Pte.PS)
        return _odd(source, choose(source, (0, 0, HIGH_GFN << 12)) | flags)
    return _odd(source, _target(source, tables, level, frame) << 12 | flags)


def _target(source: Source, tables: Tables, level: int, frame: int) -> int:
    """A frame: mostly of data for a leaf, of a table of the next level for the others."""
    kind = source.integer(0, 19)
    if level == 1:
        if kind < 12:
            return choose(source, DATA_PAGES[:12])
        if kind < 18:
            return choose(source, list(tables.levels))
        return choose(source, (ALIAS_GFN, ALIAS_GFN + 1, HIGH_GFN, 0x90))
    if kind < 16:
        return choose(source, tables.of_level(level - 1))
    if kind < 18:
        return frame
    anything: list[int] = [*tables.levels, *DATA_PAGES[:2], 0x90]
    return choose(source, anything)


def _odd(source: Source, value: int) -> int:
    """Now and then bits that change nothing (G, PCD, ignored ones), NX, or a reserved one."""
    kind = source.integer(0, 39)
    return value | _EXTRA.get(kind, 0)


_EXTRA: Final[dict[int, int]] = {
    39: _RESERVED, 38: int(Pte.NX), 37: int(Pte.NX), 36: int(Pte.G), 35: int(Pte.PCD), 34: 0x600,
}  # fmt: skip


def sort_ways(ways: Sequence[Way], levels: Mapping[int, int]) -> tuple[list[Way], list[Way]]:
    """The ways that end at tables, and those that end elsewhere but the system's pages."""
    at_tables = [way for way in ways if way.gfn in levels and way.level == 1]
    elsewhere = [way for way in ways if way.gfn not in levels and (way.gfn >= SYSTEM_PAGES or way.level > 1)]
    return at_tables, elsewhere
