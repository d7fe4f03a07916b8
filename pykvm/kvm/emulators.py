"""What KVM must be told differently where the processor below it is an emulator with a known bug.

docs/kvm-findings.md lists the bugs.  On processors nothing here does anything.
"""

from __future__ import annotations

from typing import Final

from pykvm.machine.emulation import QEMU_TCG, emulator

_BUSY: Final = 2
_UNDER_TCG: Final = emulator() == QEMU_TCG


def task_segment_type(type_: int) -> int:
    """The type that TR's segment must have for the processor to take it for a busy TSS.

    TCG keeps the type of an available TSS in TR, as LTR found it in memory, and takes TR for no TSS at all
    when VMRUN loads it busy, as AMD's processors have it: an exception of 32-bit user code then ends QEMU
    ("invalid tss type"), and the I/O permission bitmap forbids every port.  KVM gives TR back as busy
    whatever it has.
    """
    return type_ & ~_BUSY if _UNDER_TCG else type_
