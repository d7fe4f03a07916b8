"""MMX and SSE moves, EMMS, MXCSR, PTEST."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import CF, STATUS, ZF
from pykvm.model.cpu.instruction import DS, RDI, Memory, Mmx, Xmm
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.vector import (
    M32,
    M64,
    begin,
    finish,
    join,
    lanes,
    load,
    packed,
    read,
    require_mmx,
    require_sse,
    store,
    touch_mmx,
)
from pykvm.model.cpu.xstate import mxcsr_mask

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

# --- whole registers --------------------------------------------------------------------------------------


def _move(name: str, feature: str, *, aligned: bool) -> None:
    """16 bytes between registers and memory."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand = insn.operands
        require_sse(cpu, feature)
        value = read(cpu, operand, 16, aligned=aligned)
        if isinstance(target, Memory):
            store(cpu, target, 16, value, aligned=aligned)
        else:
            target.write(cpu, value)

    semantics(name)(execute)


for _name, _feature, _aligned in (
    ("movaps", "sse", True),
    ("movapd", "sse2", True),
    ("movdqa", "sse2", True),
    ("movntps", "sse", True),
    ("movntpd", "sse2", True),
    ("movntdq", "sse2", True),
    ("movntdqa", "sse41", True),
    ("movups", "sse", False),
    ("movupd", "sse2", False),
    ("movdqu", "sse2", False),
    ("lddqu", "sse3", False),
):
    _move(_name, _feature, aligned=_aligned)


# --- parts of registers -----------------------------------------------------------------------------------


def _scalar(name: str, feature: str, size: int) -> None:
    """The low lane: a load clears the rest of the register, a move between registers keeps it."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand = insn.operands
        require_sse(cpu, feature)
        mask = (1 << 8 * size) - 1
        if isinstance(target, Memory):
            store(cpu, target, size, operand.read(cpu) & mask)
        elif isinstance(operand, Memory):
            target.write(cpu, load(cpu, operand, size))
        else:
            target.write(cpu, target.read(cpu) & ~mask | operand.read(cpu) & mask)

    semantics(name)(execute)


_scalar("movss", "sse", 4)
_scalar("movsd", "sse2", 8)
_scalar("movntss", "sse4a", 4)
_scalar("movntsd", "sse4a", 8)


def _half(name: str, feature: str, shift: int) -> None:
    """A half of the register between it and 8 bytes of memory; the other half stays."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand = insn.operands
        require_sse(cpu, feature)
        if isinstance(target, Memory):
            store(cpu, target, 8, operand.read(cpu) >> shift & M64)
        else:
            assert isinstance(operand, Memory)
            value = load(cpu, operand, 8)
            target.write(cpu, target.read(cpu) & ~(M64 << shift) | value << shift)

    semantics(name)(execute)


_half("movlps", "sse", 0)
_half("movlpd", "sse2", 0)
_half("movhps", "sse", 64)
_half("movhpd", "sse2", 64)

for _name, _feature, _function in (
    ("movhlps", "sse", lambda a, b, bits: a >> 64 << 64 | b >> 64),
    ("movlhps", "sse", lambda a, b, bits: a & M64 | (b & M64) << 64),
    ("movddup", "sse3", lambda a, b, bits: b & M64 | (b & M64) << 64),
    ("movsldup", "sse3", lambda a, b, bits: join((lanes(b, 32, 128)[n] for n in (0, 0, 2, 2)), 32)),
    ("movshdup", "sse3", lambda a, b, bits: join((lanes(b, 32, 128)[n] for n in (1, 1, 3, 3)), 32)),
):
    packed(_name, "", _feature, _function)


def _move_low(cpu: Processor, insn: Instruction, size: int) -> None:
    """MOVD and MOVQ: the low bytes of a vector register to or from anything; registers are zero-filled."""
    target, operand = insn.operands
    begin(cpu, insn, "mmx", "sse2")
    value = read(cpu, operand, size) & (1 << 8 * size) - 1
    if isinstance(target, Memory):
        store(cpu, target, size, value)
    else:
        target.write(cpu, value)
    if isinstance(target, Mmx) or isinstance(operand, Mmx):
        touch_mmx(cpu)


@semantics("movd")
def movd(cpu: Processor, insn: Instruction) -> None:
    _move_low(cpu, insn, 8 if insn.rex & 8 else 4)


@semantics("movq")
def movq(cpu: Processor, insn: Instruction) -> None:
    _move_low(cpu, insn, 8)


@semantics("movq2dq")
def movq2dq(cpu: Processor, insn: Instruction) -> None:
    _require_both(cpu)
    insn.operands[0].write(cpu, insn.operands[1].read(cpu))
    touch_mmx(cpu)


@semantics("movdq2q")
def movdq2q(cpu: Processor, insn: Instruction) -> None:
    _require_both(cpu)
    finish(cpu, insn.operands[0], insn.operands[1].read(cpu) & M64)


def _require_both(cpu: Processor) -> None:
    require_sse(cpu, "sse2")
    require_mmx(cpu, "sse2")


@semantics("movntq")
def movntq(cpu: Processor, insn: Instruction) -> None:
    target, operand = insn.operands
    require_mmx(cpu, "sse")
    assert isinstance(target, Memory)
    store(cpu, target, 8, operand.read(cpu))
    touch_mmx(cpu)


@semantics("maskmovq", "maskmovdqu")
def maskmov(cpu: Processor, insn: Instruction) -> None:
    """The bytes whose mask byte is negative to DS:RDI.  The rest counts as written too: with a zero mask
    the page still becomes dirty, and a fault is raised (docs/reference/hosts.md, E)."""
    source, mask = insn.operands[-2:]
    size = begin(cpu, insn, "sse", "sse2")
    signs = lanes(mask.read(cpu), 8, 8 * size)
    segment = insn.segment_or(DS)
    chosen = join((0xFF if sign & 0x80 else 0 for sign in signs), 8)
    for at in range(0, size, 8):  # AC wants alignment to 8 also of the XMM form (host)
        offset = cpu.regs[RDI] + at & insn.address_mask
        half, data = chosen >> 8 * at & M64, source.read(cpu) >> 8 * at & M64
        old = cpu.load_for_update(segment, offset, 8)
        cpu.store(segment, offset, 8, old & ~half | data & half)
    if isinstance(source, Mmx):
        touch_mmx(cpu)


# --- control ----------------------------------------------------------------------------------------------


@semantics("emms")
def emms(cpu: Processor, insn: Instruction) -> None:
    """All registers empty, TOP 0 (SDM vol. 3, table 13-2)."""
    require_mmx(cpu, "mmx")
    touch_mmx(cpu)
    cpu.x87.tags = 0xFFFF


@semantics("ldmxcsr")
def ldmxcsr(cpu: Processor, insn: Instruction) -> None:
    """Reserved bits raise #GP(0)."""
    require_sse(cpu, "sse")
    value = insn.operands[0].read(cpu)
    if value & ~mxcsr_mask(cpu):
        raise Fault.gp()
    cpu.mxcsr = value


@semantics("stmxcsr")
def stmxcsr(cpu: Processor, insn: Instruction) -> None:
    require_sse(cpu, "sse")
    insn.operands[0].write(cpu, cpu.mxcsr & M32)


@semantics("ptest")
def ptest(cpu: Processor, insn: Instruction) -> None:
    """ZF: no common bit; CF: the source lies within the destination."""
    target, operand = insn.operands
    assert isinstance(target, Xmm)
    require_sse(cpu, "sse41")
    a, b = target.read(cpu), read(cpu, operand, 16)
    cpu.rflags = cpu.rflags & ~STATUS | (0 if a & b else ZF) | (0 if ~a & b else CF)
