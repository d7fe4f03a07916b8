"""Instructions without effect on the architectural state, and those that are undefined on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import Memory
from pykvm.model.cpu.semantics import semantics

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor


@semantics("nop", "pause", "endbr32", "endbr64", "lfence", "mfence", "sfence")
@semantics("prefetch", "prefetchw", "prefetchnta", "prefetcht0", "prefetcht1", "prefetcht2", "cldemote")
def nop(cpu: Processor, insn: Instruction) -> None:
    """Memory operands are not accessed and cannot fault (SDM vol. 2, NOP, PREFETCHh)."""


@semantics("clflush", "clflushopt", "clwb")
def flush_line(cpu: Processor, insn: Instruction) -> None:
    """Faults as a load of one byte does (SDM vol. 2, CLFLUSH)."""
    (line,) = insn.operands
    assert isinstance(line, Memory)
    cpu.load(line.segment, line.offset(cpu), 1)


@semantics("ud0", "ud1", "ud2")
def undefined(cpu: Processor, insn: Instruction) -> None:
    raise Fault.ud()
