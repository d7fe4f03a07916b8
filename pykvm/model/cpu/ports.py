"""IN, OUT and their string forms (SDM vol. 1, ch. 19)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.machine.exits import IoIn, IoOut
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import DF, RF
from pykvm.model.cpu.implicit import get, put
from pykvm.model.cpu.instruction import ES, RAX, RCX, RDI, RDX, RSI
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.strings import advance, element_size, load_source, repeat

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_BITMAP_BASE: Final = 0x66
"""Offset of the I/O map base address in a 32-bit or 64-bit TSS (SDM vol. 3, 7.2.1 and 7.7)."""
_TSS_MINIMUM: Final = 0x67
_BATCH: Final = 1024
"""Bytes of the largest question that REP INS puts to the host at once."""
_PAGE: Final = 0x1000


def check_port(cpu: Processor, port: int, size: int) -> None:
    """#GP(0) unless IOPL or the I/O permission bitmap allows the access (SDM vol. 1, 19.5)."""
    if not cpu.protected_mode or (cpu.cpl <= cpu.iopl and not cpu.vm86):
        return
    tss = cpu.tr
    if not tss.type & 8 or tss.limit < _TSS_MINIMUM:  # a 16-bit TSS has no bitmap
        raise Fault.gp()
    # Two bytes are read, as an access may span two; both must lie within the limit.
    at = cpu.load_task_state(tss.base + _BITMAP_BASE) + port // 8
    if at + 1 > tss.limit:
        raise Fault.gp()
    if cpu.load_task_state(tss.base + at) >> port % 8 & (1 << size) - 1:
        raise Fault.gp()


@semantics("in")
def in_(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    port = source.read(cpu)
    check_port(cpu, port, target.size)
    reply = cpu.ask(IoIn(port, target.size), target.size)
    put(cpu, RAX, target.size, int.from_bytes(reply, "little"))


@semantics("out")
def out(cpu: Processor, insn: Instruction) -> None:
    target, source = insn.operands
    port = target.read(cpu)
    check_port(cpu, port, source.size)
    cpu.exits.append(IoOut(port, source.size, source.read(cpu).to_bytes(source.size, "little")))


def _port_element(insn: Instruction) -> int:
    """Ports are at most 4 bytes wide, also with REX.W."""
    return min(element_size(insn), 4)


def _outs_once(cpu: Processor, insn: Instruction, size: int) -> None:
    size = _port_element(insn)
    port = get(cpu, RDX, 2)
    data = load_source(cpu, insn, size).to_bytes(size, "little")
    advance(cpu, insn, RSI, size)
    cpu.exits.append(IoOut(port, size, data))


@semantics("outs")
def outs(cpu: Processor, insn: Instruction) -> None:
    check_port(cpu, get(cpu, RDX, 2), _port_element(insn))  # also where rCX is zero
    repeat(cpu, insn, _outs_once)


@semantics("ins")
def ins(cpu: Processor, insn: Instruction) -> None:
    """With REP the host is asked for many elements at once, as KVM does: to the end of the page."""
    size = _port_element(insn)
    port = get(cpu, RDX, 2)
    check_port(cpu, port, size)
    width = insn.address_size
    count = get(cpu, RCX, width) if insn.rep else 1
    if not count:
        return
    offset = get(cpu, RDI, width)
    address = cpu.linear(ES, offset, size, True)
    room = address % _PAGE + size if cpu.rflags & DF else _PAGE - address % _PAGE
    batch = max(1, min(count, room // size, _BATCH // size))
    cpu.require_writable(ES, offset, size)  # faults come before the question
    data = cpu.ask(IoIn(port, size, batch), batch * size)
    for at in range(0, batch * size, size):
        cpu.store(ES, get(cpu, RDI, width), size, int.from_bytes(data[at : at + size], "little"))
        advance(cpu, insn, RDI, size)
    if insn.rep:
        put(cpu, RCX, width, count - batch)
        if count > batch:
            cpu.rflags |= RF
            cpu.next_rip = cpu.rip
