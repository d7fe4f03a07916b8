"""Templates of MOVS and STOS; repeated ones fill and copy whole pages at a time.

A repeated instruction stops where the interpreter's does: after 1024 iterations, or behind the store that
makes an exit due.  Only the forward direction, on flat segments; the rest is the interpreter's.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from pykvm.model.cpu.flags import DF, MASK, RF
from pykvm.model.cpu.instruction import DS, ES, RAX, RCX, RDI, RSI, Instruction
from pykvm.model.cpu.strings import ITERATIONS_PER_STEP, element_size
from pykvm.model.cpu.translator.emitter import Emitter
from pykvm.model.cpu.translator.templates import Template
from pykvm.model.cpu.translator.views import Leave, Views

_PAGE: Final = 0x1000
STRINGS: Final[dict[str, Template]] = {}


def fill(views: Views, address: int, size: int, count: int, value: int) -> int:
    """Store ``count`` elements: how many it were.  Raises Leave, having stored nothing."""
    if address % size:
        raise Leave
    end = _writable_end(views, address, size, address + size * count)
    pattern = value.to_bytes(size, "little")
    for start, stop in _pieces(address, end):
        offset = start % _PAGE
        views.write1[start // _PAGE][offset : offset + stop - start] = pattern * ((stop - start) // size)
    return (end - address) // size


def copy(views: Views, source: int, address: int, size: int, count: int) -> int:
    """Copy ``count`` elements: how many it were.  Raises Leave, having stored nothing."""
    length = size * count
    if address % size or source % size:
        raise Leave
    # The elements go one by one: a copy that reads what it wrote is the interpreter's.
    read = {views.host_page(page) for page in range(source // _PAGE, (source + length - 1) // _PAGE + 1)}
    written = {views.host_page(page) for page in range(address // _PAGE, (address + length - 1) // _PAGE + 1)}
    if read & written:
        raise Leave
    pieces = [
        views.read1[start // _PAGE][start % _PAGE : start % _PAGE + stop - start]
        for start, stop in _pieces(source, source + length)
    ]
    end = _writable_end(views, address, size, address + length)
    data = b"".join(pieces)
    for start, stop in _pieces(address, end):
        offset = start % _PAGE
        views.write1[start // _PAGE][offset : offset + stop - start] = data[start - address : stop - address]
    return (end - address) // size


def _pieces(start: int, end: int) -> list[tuple[int, int]]:
    """[start, end) cut at page boundaries."""
    cuts = [start, *range((start // _PAGE + 1) * _PAGE, end, _PAGE), end]
    return list(pairwise(cuts))


def _writable_end(views: Views, start: int, size: int, end: int) -> int:
    """How far stores in ascending order get: behind the first element of a page whose log makes an exit due,
    or to ``end``.  A page is asked for only when all pages before it are certain to be written."""
    for at, _ in _pieces(start, end):
        if views.allow_writes(at // _PAGE):
            return at + size
    return end


def _repeated(e: Emitter, insn: Instruction, call: str, registers: tuple[int, ...]) -> int:
    """``call`` performs ``n`` iterations at most and is given how many."""
    natural = 8 if e.mode.bits == 64 else 4
    source, target = e.mode.segments[insn.segment_or(DS)], e.mode.segments[ES]
    if (
        e.mode.bits == 16
        or insn.address_size != natural
        or not (target.flat and target.writable)
        or (RSI in registers and not (source.flat and source.readable))
    ):
        e.refuse()
    size, here = element_size(insn), e.next_rip - insn.length
    count = e.register(RCX, natural)
    e.leaves()
    e.emit(f"if f & {DF}: leave()")
    e.emit(f"n{e.index} = {call} if {count} else 0")
    for register in registers:
        e.set_register(
            register, natural, f"{e.register(register, natural)} + n{e.index} * {size} & {MASK[natural]}"
        )
    count = e.set_register(RCX, natural, f"{count} - n{e.index}")
    # Amid the iterations RF is set (SDM vol. 3, 18.3.1.1).
    e.change_rflags(f"if {count}: f |= {RF}")
    e.exit_to(f"{here} if {count} else {e.next_rip}", f"{count} or views.exit_due")
    return e.next_rip


def _advance(e: Emitter, insn: Instruction, register: int) -> None:
    width = insn.address_size
    e.set_register(register, width, f"{e.register(register, width)} + d{e.index} & {MASK[width]}")


def stos(e: Emitter, insn: Instruction) -> int:
    size = element_size(insn)
    target, value = e.register(RDI, insn.address_size), e.register(RAX, size)
    if insn.rep:
        iterations = f"min({e.register(RCX, insn.address_size)}, {ITERATIONS_PER_STEP})"
        return _repeated(e, insn, f"fill(views, {target}, {size}, {iterations}, {value})", (RDI,))
    e.store(ES, target, size, e.value(value))
    e.emit(f"d{e.index} = {-size} if f & {DF} else {size}")
    _advance(e, insn, RDI)
    return e.next_rip


def movs(e: Emitter, insn: Instruction) -> int:
    size = element_size(insn)
    source, target = e.register(RSI, insn.address_size), e.register(RDI, insn.address_size)
    if insn.rep:
        iterations = f"min({e.register(RCX, insn.address_size)}, {ITERATIONS_PER_STEP})"
        return _repeated(e, insn, f"copy(views, {source}, {target}, {size}, {iterations})", (RSI, RDI))
    value = e.load(insn.segment_or(DS), source, size)
    e.store(ES, target, size, value)
    e.emit(f"d{e.index} = {-size} if f & {DF} else {size}")
    _advance(e, insn, RSI)
    _advance(e, insn, RDI)
    return e.next_rip


STRINGS.update(stos=stos, movs=movs)
