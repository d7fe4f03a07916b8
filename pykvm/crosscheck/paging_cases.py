"""The product of page-table bits, control bits and kinds of access, as numbered cases.

A case is one access to one linear address whose path of entries, from the root to the leaf, is ordinary but
for the leaf and one entry above it.  Its number means the same on every host; which numbers can run depends
on the processor's features.  The idea is that of the access test of kvm-unit-tests.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import product
from math import prod
from typing import Final, NamedTuple, Self

from pykvm.errors import UsageError
from pykvm.x86.bits import Cr0, Cr4, Efer, Pte, Rflags
from pykvm.x86.cpuid import CpuidEntry, find, has_1g_pages, has_la57, physical_address_bits

LINEAR: Final = 1 << 48 | 1 << 39 | 2 << 30 | 1 << 21 | 3 << 12 | 0x120
"""The address accessed: with five levels the entries 1, 1, 2, 1 and 3, and an offset; with fewer its lower
bits."""
KEY: Final = 5
"""The protection key of every leaf of 4 and 5 levels."""
_KEY_BITS: Final = KEY << 59
_ALL_RIGHTS: Final = int(Pte.RW | Pte.US)
_BIT_51: Final = 1 << 51
_IGNORED: Final = 7 << 9 | 0x7F << 52
"""Bits 11:9 and 58:52 (SDM vol. 3, tables 4-15 to 4-20)."""
_LOWEST_IN_FRAME: Final = {21: 1 << 13, 22: 1 << 21, 30: 1 << 13}
"""By page shift the lowest bit of a frame's address that is reserved (PSE-36 uses bits 20:13)."""


class Features(NamedTuple):
    """What decides whether a case can run.

    ``physical_bits`` is MAXPHYADDR.  ``legacy`` is 32-bit and PAE paging, which no CPUID bit announces: some
    hosts can page in long mode only (docs/reference/hosts.md C.1).
    """

    physical_bits: int
    nx: bool
    pages_1g: bool
    la57: bool
    smep: bool
    smap: bool
    pku: bool
    legacy: bool = True

    @classmethod
    def of(cls, cpuid: Iterable[CpuidEntry]) -> Self:
        """From CPUID leaves (SDM vol. 2, CPUID)."""
        leaves = list(cpuid)
        leaf7, extended = find(leaves, 7), find(leaves, 0x80000001)
        return cls(
            physical_bits=physical_address_bits(leaves),
            nx=bool(extended and extended.edx >> 20 & 1),
            pages_1g=has_1g_pages(leaves),
            la57=has_la57(leaves),
            smep=bool(leaf7 and leaf7.ebx >> 7 & 1),
            smap=bool(leaf7 and leaf7.ebx >> 20 & 1),
            pku=bool(leaf7 and leaf7.ecx >> 3 & 1),
        )

    def common(self, other: Features) -> Features:
        """What both have; the wider physical address, beyond which bits are reserved for either."""
        bits = max(self.physical_bits, other.physical_bits)
        return Features(bits, *(a and b for a, b in zip(self[1:], other[1:], strict=True)))

    @property
    def left_out(self) -> tuple[str, ...]:
        """The dimensions of the product that cannot be tried."""
        missing = (
            (self.nx, "EFER.NXE = 1"),
            (self.legacy, "32-bit and PAE paging"),
            (self.la57, "5-level paging"),
            (self.smep, "CR4.SMEP = 1"),
            (self.smap, "CR4.SMAP = 1"),
            (self.pku, "CR4.PKE = 1"),
            (self.pages_1g, "1 GiB pages that work (PS of a PDPTE is a reserved bit here)"),
            (self.physical_bits < 52, "reserved address bits"),
        )
        return tuple(name for there, name in missing if not there)


class Kind(Enum):
    """What is done: the instruction, and whether it writes to the target."""

    READ = "read"
    WRITE = "write"
    EXCHANGE = "exchange"
    FETCH = "fetch"
    LOAD_SEGMENT = "descriptor read by a segment load"
    MARK_SEGMENT = "descriptor marked accessed by a segment load"


class Shape(NamedTuple):
    """Levels of paging (2 is 32-bit paging, 3 is PAE), bits of the page's offset, and which entry above the
    leaf is out of the ordinary (0 is the root's), None where there is none that could be."""

    levels: int
    page_shift: int
    upper: int | None

    @property
    def depth(self) -> int:
        """Entries on the path, the leaf among them."""
        return self.levels - (self.page_shift > 12) - (self.page_shift > 22)

    @property
    def entry_bytes(self) -> int:
        """Size of an entry."""
        return 4 if self.levels == 2 else 8

    @property
    def linear(self) -> int:
        """The address accessed."""
        return LINEAR & (1 << {2: 32, 3: 32, 4: 47, 5: 56}[self.levels]) - 1

    def entry_offset(self, level: int) -> int:
        """Where in its table the entry for the address lies; level 0 is the root's."""
        bits = 10 if self.levels == 2 else 9
        return self.entry_bytes * (self.linear >> 12 + bits * (self.levels - 1 - level) & (1 << bits) - 1)


class Control(NamedTuple):
    """Control bits; ``ac`` matters with SMAP only, ``rights`` of key 5 (PKRU) with PKE only."""

    wp: bool
    nxe: bool
    smep: bool
    smap: bool
    ac: bool
    pke: bool
    rights: int


class Upper(NamedTuple):
    """The entry above the leaf; ``others`` are the A flag of the remaining ones.

    ``reserved`` is no bit, bit 51, bit 8, or the lowest one that is reserved there.
    """

    flags: int
    reserved: str
    others: int


class Leaf(NamedTuple):
    """The leaf; ``reserved`` as of Upper, for large pages the lowest one lies in the frame's address."""

    flags: int
    reserved: str


def _rights() -> Iterator[int]:
    for rw, us, nx in product((Pte.RW, 0), (Pte.US, 0), (0, Pte.NX)):
        yield int(rw | us | nx | Pte.P)


_P, _A, _D, _NX = int(Pte.P), int(Pte.A), int(Pte.D), int(Pte.NX)
_ABSENT: Final = (0, _ALL_RIGHTS | _A | _D | _NX | _BIT_51 | _IGNORED)

_KINDS: Final = tuple(product(Kind, (3, 0)))
_CONTROLS: Final = tuple(
    Control(wp, nxe, smep, smap, ac, pke, rights)
    for wp, nxe, smep, (smap, ac), (pke, rights) in product(
        (True, False),
        (False, True),
        (False, True),
        ((False, False), (True, False), (True, True)),
        ((False, 3), *((True, rights) for rights in range(4))),
    )
)
_LEAVES: Final = (
    *(Leaf(rights | ad, "") for rights, ad in product(_rights(), (0, _A, _D, _A | _D))),
    *(Leaf(flags | _P, which) for flags, which in product((_ALL_RIGHTS, _A | _NX), ("51", "lowest"))),
    *(Leaf(flags, "") for flags in _ABSENT),
    *(Leaf(flags | _P | _ALL_RIGHTS | _IGNORED, "") for flags in (0, _A | _D)),
)
_UPPERS: Final = (
    *(Upper(rights | a, "", others) for rights, a, others in product(_rights(), (0, _A), (0, _A))),
    *(Upper(_P | _ALL_RIGHTS, which, 0) for which in ("51", "lowest", "8")),
    *(Upper(flags, "", 0) for flags in _ABSENT),
    Upper(_P | _ALL_RIGHTS | _IGNORED | _D, "", _A),
)
_ORDINARY: Final = Upper(_P | _ALL_RIGHTS, "", 0)


def _paths() -> Iterator[tuple[Shape, Upper]]:
    """Every upper entry at every place, without those that make the same path."""
    for levels in (4, 5):
        for shift in (12, 21, 30):
            seen = set()
            depth = Shape(levels, shift, None).depth
            for place, upper in product(range(depth - 1), _UPPERS):
                others = _ORDINARY.flags | upper.others
                path = tuple(upper[:2] if at == place else (others, "") for at in range(depth - 1))
                if path not in seen:
                    seen.add(path)
                    yield Shape(levels, shift, place), upper
    # PAE's PDPTEs have none of the bits, so only a PDE is left; 4-byte entries have no upper half.
    yield from ((Shape(3, 12, 1), upper) for upper in _UPPERS if not upper.others)
    yield Shape(3, 21, None), _ORDINARY
    narrow = (upper for upper in _UPPERS if not (upper.others or upper.flags & _NX or upper.reserved))
    yield from ((Shape(2, 12, 0), upper) for upper in narrow)
    yield Shape(2, 22, None), _ORDINARY


_PATHS: Final = tuple(_paths())
_DIGITS: Final = (len(_KINDS), len(_CONTROLS), len(_LEAVES), len(_PATHS))
TOTAL: Final = prod(_DIGITS)
"""Cases on a processor with every feature.  All differ but in 32-bit paging, where leaves whose upper half
differs are the same."""


def first_legacy() -> int:
    """The index of an access by PAE paging that every right permits."""
    path = next(number for number, (shape, _) in enumerate(_PATHS) if shape.levels == 3)
    return path * prod(_DIGITS[:-1])


@dataclass(frozen=True, slots=True)
class PagingCase:
    """One case; see the module."""

    index: int
    kind: Kind
    cpl: int
    control: Control
    leaf: Leaf
    upper: Upper
    shape: Shape

    @classmethod
    def from_index(cls, index: int) -> Self:
        """Raises UsageError for a number outside [0, TOTAL)."""
        if not 0 <= index < TOTAL:
            raise UsageError(f"Paging case {index} does not exist; there are {TOTAL}.")
        rest, chosen = index, []
        for size in _DIGITS:
            rest, digit = divmod(rest, size)
            chosen.append(digit)
        kind, control, leaf, path = chosen
        shape, upper = _PATHS[path]
        return cls(index, *_KINDS[kind], _CONTROLS[control], _LEAVES[leaf], upper, shape)

    def entries(self, tables: int, frame: int, physical_bits: int) -> tuple[tuple[int, int], ...]:
        """(gpa, value) of the path's entries, the root's first.

        The tables lie in the pages from ``tables`` on, one per level; ``frame`` is the page's address.
        """
        shape, path = self.shape, []
        for level in range(shape.depth):
            if level == shape.depth - 1:
                entry = frame | self._leaf(physical_bits)
            elif level == shape.upper:
                entry = tables + (level + 1 << 12) | self._upper(physical_bits)
            elif shape.levels == 3 and level == 0:
                entry = tables + (level + 1 << 12) | _P
            else:
                entry = tables + (level + 1 << 12) | _ORDINARY.flags | self.upper.others
            at = tables + (level << 12) + shape.entry_offset(level)
            path.append((at, entry & (1 << 8 * shape.entry_bytes) - 1))
        return tuple(path)

    def _leaf(self, physical_bits: int) -> int:
        shift = self.shape.page_shift
        reserved = {
            "": 0,
            "51": _BIT_51,
            "lowest": _LOWEST_IN_FRAME.get(shift, 1 << min(physical_bits, 51)),
        }[self.leaf.reserved]
        key = _KEY_BITS if self.shape.levels > 3 else 0
        return self.leaf.flags | reserved | key | (int(Pte.PS) if shift > 12 else 0)

    def _upper(self, physical_bits: int) -> int:
        at_top = self._level_of_upper > 2
        reserved = {
            "": 0,
            "51": _BIT_51,
            "lowest": int(Pte.PS) if at_top else 1 << min(physical_bits, 51),
            "8": int(Pte.G),
        }[self.upper.reserved]
        return self.upper.flags | reserved

    @property
    def _level_of_upper(self) -> int:
        """1 is a PDE, 4 a PML5E."""
        return self.shape.levels - 1 - (self.shape.upper or 0)

    @property
    def linear(self) -> int:
        """The address that is accessed."""
        return self.shape.linear

    @property
    def cr0(self) -> int:
        """CR0.WP of the case, and paging."""
        return int(Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.PG) | (self.control.wp and int(Cr0.WP))

    @property
    def cr4(self) -> int:
        """CR4 with the case's bits."""
        control = self.control
        value = int(Cr4.OSFXSR | Cr4.OSXMMEXCPT | (Cr4.PSE if self.shape.levels == 2 else Cr4.PAE))
        for there, bit in (
            (self.shape.levels == 5, Cr4.LA57),
            (control.smep, Cr4.SMEP),
            (control.smap, Cr4.SMAP),
            (control.pke, Cr4.PKE),
        ):
            value |= int(bit) if there else 0
        return value

    @property
    def efer(self) -> int:
        """EFER with the case's NXE."""
        long_mode = int(Efer.LME | Efer.LMA) if self.shape.levels > 3 else 0
        return long_mode | (self.control.nxe and int(Efer.NXE))

    @property
    def rflags(self) -> int:
        """RFLAGS with the case's AC, and the ports allowed at CPL 3."""
        return int(Rflags.FIXED | Rflags.IOPL3) | (self.control.ac and int(Rflags.AC))

    @property
    def pkru(self) -> int:
        """PKRU: the case's rights for key 5, none for the others."""
        return 0xFFFFFFFF & ~(3 << 2 * KEY) | self.control.rights << 2 * KEY

    def can_run(self, features: Features) -> bool:
        """Whether the processor has what the case needs."""
        return not self.missing(features)

    def missing(self, features: Features) -> str:
        """The first feature that the case needs and the processor lacks; empty if there is none."""
        control = self.control
        needs = (
            (control.nxe and not features.nx, "NX"),
            (self.shape.levels == 5 and not features.la57, "LA57"),
            (self.shape.levels < 4 and not features.legacy, "paging outside long mode"),
            (control.smep and not features.smep, "SMEP"),
            (control.smap and not features.smap, "SMAP"),
            (control.pke and not features.pku, "PKU"),
            (
                features.physical_bits > 51 and bool(self.leaf.reserved + self.upper.reserved),
                "a reserved bit",
            ),
        )
        return next((name for lacking, name in needs if lacking), "")

    def describe(self) -> str:
        """In words."""
        control, shape = self.control, self.shape
        switches = [
            f"CR0.WP={control.wp:d}",
            f"EFER.NXE={control.nxe:d}",
            f"CR4.SMEP={control.smep:d}",
            f"CR4.SMAP={control.smap:d}" + (f" RFLAGS.AC={control.ac:d}" if control.smap else ""),
            f"CR4.PKE={control.pke:d}" + (f" rights {control.rights}" if control.pke else ""),
        ]
        size = {12: "4 KiB", 21: "2 MiB", 22: "4 MiB", 30: "1 GiB"}[shape.page_shift]
        mode = {2: "32-bit paging", 3: "PAE paging"}.get(shape.levels, f"{shape.levels} levels")
        text = (
            f"case {self.index}: {self.kind.value} at CPL {self.cpl}, {mode}, {size} page, "
            f"{', '.join(switches)}; leaf {_flags(*self.leaf)}"
        )
        if shape.upper is None:
            return text
        level = ("PTE", "PDE", "PDPTE", "PML4E", "PML5E")[self._level_of_upper]
        others = f"; A={bool(self.upper.others):d} in the other entries" if shape.levels > 3 else ""
        return f"{text}; {level} {_flags(*self.upper[:2])}{others}"


def _flags(flags: int, reserved: str) -> str:
    names = [str(bit.name) for bit in Pte if flags & bit]
    if flags & _IGNORED:
        names.append("ignored bits")
    if reserved or flags & _BIT_51:
        names.append(f"bit {reserved}" if reserved == "8" else f"reserved ({reserved or '51'})")
    return "+".join(names) or "0"


class Runnable:
    """The cases that a processor can run, numbered from 0 on."""

    def __init__(self, features: Features) -> None:
        allowed = []
        step = 1
        for size in _DIGITS:
            # A case can run if each of its digits can, and the first of each needs no feature.
            indices = range(0, step * size, step)
            allowed.append([index for index in indices if PagingCase.from_index(index).can_run(features)])
            step *= size
        self._allowed = allowed

    def __len__(self) -> int:
        return prod(len(digits) for digits in self._allowed)

    def __getitem__(self, number: int) -> int:
        """The index of a case.  Raises IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        index = 0
        for digits in self._allowed:
            number, digit = divmod(number, len(digits))
            index += digits[digit]
        return index

    def shuffled(self, seed: int) -> Iterator[int]:
        """Indices at random, for ever; one may come again."""
        choose = random.Random(seed)
        while True:
            yield self[choose.randrange(len(self))]
