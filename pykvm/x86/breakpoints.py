"""Hardware breakpoints and their encoding in DR7 (SDM vol. 3, 18.2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from pykvm.errors import UsageError

_LENGTHS = {1: 0, 2: 1, 8: 2, 4: 3}  # the LEN field
_DR7_FIXED = 1 << 10
_DR7_EXACT = 1 << 9


class BreakKind(IntEnum):
    """The R/W field of DR7."""

    EXECUTE = 0
    WRITE = 1
    ACCESS = 3


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A hardware breakpoint at a linear address; ``length`` 1, 2, 4 or 8 bytes, 1 for EXECUTE."""

    address: int
    kind: BreakKind = BreakKind.EXECUTE
    length: int = 1


def encode_dr7(breakpoints: Sequence[Breakpoint]) -> int:
    """DR7 with these breakpoints in DR0 to DR3, enabled globally.  Raises UsageError."""
    if len(breakpoints) > 4:
        raise UsageError(f"The processor has 4 breakpoint registers, not {len(breakpoints)}.")
    dr7 = _DR7_FIXED | (_DR7_EXACT if breakpoints else 0)
    for i, point in enumerate(breakpoints):
        if point.length not in _LENGTHS or (point.kind == BreakKind.EXECUTE and point.length != 1):
            raise UsageError("A breakpoint covers 1, 2, 4 or 8 bytes, and one on execution 1.")
        if point.address % point.length:
            raise UsageError(
                f"A breakpoint of {point.length} bytes at {point.address:#x} must be aligned to that."
            )
        dr7 |= 2 << 2 * i | int(point.kind) << 16 + 4 * i | _LENGTHS[point.length] << 18 + 4 * i
    return dr7
