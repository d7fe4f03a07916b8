"""x87, SSE and extended state as KVM's interface has it (api.rst 4.22, 4.23, 4.42, 4.43)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.errors import UsageError
from pykvm.model.cpu import x87_registers as stack
from pykvm.model.cpu.xstate import (
    IMPLEMENTED,
    LEGACY_AND_HEADER,
    MXCSR_DEFAULT,
    PKRU,
    PKRU_NUMBER,
    SSE,
    X87,
    in_use,
    mxcsr_mask,
    placement,
)
from pykvm.x86.fpu import FloatingPoint

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor

XSAVE_BYTES: Final = 4096
_MXCSR, _MXCSR_MASK_AT, _ST, _XMM = 24, 28, 32, 160
_XSTATE_BV, _XCOMP_BV = 512, 520
_REGISTERS_EACH: Final = 16


def get_fpu(cpu: Processor) -> FloatingPoint:
    """x87 and SSE state as a plain value."""
    x87 = cpu.x87
    return FloatingPoint(
        fpr=tuple(stack.get(x87, index).to_bytes(16, "little") for index in range(8)),
        fcw=x87.control,
        fsw=x87.status,
        ftwx=stack.abridged_tags(x87),
        last_opcode=x87.opcode,
        last_ip=x87.instruction_pointer,
        last_dp=x87.data_pointer,
        xmm=tuple(register.to_bytes(16, "little") for register in cpu.xmm),
        mxcsr=cpu.mxcsr,
    )


def set_fpu(cpu: Processor, value: FloatingPoint) -> None:
    """The inverse.  Raises UsageError for registers of a wrong number or size, or reserved bits of MXCSR."""
    for registers, count in ((value.fpr, 8), (value.xmm, 16)):
        if len(registers) != count or any(len(register) != 16 for register in registers):
            raise UsageError("There are 8 x87 and 16 XMM registers of 16 bytes each.")
    _check_mxcsr(cpu, value.mxcsr)
    x87 = cpu.x87
    stack.set_control(x87, value.fcw)
    stack.set_status(x87, value.fsw)
    stack.set_abridged_tags(x87, value.ftwx)
    x87.opcode, x87.instruction_pointer, x87.data_pointer = value.last_opcode, value.last_ip, value.last_dp
    stack.load_registers(x87, b"".join(value.fpr))
    cpu.xmm[:] = [int.from_bytes(register, "little") for register in value.xmm]
    cpu.mxcsr = value.mxcsr


def _check_mxcsr(cpu: Processor, value: int) -> None:
    allowed = mxcsr_mask(cpu)
    if value & ~allowed:
        raise UsageError(f"MXCSR {value:#x} has bits that this processor lacks; allowed are {allowed:#x}.")


def get_xsave(cpu: Processor) -> bytes:
    """The XSAVE area in the standard format, 4096 bytes; XSTATE_BV names what is not in its initial state."""
    area = bytearray(XSAVE_BYTES)
    present = in_use(cpu) | (SSE if cpu.mxcsr != MXCSR_DEFAULT else 0)
    area[0 : stack.HEADER_BYTES] = stack.header(cpu, True)
    area[_MXCSR : _MXCSR + 4] = cpu.mxcsr.to_bytes(4, "little")
    area[_MXCSR_MASK_AT : _MXCSR_MASK_AT + 4] = mxcsr_mask(cpu).to_bytes(4, "little")
    area[_ST : _ST + stack.REGISTERS_BYTES] = stack.registers(cpu.x87)
    area[_XMM : _XMM + 256] = b"".join(register.to_bytes(16, "little") for register in cpu.xmm)
    offset, size = placement(cpu, PKRU_NUMBER)
    if size:
        area[offset : offset + 4] = cpu.pkru.to_bytes(4, "little")
    else:
        present &= ~PKRU
    area[_XSTATE_BV : _XSTATE_BV + 8] = present.to_bytes(8, "little")
    return bytes(area)


def set_xsave(cpu: Processor, area: bytes) -> None:
    """Load such an area, from here or from KVM; components that XSTATE_BV lacks take their initial state.

    Raises UsageError for an area that is too short or compacted, for reserved bits of MXCSR, and for
    components that this processor lacks unless their bytes are zero (that is how KVM stores unused AVX).
    """
    if len(area) < LEGACY_AND_HEADER:
        raise UsageError(f"An XSAVE area has at least {LEGACY_AND_HEADER} bytes, not {len(area)}.")
    present = int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little")
    if any(area[_XCOMP_BV : _XCOMP_BV + 8]):
        raise UsageError("The XSAVE area is compacted; save it in the standard format.")
    offset, size = placement(cpu, PKRU_NUMBER)
    foreign = present & ~(IMPLEMENTED if size else X87 | SSE)
    if foreign and _extended_bytes(area, offset, size):
        raise UsageError(f"The XSAVE area uses components {foreign:#x}, which the model does not have.")
    mxcsr = int.from_bytes(area[_MXCSR : _MXCSR + 4], "little") if present & SSE else MXCSR_DEFAULT
    _check_mxcsr(cpu, mxcsr)
    if present & X87:
        stack.load_header(cpu, area, True)
        stack.load_registers(cpu.x87, area[_ST : _ST + stack.REGISTERS_BYTES])
    else:
        stack.initialize(cpu.x87)
        cpu.x87.registers[:] = [0] * 8
    image = area[_XMM : _XMM + 256] if present & SSE else bytes(256)
    cpu.xmm[:] = [int.from_bytes(image[at : at + 16], "little") for at in range(0, 256, _REGISTERS_EACH)]
    cpu.mxcsr = mxcsr
    cpu.pkru = int.from_bytes(area[offset : offset + 4], "little") if present & PKRU and size else 0
    cpu.flush_tlb()


def _extended_bytes(area: bytes, pkru_at: int, pkru_size: int) -> bool:
    """Whether anything but PKRU is stored behind the header."""
    rest = bytearray(area[LEGACY_AND_HEADER:])
    if pkru_size:
        at = pkru_at - LEGACY_AND_HEADER
        rest[at : at + pkru_size] = bytes(len(rest[at : at + pkru_size]))
    return any(rest)
