"""Differences of page walks that are understood: what the architecture leaves open, and emulators' bugs.

An emulator's bug explains something only in a lab whose processor is that emulator; docs/kvm-findings.md
lists those of QEMU's TCG.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from pykvm.crosscheck.paging_cases import Kind, PagingCase
from pykvm.crosscheck.paging_guest import PagingOutcome
from pykvm.machine import Kicked
from pykvm.machine.emulation import QEMU_TCG, emulator
from pykvm.x86.bits import PageFault, Pte

_A: Final = int(Pte.A)
_SEGMENTS: Final = (Kind.LOAD_SEGMENT, Kind.MARK_SEGMENT)
_DESCRIPTOR_BYTES: Final = 8


def known(case: PagingCase, model: PagingOutcome, other: PagingOutcome) -> str:
    """Why ``other`` may differ from the model's outcome, in sentences; empty where nothing says so."""
    if _repeated_for_ever(case, model, other):
        return (
            "KVM with shadow page tables repeats an implicit access that SMAP forbids for ever where "
            "RFLAGS.AC is set (docs/kvm-findings.md)."
        )
    reasons = []
    if _names_a_fetch(case, model, other):
        reasons.append(
            "KVM's walk reports I/D of a fetch by EFER.NXE alone, the SDM by CR4.PAE, too (vol. 3, 4.7)."
        )
        other = replace(other, error=model.error)
    if emulator() == QEMU_TCG:
        if whole := _tcg_bug(case, model, other):
            return whole
        for reason, repaired in _tcg_repairs(case, model, other):
            reasons.append(reason)
            other = repaired
    if _written_byte_differs(case, model, other):
        reasons.append("Which bytes of a descriptor are written to mark it accessed is not documented.")
        other = replace(other, cr2=model.cr2)
    if model != other:
        if not _only_accessed_flags(case, model, other):
            return ""
        reasons.append("A may be set in the entries used by an access that faults (SDM vol. 3, 4.8).")
    return " ".join(reasons)


def _under_suspended_smap(case: PagingCase, model: PagingOutcome) -> bool:
    """Whether SMAP alone forbids reading the descriptor, and would not if the access were explicit."""
    suspended = case.control.smap and case.control.ac
    return case.kind in _SEGMENTS and suspended and model.error == PageFault.P


def _repeated_for_ever(case: PagingCase, model: PagingOutcome, other: PagingOutcome) -> bool:
    """A processor's #PF does not say that the access was implicit, and KVM's walk takes it for explicit."""
    return other.end == str(Kicked()) and _under_suspended_smap(case, model)


def _names_a_fetch(case: PagingCase, model: PagingOutcome, other: PagingOutcome) -> bool:
    """I/D in the error code of 32-bit paging, which has no NX bit that NXE could enable."""
    if case.kind is not Kind.FETCH or case.shape.levels != 2 or not case.control.nxe:
        return False
    return model.error is not None and other.error == model.error | PageFault.ID != model.error


def _written_byte_differs(case: PagingCase, model: PagingOutcome, other: PagingOutcome) -> bool:
    if case.kind is not Kind.MARK_SEGMENT or model.cr2 is None or other.cr2 is None:
        return False
    write = (model.error or 0) & (other.error or 0) & PageFault.WR
    return bool(write) and 0 < other.cr2 - model.cr2 < _DESCRIPTOR_BYTES


def _only_accessed_flags(case: PagingCase, model: PagingOutcome, other: PagingOutcome) -> bool:
    """Whether a fault differs in A flags alone, and only where a walk gets: behind nothing that is absent.

    KVM's own walks set none then (kvm-mmu.md 13.3), but its emulator makes a read-modify-write a read and
    then a write, and with two-dimensional paging the walks are the processor's.
    """
    if model.end != "#PF" or replace(model, flags=()) != replace(other, flags=()):
        return False
    present = True
    for (_, entry), one, two in zip(case.entries(0, 0, 46), model.flags, other.flags, strict=True):
        present = present and bool(entry & Pte.P)
        if one != two and (one ^ two != _A or not present):
            return False
    return True


def _tcg_bug(case: PagingCase, model: PagingOutcome, other: PagingOutcome) -> str:
    """Names a bug of TCG that changes the whole outcome."""
    reserved = (model.error or 0) & PageFault.RSVD and not (other.error or 0) & PageFault.RSVD
    if case.upper.reserved == "8" and reserved:
        return "emulator: QEMU's TCG takes bit 8 of a PML4E and PML5E, reserved on AMD's processors."
    if case.cpl == 0 and _under_suspended_smap(case, model):
        return "emulator: QEMU's TCG lets RFLAGS.AC suspend SMAP for accesses to descriptors, too."
    return ""


def _tcg_repairs(
    case: PagingCase, model: PagingOutcome, other: PagingOutcome
) -> Iterator[tuple[str, PagingOutcome]]:
    """Bugs of TCG that change a part of the outcome, each with the outcome put right so far."""
    if case.shape.levels == 3 and other.flags[0] & ~model.flags[0] == _A:
        other = replace(other, flags=(other.flags[0] & ~_A, *other.flags[1:]))
        yield "emulator: QEMU's TCG sets A in PAE's pointers to page directories.", other
    if model.error is None or other.error is None:
        return
    if model.error & ~other.error & PageFault.P and model.error & other.error & PageFault.RSVD:
        other = replace(other, error=int(other.error | PageFault.P))
        yield "emulator: QEMU's TCG leaves P out of the error code of a reserved bit.", other
    if case.kind is Kind.EXCHANGE and model.error ^ (other.error or 0) == PageFault.WR & model.error:
        other = replace(other, error=model.error)
        yield "emulator: QEMU's TCG makes a read-modify-write a read and then a write.", other
