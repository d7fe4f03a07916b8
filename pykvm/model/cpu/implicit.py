"""Registers that instructions use without naming them, and conditions that their opcodes imply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import MASK

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor


def get(cpu: Processor, register: int, size: int) -> int:
    """The low ``size`` bytes of a general register."""
    return cpu.regs[register] & MASK[size]


def put(cpu: Processor, register: int, size: int, value: int) -> None:
    """Write the low ``size`` bytes of a general register; ``value`` must fit.

    4 bytes clear the upper half, 1 and 2 leave the rest (SDM vol. 1, 3.4.1.1).
    """
    cpu.regs[register] = value if size >= 4 else cpu.regs[register] & ~MASK[size] | value


def require(feature: bool) -> None:
    """#UD where CPUID does not have the feature."""
    if not feature:
        raise Fault.ud()
