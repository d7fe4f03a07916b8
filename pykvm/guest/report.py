"""What a workload reports about its memory, and what a corruption tells about its cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pykvm.guest.workload_config import Region
from pykvm.memory import PAGE_SIZE

_MASK: Final = (1 << 64) - 1
_PLAUSIBLE_VISITS: Final = 1 << 48


@dataclass(frozen=True, slots=True)
class Corruption:
    """A word of memory that was not what the guest had written.

    ``gpa`` is the word's guest-physical address, ``expected`` and ``found`` its 64-bit values, ``visit`` the
    visit of that page whose value was expected (0 or less: never written).  ``page`` is the gpa of the
    page that most probably did not survive, and ``cause`` says why.
    """

    vcpu: int
    gpa: int
    expected: int
    found: int
    visit: int
    cause: str
    page: int

    def __str__(self) -> str:
        return (
            f"page {self.page:#x}: {self.cause} (vCPU {self.vcpu} expected {self.expected:#018x} "
            f"at {self.gpa:#x} and found {self.found:#018x})"
        )


@dataclass(frozen=True, slots=True)
class GuestReport:
    """Sums over all vCPUs: visits to pages, words compared, passes over all pages, mismatches found.

    ``corruptions`` describes the first 64 mismatches of each vCPU, ``corruption_count`` counts them all.
    """

    visits: int
    checks: int
    passes: int
    corruption_count: int
    corruptions: tuple[Corruption, ...]


def explain(
    address: int, found: int, visit: int, region: Region, keys: Sequence[int], *, strings: bool
) -> tuple[str, int]:
    """Why the word at linear ``address`` does not hold the value of ``visit``: (sentence, suspect address).

    A stamp can be turned back into the visit that wrote it.  A value from a later visit than the ledger
    knows means that the ledger's page went back in time, any other one that the data page did.
    """
    if not region.data <= address < region.page_address(region.pages):
        return "a report about memory that is not this vCPU's", address
    if strings:
        base, value = address - (address - region.data) % region.step, found
    elif address % PAGE_SIZE < PAGE_SIZE // 2:
        base, value = address, found
    else:  # the second word of a pair is the negative of the first, mirrored into the upper half
        base, value = (address & -PAGE_SIZE) + PAGE_SIZE - 8 - address % PAGE_SIZE, -found & _MASK
    wrote = _visit_of(value, base, keys)
    expected = max(visit, 0)
    if found and wrote > expected and wrote < _PLAUSIBLE_VISITS:
        return f"the ledger is older than the data, which visit {wrote} wrote", region.ledger_entry(address)
    if found == 0:
        return f"zero instead of what visit {expected} wrote", address
    if wrote < expected:
        return f"an older state, of visit {wrote} instead of {expected}", address
    return f"a value that the guest never wrote there (visit {expected} was expected)", address


def _visit_of(value: int, base: int, keys: Sequence[int]) -> int:
    """The inverse of the guest's stamp ``(visit * key1 + base) * key2`` modulo 2^64."""
    inverse1, inverse2 = (pow(key, -1, 1 << 64) for key in keys)
    return (value * inverse2 - base) * inverse1 & _MASK
