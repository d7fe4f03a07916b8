"""SPTEs of the model: three facts about writing, and when a TLB flush is due (kvm-mmu.md 8)."""

from __future__ import annotations

from itertools import product

import pytest

from pykvm.model.mmu.spte import (
    ADDRESS,
    GFN_SHIFT,
    HOST_WRITABLE,
    MMIO,
    MMU_PRESENT,
    MMU_WRITABLE,
    NX,
    PS,
    A,
    D,
    P,
    U,
    W,
    gfn_of,
    is_present,
    is_valid,
    needs_flush,
)

LEAF = P | U | A | MMU_PRESENT | 0x5 << GFN_SHIFT
WRITABLE = LEAF | HOST_WRITABLE | MMU_WRITABLE | W | D
LOGGED = LEAF | HOST_WRITABLE | MMU_WRITABLE
"""Write-protected for logging: 110."""
TRACKED = LEAF | HOST_WRITABLE
"""Write-protected since the gfn is tracked or shadowed: 100."""
HOST_READ_ONLY = LEAF
"""The host's own mapping cannot be written: 000."""


@pytest.mark.parametrize("facts", list(product((0, 1), repeat=3)), ids=lambda facts: "".join(map(str, facts)))
def test_which_combinations_are_valid(facts: tuple[int, int, int]) -> None:
    """8: (HOST, MMU, W) is 111, 110, 100 or 000; W without MMU, or MMU without HOST, is a bug."""
    host, mmu, hardware = facts
    spte = LEAF | host * HOST_WRITABLE | mmu * MMU_WRITABLE | hardware * W
    assert is_valid(spte) == (facts in {(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)})


def test_bits_as_kvm_numbers_them() -> None:
    """8, the column for shadow paging and NPT."""
    assert [1 << bit for bit in (0, 1, 2, 5, 6, 7, 9, 10, 11, 63)] == [
        P,
        W,
        U,
        A,
        D,
        PS,
        HOST_WRITABLE,
        MMU_WRITABLE,
        MMU_PRESENT,
        NX,
    ]
    assert ADDRESS == (1 << 52) - (1 << 12)


def test_presence_is_the_software_bit_alone() -> None:
    """8: MMU_PRESENT is the only test for presence; an MMIO SPTE has P and is not present."""
    assert is_present(MMU_PRESENT)
    assert not is_present(MMIO | P)
    assert not is_present(P | W)
    assert not is_present(0)


def test_the_gfn_of_a_leaf() -> None:
    assert gfn_of(WRITABLE | NX) == 5
    assert gfn_of(P | MMU_PRESENT | 0x3FFF << GFN_SHIFT | NX) == 0x3FFF


def flushes(old: int, new: int) -> tuple[bool, bool]:
    """Whether the update asks for a flush up to 6.12, and since 6.13."""
    return needs_flush(old, new, ad_bits=True), needs_flush(old, new, ad_bits=False)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # Logging: W goes, MMU_WRITABLE stays.  Its caller flushes once, before anybody reads the log, so no
        # entry need: a write through a stale translation falls into the round that is being collected.
        (WRITABLE & ~D, LOGGED, (False, False)),
        (LOGGED, WRITABLE, (False, False)),
        # Tracking: MMU_WRITABLE goes.  No tracker would see a write through a stale translation.
        (WRITABLE, TRACKED, (True, True)),
        (WRITABLE & ~D, TRACKED, (True, True)),
        # From logged to tracked: the entry is read-only already, but a processor may still hold the writable
        # translation of before the log was armed, whose flush may come late.
        (LOGGED, TRACKED, (True, True)),
        (TRACKED, TRACKED, (False, False)),
        (TRACKED, WRITABLE, (False, False)),
        # A or D alone: up to 6.12 only.
        (WRITABLE, WRITABLE & ~D, (True, False)),
        (WRITABLE, WRITABLE & ~A, (True, False)),
        (WRITABLE & ~A, WRITABLE, (False, False)),
        (WRITABLE, WRITABLE | NX, (False, False)),
        (HOST_READ_ONLY, HOST_READ_ONLY & ~A, (True, False)),
    ],
)
def test_when_a_flush_is_due(old: int, new: int, expected: tuple[bool, bool]) -> None:
    """8, TLB-flush rule of ``mmu_spte_update``: [6.1, 6.12] and [7.2]."""
    assert is_valid(old)
    assert is_valid(new)
    assert flushes(old, new) == expected


def test_late_for_logging_never_for_tracking() -> None:
    """8: whatever else an entry says, losing MMU_WRITABLE flushes, and losing W alone does not."""
    for rest in (0, D, NX, PS, D | NX):
        writable = WRITABLE & ~D | rest
        assert needs_flush(writable, writable & ~(W | MMU_WRITABLE), ad_bits=False)
        assert not needs_flush(writable, writable & ~W, ad_bits=False)
        assert needs_flush(writable & ~W, writable & ~(W | MMU_WRITABLE), ad_bits=False)
