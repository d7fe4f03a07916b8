"""INT n, INT3, INTO and INT1 (SDM vol. 2, INT n/INTO/INT3/INT1; vol. 3, 21.3.3 for virtual-8086 mode)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import gates
from pykvm.model.cpu.descriptors import real_segment
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import CS
from pykvm.model.cpu.semantics import semantics
from pykvm.x86.bits import Cr4, Rflags
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_IF, _TF, _VIF, _NT, _OF = (int(bit) for bit in (Rflags.IF, Rflags.TF, Rflags.VIF, Rflags.NT, Rflags.OF))
_IOPL: Final = int(Rflags.IOPL3)
_IO_MAP_BASE: Final = 0x66
_GENERAL_DETECT: Final = 1 << 13


def _interrupt(cpu: Processor, vector: int, *, software: bool = True) -> None:
    """The return address is the next instruction.  TF is clear in the handler: no trap follows."""
    cpu.enter_handler(gates.Event(vector, None, software, cpu.next_rip, cpu.rflags))
    cpu.single_step = False


@semantics("int")
def int_n(cpu: Processor, insn: Instruction) -> None:
    vector = insn.operands[0].read(cpu)
    if not cpu.vm86:
        _interrupt(cpu, vector)
    elif cpu.cr4 & Cr4.VME and not _bitmap_asks_for_idt(cpu, vector):
        _redirect(cpu, vector)
    elif cpu.iopl == 3:
        _interrupt(cpu, vector)
    else:
        raise Fault.gp()


@semantics("int3")
def int3(cpu: Processor, insn: Instruction) -> None:
    """In virtual-8086 mode neither IOPL nor the redirection bitmap counts."""
    _interrupt(cpu, Vector.BP)


@semantics("into")
def into(cpu: Processor, insn: Instruction) -> None:
    if cpu.rflags & _OF:
        _interrupt(cpu, Vector.OF)


@semantics("int1")
def int1(cpu: Processor, insn: Instruction) -> None:
    """A #DB trap without a bit in DR6; the gate's DPL does not count."""
    _interrupt(cpu, Vector.DB, software=False)
    cpu.dr7 &= ~_GENERAL_DETECT


# --- virtual-8086 mode extensions ------------------------------------------------------------------------


def _bitmap_asks_for_idt(cpu: Processor, vector: int) -> bool:
    """The 256 bits before the I/O permission bitmap: set sends INT n to the monitor (SDM vol. 3, 21.3.3)."""
    base = cpu.load_system(cpu.tr.base + _IO_MAP_BASE, 2)
    at = base - 32 + vector // 8
    if at < 0 or at > cpu.tr.limit:
        raise Fault.gp()
    return bool(cpu.load_system(cpu.tr.base + at, 1) >> vector % 8 & 1)


def _redirect(cpu: Processor, vector: int) -> None:
    """Methods 5 and 6: to the 8086 program's own handler; with IOPL < 3, VIF stands for IF."""
    handler = cpu.load_system(vector * 4, 4)
    image = cpu.rflags
    if cpu.iopl < 3:
        image = image & ~_IF | _IOPL | (_IF if image & _VIF else 0)
        cleared = _VIF | _TF
    else:
        cleared = _IF | _TF
    for value in (image, cpu.segments[CS].selector, cpu.next_rip):
        cpu.push(value & 0xFFFF, 2)
    cpu.rflags &= ~(cleared | _NT)
    cpu.set_segment(CS, real_segment(cpu, CS, handler >> 16))
    cpu.next_rip = handler & 0xFFFF
    cpu.single_step = False
