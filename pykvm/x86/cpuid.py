"""CPUID leaves as plain values (SDM vol. 2, CPUID; AMD leaves: APM vol. 3, appendix E)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One leaf; ``flags`` bit 0 says that ``index`` (ECX) is significant (api.rst 4.20)."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def find(entries: Iterable[CpuidEntry], function: int, index: int = 0) -> CpuidEntry | None:
    """The leaf of that function and index, or None."""
    for entry in entries:
        if entry.function == function and (not entry.flags & 1 or entry.index == index):
            return entry
    return None


def has_la57(entries: Iterable[CpuidEntry]) -> bool:
    """5-level paging: leaf 7.0, ECX bit 16."""
    leaf = find(entries, 7)
    return bool(leaf and leaf.ecx >> 16 & 1)


def has_1g_pages(entries: Iterable[CpuidEntry]) -> bool:
    """1 GiB pages: leaf 0x80000001, EDX bit 26."""
    leaf = find(entries, 0x80000001)
    return bool(leaf and leaf.edx >> 26 & 1)


def physical_address_bits(entries: Iterable[CpuidEntry]) -> int:
    """MAXPHYADDR: leaf 0x80000008, EAX bits 7:0; 36 where the leaf is absent (SDM vol. 3, 4.1.4)."""
    leaf = find(entries, 0x80000008)
    return leaf.eax & 0xFF if leaf else 36
