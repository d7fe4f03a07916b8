"""What decides about a page walk, and the formats of the paging structures (SDM vol. 3, chapter 4)."""

from __future__ import annotations

from enum import Enum, IntFlag, auto
from functools import lru_cache
from typing import Final, NamedTuple

from pykvm.x86.bits import Cr4, Efer, Pte

ADDRESS: Final = 0x000F_FFFF_FFFF_F000
"""Bits 51:12 of an entry: the physical address of a table or page."""

_PS36_BITS: Final = 40
"""PSE-36 addresses have at most that many bits (SDM vol. 3, 4.3)."""


class Access(IntFlag):
    """What is done with a linear address, and in which mode.

    USER is CPL 3; IMPLICIT marks accesses to descriptor tables and the TSS, which are supervisor-mode
    accesses whatever the CPL (SDM vol. 3, 4.6) and override USER.
    """

    READ = 0
    WRITE = 1
    FETCH = 2
    USER = 4
    IMPLICIT = 8


class Control(NamedTuple):
    """The processor state that a walk depends on.

    ``ac`` is RFLAGS.AC, ``pkru`` and ``pkrs`` the protection-key rights for user-mode and supervisor-mode
    addresses, ``pdptrs`` the PDPTE registers of PAE paging.  The rest is CPUID: ``physical_bits`` is
    MAXPHYADDR (32 to 52), ``pages_1g`` and ``pse36`` page sizes, ``amd`` the reserved bits of AMD.
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    ac: bool = False
    pkru: int = 0
    pkrs: int = 0
    pdptrs: tuple[int, int, int, int] = (0, 0, 0, 0)
    physical_bits: int = 46
    pages_1g: bool = True
    pse36: bool = True
    amd: bool = False


class Rule(Enum):
    """What ended a walk.  ``paging_explain`` has the words."""

    NO_PAGING = auto()
    PERMITTED = auto()
    NO_MEMORY = auto()
    NOT_PRESENT = auto()
    RESERVED = auto()
    SUPERVISOR_PAGE = auto()
    READ_ONLY = auto()
    EXECUTE_DISABLE = auto()
    SMEP = auto()
    SMAP = auto()
    KEY = auto()


class Level(NamedTuple):
    """One level of a format.

    The linear-address bits from ``shift`` on, as many as ``mask`` has, index the table.  ``page`` is the
    bit that makes an entry map a page: PS, or P at the lowest level, or none (0).  ``table_reserved`` and
    ``page_reserved`` must be zero in a present entry that points to a table or maps a page; ``offset``
    covers the linear-address bits within such a page.
    """

    name: str
    shift: int
    mask: int
    page: int
    table_reserved: int
    page_reserved: int
    offset: int


class Format(NamedTuple):
    """A paging mode; ``levels`` from the root (for PAE from the page directory), ``entry`` in bytes."""

    name: str
    entry: int
    root: int
    levels: tuple[Level, ...]


_MODE_CR4: Final = int(Cr4.PSE | Cr4.PAE | Cr4.LA57)
_MODE_EFER: Final = int(Efer.LMA | Efer.NXE)
_PAGING_32: Final = "32-bit paging"
PAE: Final = "PAE paging"


def format_of(control: Control) -> Format:
    """The format in use, given that CR0.PG is set."""
    return _format(
        control.cr4 & _MODE_CR4,
        control.efer & _MODE_EFER,
        control.physical_bits,
        control.pages_1g,
        control.pse36,
        control.amd,
    )


@lru_cache(maxsize=256)
def _format(cr4: int, efer: int, physical_bits: int, pages_1g: bool, pse36: bool, amd: bool) -> Format:
    no_xd = 0 if efer & Efer.NXE else int(Pte.NX)
    if not cr4 & Cr4.PAE:
        return _format_32(bool(cr4 & Cr4.PSE), pse36, physical_bits)
    if not efer & Efer.LMA:
        return _format_pae(no_xd, physical_bits)
    return _format_long(bool(cr4 & Cr4.LA57), no_xd, physical_bits, pages_1g, amd)


def _ones(low: int, high: int) -> int:
    """Bits high:low, none where high < low."""
    return (1 << max(high + 1, low)) - (1 << low)


def _format_32(pse: bool, pse36: bool, physical_bits: int) -> Format:
    """SDM vol. 3, 4.3 and tables 4-4 to 4-6: bits 20:13 of a 4-MByte PDE are address bits 39:32."""
    high = min(_PS36_BITS, physical_bits) if pse36 else 32
    directory = Level("PDE", 22, 0x3FF, int(Pte.PS) if pse else 0, 0, _ones(high - 19, 21), 0x3FFFFF)
    return Format(_PAGING_32, 4, 0xFFFFF000, (directory, Level("PTE", 12, 0x3FF, int(Pte.P), 0, 0, 0xFFF)))


def _format_pae(no_xd: int, physical_bits: int) -> Format:
    """SDM vol. 3, 4.4.2 and tables 4-8 to 4-11; the PDPTEs are registers."""
    reserved = no_xd | _ones(physical_bits, 62)
    return Format(PAE, 8, 0xFFFFFFE0, _low_levels(reserved))


def _format_long(la57: bool, no_xd: int, physical_bits: int, pages_1g: bool, amd: bool) -> Format:
    """SDM vol. 3, 4.5 and tables 4-14 to 4-20; AMD reserves bit 8 of the upper two (APM vol. 2, 5.3.3)."""
    reserved = no_xd | _ones(physical_bits, 51)
    top = reserved | int(Pte.PS) | (int(Pte.G) if amd else 0)
    levels = (
        Level("PML4E", 39, 0x1FF, 0, top, 0, 0),
        Level(
            "PDPTE",
            30,
            0x1FF,
            int(Pte.PS) if pages_1g else 0,
            reserved | (0 if pages_1g else int(Pte.PS)),
            reserved | _ones(13, 29),
            0x3FFFFFFF,
        ),
        *_low_levels(reserved),
    )
    if la57:
        return Format("5-level paging", 8, ADDRESS, (Level("PML5E", 48, 0x1FF, 0, top, 0, 0), *levels))
    return Format("4-level paging", 8, ADDRESS, levels)


def _low_levels(reserved: int) -> tuple[Level, Level]:
    return (
        Level("PDE", 21, 0x1FF, int(Pte.PS), reserved, reserved | _ones(13, 20), 0x1FFFFF),
        Level("PTE", 12, 0x1FF, int(Pte.P), 0, reserved, 0xFFF),
    )


def page_address(paging: Format, level: Level, entry: int) -> int:
    """The physical address of the page that ``entry`` maps."""
    address = entry & ADDRESS & ~level.offset
    if paging.entry == 4 and level.offset > 0xFFF:
        address |= (entry >> 13 & 0xFF) << 32  # PSE-36
    return address
