"""MOV to and from debug registers (SDM vol. 3, 18.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.control import require_cpl0
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import DebugRegister
from pykvm.model.cpu.semantics import semantics
from pykvm.x86.bits import Cr4
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_DR6_WRITABLE: Final = 0xE00F  # B0 to B3, BD, BS, BT
_DR6_ONES: Final = 0xFFFF0FF0
_DR6_BD: Final = 1 << 13
_DR7_WRITABLE: Final = 0xFFFF23FF  # all but the reserved bits 10 to 12, 14 and 15
_DR7_ONES: Final = 0x400
_DR7_GD: Final = 1 << 13
_DR6, _DR7 = 6, 7


def read_dr(cpu: Processor, number: int) -> int:
    """DR0 to DR3, DR6 or DR7."""
    return cpu.dr6 if number == _DR6 else cpu.dr7 if number == _DR7 else cpu.dr[number]


def write_dr(cpu: Processor, number: int, value: int) -> None:
    """DR6 and DR7 keep their fixed bits; their upper halves are reserved: #GP(0)."""
    if number < 4:
        cpu.dr[number] = value
        return
    if value >> 32:
        raise Fault.gp()
    if number == _DR6:
        cpu.dr6 = value & _DR6_WRITABLE | _DR6_ONES
    else:
        cpu.dr7 = value & _DR7_WRITABLE | _DR7_ONES


@semantics("mov_dr", undefined=0x8D5)
def mov_dr(cpu: Processor, insn: Instruction) -> None:
    """DR4 and DR5 name DR6 and DR7 unless CR4.DE; DR7.GD turns every access into a #DB with DR6.BD."""
    target, source = insn.operands
    register = target if isinstance(target, DebugRegister) else source
    assert isinstance(register, DebugRegister)
    number = register.index
    if number >= 8:
        raise Fault.ud()
    require_cpl0(cpu)
    if number in {4, 5}:
        if cpu.cr4 & Cr4.DE:
            raise Fault.ud()
        number += 2
    if cpu.dr7 & _DR7_GD:
        raise Fault(Vector.DB, dr6=_DR6_BD)
    if register is target:
        write_dr(cpu, number, source.read(cpu))
    else:
        target.write(cpu, read_dr(cpu, number) & (1 << 8 * target.size) - 1)
