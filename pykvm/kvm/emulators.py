"""What KVM must be told differently where the processor below it is an emulator with a known bug.

A lab says by PYKVM_LAB_EMULATOR what its processor is (docs/reference/labs.md); docs/kvm-findings.md lists
the bugs.  On processors nothing here does anything.
"""

from __future__ import annotations

import os
from typing import Final

QEMU_TCG: Final = os.environ.get("PYKVM_LAB_EMULATOR") == "qemu-tcg"
"""Whether QEMU's TCG emulates the processor."""
_BUSY: Final = 2


def task_segment_type(type_: int) -> int:
    """The type that TR's segment must have for a processor to take it for a busy TSS.

    TCG keeps the type of an available TSS in TR, as LTR found it in memory, and takes TR for no TSS at all
    when VMRUN loads it busy, as AMD's processors have it: an exception of 32-bit user code then ends QEMU
    ("invalid tss type"), and the I/O permission bitmap forbids every port.  KVM gives TR back as busy
    whatever it has.
    """
    return type_ & ~_BUSY if QEMU_TCG else type_
