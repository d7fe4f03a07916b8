"""String instructions with their repetition (SDM vol. 1, 7.3.9; vol. 2, REP).

Source rSI in DS or the overriding segment, destination rDI in ES; registers are of the address size.  An
iteration that faults leaves the earlier ones done, so the instruction can start again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import flags
from pykvm.model.cpu.flags import DF, RF, STATUS, TF, ZF
from pykvm.model.cpu.implicit import get, put
from pykvm.model.cpu.instruction import DS, ES, RAX, RCX, RDI, RSI
from pykvm.model.cpu.semantics import Execute, semantics

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

Iteration = Callable[["Processor", "Instruction", int], None]
"""One iteration on elements of the given size."""

REPNE: Final = 0xF2
REPE: Final = 0xF3
ITERATIONS_PER_STEP: Final = 1024
"""After so many the instruction pauses, so that events and budgets get their turn (as KVM does)."""


def element_size(insn: Instruction) -> int:
    """1 for the byte forms (even opcodes), else the operand size."""
    return insn.operand_size if insn.opcode[0] & 1 else 1


def advance(cpu: Processor, insn: Instruction, register: int, amount: int) -> None:
    """Move rSI or rDI on by ``amount`` bytes, backwards with DF set."""
    size = insn.address_size
    step = -amount if cpu.rflags & DF else amount
    put(cpu, register, size, get(cpu, register, size) + step & insn.address_mask)


def load_source(cpu: Processor, insn: Instruction, size: int) -> int:
    return cpu.load(insn.segment_or(DS), get(cpu, RSI, insn.address_size), size)


def repeat(cpu: Processor, insn: Instruction, once: Iteration, *, compares: bool = False) -> None:
    """Run ``once`` as the prefixes say: REPE and REPNE of a comparison look at ZF, too.

    Amid the iterations RF is set: an interrupt or trap there pushes it (SDM vol. 3, 18.3.1.1).
    """
    size = element_size(insn)
    if not insn.rep:
        once(cpu, insn, size)
        return
    width, wanted = insn.address_size, ZF if insn.rep == REPE else 0
    if cpu.emulating:
        _repeat_emulated(cpu, insn, once, wanted if compares else None)
        return
    for _ in range(ITERATIONS_PER_STEP):
        count = get(cpu, RCX, width)
        if not count:
            return
        once(cpu, insn, size)
        put(cpu, RCX, width, count - 1)
        cpu.repetitions += 1
        if count == 1 or (compares and cpu.rflags & ZF != wanted):
            cpu.rflags &= ~RF
            return
        cpu.rflags |= RF
        cpu.checkpoint()
        if cpu.exits or cpu.rflags & TF or cpu.debug_hits:
            break
    cpu.next_rip = cpu.rip


def _repeat_emulated(cpu: Processor, insn: Instruction, once: Iteration, wanted: int | None) -> None:
    """As KVM's emulator (docs/reference/kvm-mmu.md 12.6): it leaves the instruction, to decode it once more,
    whenever the low ten bits of rCX are 0 after an iteration, and retires it when it finds rCX 0 at first.

    ``wanted`` is what ZF must be for a comparison to go on, None for others.
    """
    size, width = element_size(insn), insn.address_size
    count = get(cpu, RCX, width)
    while count:
        once(cpu, insn, size)
        count -= 1
        put(cpu, RCX, width, count)
        cpu.repetitions += 1
        if wanted is not None and cpu.rflags & ZF != wanted:
            return
        cpu.checkpoint()
        if not count % ITERATIONS_PER_STEP or cpu.exits:
            cpu.next_rip = cpu.rip
            return


def _string(name: str, *, compares: bool = False) -> Callable[[Iteration], Execute]:
    """Enter one iteration into the table as a repeatable instruction."""

    def enter(once: Iteration) -> Execute:
        def execute(cpu: Processor, insn: Instruction) -> None:
            repeat(cpu, insn, once, compares=compares)

        return semantics(name)(execute)

    return enter


@_string("movs")
def movs(cpu: Processor, insn: Instruction, size: int) -> None:
    value = load_source(cpu, insn, size)
    cpu.store(ES, get(cpu, RDI, insn.address_size), size, value)
    advance(cpu, insn, RSI, size)
    advance(cpu, insn, RDI, size)


@_string("stos")
def stos(cpu: Processor, insn: Instruction, size: int) -> None:
    cpu.store(ES, get(cpu, RDI, insn.address_size), size, get(cpu, RAX, size))
    advance(cpu, insn, RDI, size)


@_string("lods")
def lods(cpu: Processor, insn: Instruction, size: int) -> None:
    put(cpu, RAX, size, load_source(cpu, insn, size))
    advance(cpu, insn, RSI, size)


@_string("cmps", compares=True)
def cmps(cpu: Processor, insn: Instruction, size: int) -> None:
    """[rSI] - [rDI]: here the destination is the second operand, though it is read first."""
    other = cpu.load(ES, get(cpu, RDI, insn.address_size), size)
    source = load_source(cpu, insn, size)
    cpu.rflags = cpu.rflags & ~STATUS | flags.subtract(source, other, 0, size)[1]
    advance(cpu, insn, RSI, size)
    advance(cpu, insn, RDI, size)


@_string("scas", compares=True)
def scas(cpu: Processor, insn: Instruction, size: int) -> None:
    """rAX - [rDI]."""
    other = cpu.load(ES, get(cpu, RDI, insn.address_size), size)
    cpu.rflags = cpu.rflags & ~STATUS | flags.subtract(get(cpu, RAX, size), other, 0, size)[1]
    advance(cpu, insn, RDI, size)
