"""FXSAVE and FXRSTOR, and the legacy region that they share with XSAVE (SDM vol. 1, 10.5 and 13.4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import x87_registers as stack
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import Memory
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.xstate import mxcsr_mask
from pykvm.x86.bits import Cr0, Cr4

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

AREA_BYTES: Final = 512
MXCSR_AT: Final = 24
ST_AT: Final = 32
XMM_AT: Final = 160
_XMM_BYTES: Final = 16


def area(cpu: Processor, insn: Instruction, size: int, alignment: int, write: bool) -> int:
    """The linear address of the memory operand: #GP(0) unless aligned."""
    (operand,) = insn.operands
    assert isinstance(operand, Memory)
    address = cpu.linear(operand.segment, operand.offset(cpu), size, write)
    if address & alignment - 1 and not cpu.lenient:
        raise Fault.gp()
    return address


def is_wide(insn: Instruction) -> bool:
    """REX.W: pointers of 64 bits instead of 32 and a selector."""
    return bool(insn.rex & 8)


def _xmm_count(cpu: Processor) -> int:
    """XMM8 to XMM15 are there in 64-bit mode only."""
    return 16 if cpu.bits64 else 8


def save_x87(cpu: Processor, address: int, wide: bool) -> None:
    cpu.store_linear(address, stack.header(cpu, wide))
    cpu.store_linear(address + ST_AT, stack.registers(cpu.x87))


def save_mxcsr(cpu: Processor, address: int) -> None:
    """MXCSR and its mask."""
    words = cpu.mxcsr.to_bytes(4, "little") + mxcsr_mask(cpu).to_bytes(4, "little")
    cpu.store_linear(address + MXCSR_AT, words)


def save_xmm(cpu: Processor, address: int) -> None:
    registers = cpu.xmm[: _xmm_count(cpu)]
    cpu.store_linear(address + XMM_AT, b"".join(each.to_bytes(_XMM_BYTES, "little") for each in registers))


def load_x87(cpu: Processor, image: bytes, wide: bool) -> None:
    stack.load_header(cpu, image, wide)
    stack.load_registers(cpu.x87, image[ST_AT : ST_AT + stack.REGISTERS_BYTES])


def mxcsr_of(cpu: Processor, image: bytes) -> int:
    """MXCSR out of an area; reserved bits raise #GP(0)."""
    value = int.from_bytes(image[MXCSR_AT : MXCSR_AT + 4], "little")
    if value & ~mxcsr_mask(cpu):
        raise Fault.gp()
    return value


def load_xmm(cpu: Processor, image: bytes) -> None:
    for number in range(_xmm_count(cpu)):
        at = XMM_AT + number * _XMM_BYTES
        cpu.xmm[number] = int.from_bytes(image[at : at + _XMM_BYTES], "little")


def _require_fxsr(cpu: Processor) -> None:
    if not cpu.features.fxsr:
        raise Fault.ud()
    if cpu.cr0 & (Cr0.EM | Cr0.TS):
        raise Fault.nm()


@semantics("fxsave", "fxsave64")
def fxsave(cpu: Processor, insn: Instruction) -> None:
    """Without CR4.OSFXSR the SSE state is left out, as processors and KVM do.  Bytes 416 on stay."""
    _require_fxsr(cpu)
    address = area(cpu, insn, AREA_BYTES, 16, True)
    (target,) = insn.operands
    assert isinstance(target, Memory)
    cpu.require_writable(target.segment, target.offset(cpu), AREA_BYTES)  # all of it must be writable (host)
    save_x87(cpu, address, is_wide(insn))
    save_mxcsr(cpu, address)
    if cpu.cr4 & Cr4.OSFXSR:
        save_xmm(cpu, address)


@semantics("fxrstor", "fxrstor64")
def fxrstor(cpu: Processor, insn: Instruction) -> None:
    """Reserved bits of MXCSR raise #GP(0)."""
    _require_fxsr(cpu)
    image = cpu.load_linear(area(cpu, insn, AREA_BYTES, 16, False), AREA_BYTES)
    mxcsr = mxcsr_of(cpu, image)
    load_x87(cpu, image, is_wide(insn))
    if cpu.cr4 & Cr4.OSFXSR:
        cpu.mxcsr = mxcsr
        load_xmm(cpu, image)
