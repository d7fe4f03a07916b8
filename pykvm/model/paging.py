"""The architectural page walk (SDM vol. 3, chapter 4; docs/reference/kvm-mmu.md, section 13).

A pure function from paging structures, control state and access to an address or a page fault; the accessed
and dirty flags that it would set are part of the result.  ``print(walk(...))`` explains it.

What the architecture leaves open is decided as KVM's own walker does (kvm-mmu.md 13.3): a walk that faults
sets no A or D flag at any level, A and D of the leaf are set at once, and a table where the guest has no
memory faults as if its entry were not present.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from pykvm.model.paging_explain import explain
from pykvm.model.paging_format import ADDRESS, PAE, Access, Control, Rule, format_of, page_address
from pykvm.x86.bits import Cr0, Cr4, Efer, PageFault, Pte

__all__ = ["Access", "Control", "ReadEntry", "Rule", "Update", "Walk", "read_pdptes", "walk"]

ReadEntry = Callable[[int, int], "int | None"]
"""From gpa and size (4 or 8) of an entry to its value, None where there is no memory."""


class Update(NamedTuple):
    """An entry whose A or D flag the walk sets."""

    gpa: int
    size: int
    old: int
    new: int


class Walk(NamedTuple):
    """The result of a walk.

    ``error`` is the page-fault error code, None when the access is allowed; ``gpa`` the address then, else 0.
    ``updates`` from the root to the leaf.  ``steps`` are the entries that were read: gpa and value.
    """

    gpa: int
    error: int | None
    updates: tuple[Update, ...]
    steps: tuple[tuple[int, int | None], ...]
    rule: Rule
    linear: int
    access: Access
    control: Control

    def __str__(self) -> str:
        return explain(self.control, self.linear, self.access, self.steps, self.rule, self.error, self.gpa)


# Plain numbers: operators of enum members cost more than the rest of a walk.
_P, _RW, _US, _A, _D, _XD = (int(bit) for bit in (Pte.P, Pte.RW, Pte.US, Pte.A, Pte.D, Pte.NX))
_AD: Final = _A | _D
_PG, _WP = int(Cr0.PG), int(Cr0.WP)
_PAE, _SMEP, _SMAP, _PKE, _PKS = (int(bit) for bit in (Cr4.PAE, Cr4.SMEP, Cr4.SMAP, Cr4.PKE, Cr4.PKS))
_LMA, _NXE = int(Efer.LMA), int(Efer.NXE)
_WRITE, _FETCH, _USER, _IMPLICIT = (
    int(kind) for kind in (Access.WRITE, Access.FETCH, Access.USER, Access.IMPLICIT)
)
_KEY_SHIFT: Final = 59


def walk(read: ReadEntry, control: Control, linear: int, access: Access) -> Walk:
    """Translate ``linear`` (canonical where that matters) for one access, which lies within a page."""
    if not control.cr0 & _PG:
        return Walk(linear & 0xFFFFFFFF, None, (), (), Rule.NO_PAGING, linear, access, control)
    paging = format_of(control)
    table = control.cr3 & paging.root
    if paging.name is PAE:
        table = control.pdptrs[linear >> 30 & 3]
        if not table & _P:
            return _fault(control, linear, access, [], Rule.NOT_PRESENT, 0)
        table &= ADDRESS
    size = paging.entry
    rights = _RW | _US
    disabled = entry = 0
    steps: list[tuple[int, int | None]] = []
    for level in paging.levels:
        _, shift, mask, page, reserved, page_reserved, _ = level
        at = table + (linear >> shift & mask) * size
        value = read(at, size)
        steps.append((at, value))
        if value is None:
            return _fault(control, linear, access, steps, Rule.NO_MEMORY, 0)
        if not value & _P:
            return _fault(control, linear, access, steps, Rule.NOT_PRESENT, 0)
        entry = value
        rights &= entry
        disabled |= entry
        if entry & page:
            if entry & page_reserved:
                return _fault(control, linear, access, steps, Rule.RESERVED, PageFault.P | PageFault.RSVD)
            break
        if entry & reserved:
            return _fault(control, linear, access, steps, Rule.RESERVED, PageFault.P | PageFault.RSVD)
        table = entry & ADDRESS
    kind = int(access)
    if kind & _IMPLICIT:
        kind &= ~_USER
    broken = _violation(control, kind, rights, disabled & _XD)
    if control.cr4 & (_PKE | _PKS) and _key_forbids(control, kind, rights, entry):
        return _fault(control, linear, access, steps, broken or Rule.KEY, PageFault.P | PageFault.PK)
    if broken:
        return _fault(control, linear, access, steps, broken, PageFault.P)
    gpa = page_address(paging, level, entry) | linear & level.offset
    updates = _updates(steps, size, kind)
    return Walk(gpa, None, updates, tuple(steps), Rule.PERMITTED, linear, access, control)


def _violation(control: Control, kind: int, rights: int, disabled: int) -> Rule | None:
    """The first of the access rights that a completed walk denies (SDM vol. 3, 4.6.1)."""
    if kind & _FETCH and disabled:
        return Rule.EXECUTE_DISABLE
    if kind & _USER:
        if not rights & _US:
            return Rule.SUPERVISOR_PAGE
        return Rule.READ_ONLY if kind & _WRITE and not rights & _RW else None
    if rights & _US:
        if kind & _FETCH:
            return Rule.SMEP if control.cr4 & _SMEP else None
        if control.cr4 & _SMAP and (kind & _IMPLICIT or not control.ac):
            return Rule.SMAP
    return Rule.READ_ONLY if kind & _WRITE and not rights & _RW and control.cr0 & _WP else None


def _key_forbids(control: Control, kind: int, rights: int, leaf: int) -> bool:
    """Whether the page's protection key denies the access (SDM vol. 3, 4.6.2)."""
    if kind & _FETCH or not control.efer & _LMA:
        return False
    user_page = rights & _US
    if not control.cr4 & (_PKE if user_page else _PKS):
        return False
    register = control.pkru if user_page else control.pkrs
    denied = register >> 2 * (leaf >> _KEY_SHIFT & 15)
    write_counts = kind & _WRITE and ((user_page and kind & _USER) or control.cr0 & _WP)
    return bool(denied & 1 or (denied & 2 and write_counts))


def _fault(
    control: Control,
    linear: int,
    access: Access,
    steps: list[tuple[int, int | None]],
    rule: Rule,
    cause: int,
) -> Walk:
    """A walk that ends in #PF: the error code also describes the access (SDM vol. 3, 4.7)."""
    kind, error = int(access), int(cause)
    if kind & _WRITE:
        error |= PageFault.WR
    if kind & _USER and not kind & _IMPLICIT:
        error |= PageFault.US
    if kind & _FETCH and (control.cr4 & _SMEP or (control.cr4 & _PAE and control.efer & _NXE)):
        error |= PageFault.ID
    return Walk(0, int(error), (), tuple(steps), rule, linear, access, control)


def _updates(steps: list[tuple[int, int | None]], size: int, kind: int) -> tuple[Update, ...]:
    """The A flag of every entry used, and D of the leaf for a write (SDM vol. 3, 4.8)."""
    *upper, (leaf_at, leaf) = steps
    assert leaf is not None
    wanted = leaf | (_AD if kind & _WRITE else _A)
    clear = [(at, entry) for at, entry in upper if entry is not None and not entry & _A]
    if not clear:
        return () if wanted == leaf else (Update(leaf_at, size, leaf, wanted),)
    updates = [Update(at, size, entry, entry | _A) for at, entry in clear]
    if wanted != leaf:
        updates.append(Update(leaf_at, size, leaf, wanted))
    return tuple(updates)


def read_pdptes(read: ReadEntry, cr3: int, physical_bits: int) -> tuple[int, int, int, int] | None:
    """The four PDPTEs that CR3 points to; None where a present one has a reserved bit set, which is #GP(0)
    for the instruction that loads them (SDM vol. 3, 4.4.1).  Without memory there they are not present."""
    reserved = 0x1E6 | (1 << 64) - (1 << physical_bits)
    first, second, third, fourth = (read((cr3 & 0xFFFFFFE0) + 8 * number, 8) or 0 for number in range(4))
    entries = (first, second, third, fourth)
    if any(entry & _P and entry & reserved for entry in entries):
        return None
    return entries
