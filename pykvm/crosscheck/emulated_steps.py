"""Steps of a scenario in which KVM's guest shows a bug of the emulator that is its processor.

Only in labs on QEMU's TCG.  What comes after such a step follows from it, so the comparison ends before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from pykvm.crosscheck.rig import HANDLER_PORT
from pykvm.crosscheck.trace import StepTrace
from pykvm.machine import Exit, IoOut, MmioRead
from pykvm.memory import PAGE_SIZE
from pykvm.x86.bits import PageFault, Pte
from pykvm.x86.exceptions import Vector

_LARGEST_ERROR: Final = 0x40
_PAGE_FAULT_PORT: Final = HANDLER_PORT + Vector.PF
_ENTRIES: Final = struct.Struct(f"<{PAGE_SIZE // 8}Q")


def tcg_bug(model: StepTrace, kvm: StepTrace) -> str:
    """What TCG did in this step instead of what its guest should have seen; empty if nothing is known."""
    for right, wrong in zip(model.vcpus, kvm.vcpus, strict=True):
        ours, theirs = right.special.ss, wrong.special.ss
        if right.special.cs.l and ours.selector and not theirs.selector and not right.special.cs.dpl:
            return "emulator: QEMU's TCG loads a null SS for an interrupt by IST at CPL 0"
    pairs = zip(model.exits, kvm.exits, strict=False)
    ends = next(((one, other) for one, other in pairs if one != other), None)
    if ends is not None and _is_page_fault(ends[0]) and isinstance(ends[1], MmioRead):
        return _READ_FIRST
    waited = any(isinstance(each, MmioRead) for each in kvm.exits)
    faulted = any(_is_page_fault(each) for each in kvm.exits)
    for page, contents in model.changed.items():
        other = kvm.changed.get(page)
        if other is None:
            if waited and any(entry & _DIRTY == _DIRTY for entry in _ENTRIES.unpack(contents)):
                return _READ_FIRST
        elif any(_read_first(*pair, waited, faulted) for pair in _differing(contents, other)):
            return _READ_FIRST
    return ""


_READ_FIRST: Final = "emulator: QEMU's TCG makes a read-modify-write a read and then a write"
_DIRTY: Final = int(Pte.P | Pte.A | Pte.D)


def _is_page_fault(exit: Exit) -> bool:
    """Whether the handler of page faults tells that it runs."""
    return isinstance(exit, IoOut) and exit.port == _PAGE_FAULT_PORT


def _differing(one: bytes, other: bytes) -> Iterator[tuple[int, int]]:
    pairs = zip(_ENTRIES.unpack(one), _ENTRIES.unpack(other), strict=True)
    return ((a, b) for a, b in pairs if a != b)


def _read_first(model: int, kvm: int, waited: bool, faulted: bool) -> bool:
    """An error code without W; an entry whose A a read set before the write faulted; or one without D, where
    the read went to the host.
    """
    if model ^ kvm == PageFault.WR & model:
        return model < _LARGEST_ERROR
    if not model & kvm & Pte.P:
        return False
    return (faulted and model ^ kvm == Pte.A & kvm) or (waited and model ^ kvm == Pte.D & model)
