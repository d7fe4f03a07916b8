"""Roles of shadow pages: everything beside the gfn that makes one shadow page another (kvm-mmu.md 10.1).

A role is a number, as in KVM, since it is part of a hash key on the hot path: the bits are those of
``union kvm_mmu_page_role`` in 6.12, with ``cr4_smep`` of 7.2 at its place there.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pykvm.model.paging import Control
from pykvm.profiles import Profile
from pykvm.x86.bits import Cr0, Cr4, Efer

# --- access bits -------------------------------------------------------------------------------------

ACC_EXEC: Final = 1
ACC_WRITE: Final = 2
ACC_USER: Final = 4
ACC_ALL: Final = 7

# --- role bits ---------------------------------------------------------------------------------------

LEVEL: Final = 0xF
FOUR_BYTE_GPTE: Final = 1 << 4
QUADRANT_SHIFT: Final = 5
QUADRANT: Final = 3 << QUADRANT_SHIFT
DIRECT: Final = 1 << 7
ACCESS_SHIFT: Final = 8
ACCESS: Final = 7 << ACCESS_SHIFT
EFER_NX: Final = 1 << 12
CR0_WP: Final = 1 << 13
SMEP_ANDNOT_WP: Final = 1 << 14
SMAP_ANDNOT_WP: Final = 1 << 15
AD_DISABLED: Final = 1 << 16
GUEST_MODE: Final = 1 << 17
PASSTHROUGH: Final = 1 << 18
CR4_SMEP: Final = 1 << 20

SYNC_IGNORES: Final = LEVEL | ACCESS | QUADRANT | PASSTHROUGH
"""What may differ between a page and the root through which it is synchronised."""

_FLAGS: Final = (
    (FOUR_BYTE_GPTE, "4-byte"),
    (DIRECT, "direct"),
    (EFER_NX, "nx"),
    (CR0_WP, "wp"),
    (SMEP_ANDNOT_WP, "smep-andnot-wp"),
    (SMAP_ANDNOT_WP, "smap-andnot-wp"),
    (AD_DISABLED, "no-ad"),
    (GUEST_MODE, "L2"),
    (PASSTHROUGH, "passthrough"),
    (CR4_SMEP, "smep"),
)


class RootRole(NamedTuple):
    """What a vCPU shadows its guest with: the guest's own number of levels, and the role of its root.

    ``levels``: 0 without paging, 2, 3 (PAE), 4 or 5.
    """

    levels: int
    role: int


_PG, _WP = int(Cr0.PG), int(Cr0.WP)
_PAE, _LA57, _SMEP, _SMAP = int(Cr4.PAE), int(Cr4.LA57), int(Cr4.SMEP), int(Cr4.SMAP)
_LMA = int(Efer.LMA)


def root_role(control: Control, profile: Profile) -> RootRole:
    """The role of the root (10.1).

    With TDP off the host's tables have three levels at least; with TDP as many as the host wants, whatever
    the guest's mode is.
    """
    if profile.tdp:
        role = profile.tdp_root_level | DIRECT | ACC_ALL << ACCESS_SHIFT | EFER_NX | CR0_WP
        return RootRole(0, role if profile.walks_write_tables else role | AD_DISABLED)
    if not control.cr0 & _PG:
        return RootRole(0, 3 | DIRECT | ACC_ALL << ACCESS_SHIFT | EFER_NX)
    long, short = (5 if control.cr4 & _LA57 else 4), (3 if control.cr4 & _PAE else 2)
    levels = long if control.efer & _LMA else short
    role = max(levels, 3) | ACC_ALL << ACCESS_SHIFT | EFER_NX
    if levels == 2:
        role |= FOUR_BYTE_GPTE
    wp = control.cr0 & _WP
    if wp:
        role |= CR0_WP
    if profile.smep_in_role:
        if control.cr4 & _SMEP:
            role |= CR4_SMEP
    elif control.cr4 & _SMEP and not wp:
        role |= SMEP_ANDNOT_WP
    if control.cr4 & _SMAP and not wp:
        role |= SMAP_ANDNOT_WP
    return RootRole(levels, role)


def child_role(parent: int, access: int, index: int, *, direct: bool) -> int:
    """The role of the table below entry ``index`` of a page with role ``parent``."""
    role = parent & ~(ACCESS | DIRECT | PASSTHROUGH | QUADRANT)
    role = (role & ~LEVEL) | (parent & LEVEL) - 1 | access << ACCESS_SHIFT
    if direct:
        role |= DIRECT
    if parent & FOUR_BYTE_GPTE:
        role |= (index & 1) << QUADRANT_SHIFT
    return role


def access_of(role: int) -> int:
    """The ACC bits of a role."""
    return role >> ACCESS_SHIFT & 7


def describe(role: int) -> str:
    """A role in words: ``level 2, access XWU, wp nx``."""
    access = access_of(role)
    letters = "".join(letter for bit, letter in ((1, "X"), (2, "W"), (4, "U")) if access & bit) or "none"
    words = [f"level {role & LEVEL}", f"access {letters}"]
    if role & FOUR_BYTE_GPTE:
        words.append(f"quadrant {role >> QUADRANT_SHIFT & 3}")
    flags = " ".join(name for bit, name in _FLAGS if role & bit)
    return ", ".join([*words, flags] if flags else words)
