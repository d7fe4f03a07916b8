"""XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS (SDM vol. 1, 13.7 to 13.13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import fxsave
from pykvm.model.cpu import x87_registers as stack
from pykvm.model.cpu.control import require_cpl0
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import RAX, RDX
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.xstate import (
    LEGACY_AND_HEADER,
    MXCSR_DEFAULT,
    PKRU,
    PKRU_NUMBER,
    SSE,
    X87,
    compacted_offset,
    compacted_size,
    in_use,
    placement,
    standard_size,
)
from pykvm.x86.bits import Cr0, Cr4

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_HEADER: Final = 512
_ALIGNMENT: Final = 64
_COMPACTED: Final = 1 << 63
_PKRU_VALUE_BYTES: Final = 4


def _require_xsave(cpu: Processor, feature: str) -> None:
    if not getattr(cpu.features, feature) or not cpu.cr4 & Cr4.OSXSAVE:
        raise Fault.ud()
    if cpu.cr0 & Cr0.TS:
        raise Fault.nm()


def _requested(cpu: Processor, enabled: int) -> int:
    """RFBM: the components asked for in EDX:EAX that are enabled."""
    return ((cpu.regs[RDX] & 0xFFFFFFFF) << 32 | cpu.regs[RAX] & 0xFFFFFFFF) & enabled


def _word(image: bytes, at: int) -> int:
    return int.from_bytes(image[at : at + 8], "little")


# --- saving -----------------------------------------------------------------------------------------------


@semantics("xsave", "xsave64", "xsaveopt", "xsaveopt64")
def xsave(cpu: Processor, insn: Instruction) -> None:
    """The standard format; XSAVEOPT leaves out components in their initial state."""
    optimizing = insn.name.startswith("xsaveopt")
    _require_xsave(cpu, "xsaveopt" if optimizing else "xsave")
    requested, used = _requested(cpu, cpu.xcr0), in_use(cpu)
    address = fxsave.area(cpu, insn, standard_size(cpu, requested), _ALIGNMENT, True)
    saved = requested & used if optimizing else requested
    if saved & X87:
        fxsave.save_x87(cpu, address, fxsave.is_wide(insn))
    if requested & SSE:
        fxsave.save_mxcsr(cpu, address)
    if saved & SSE:
        fxsave.save_xmm(cpu, address)
    if saved & PKRU:
        _save_pkru(cpu, address + placement(cpu, PKRU_NUMBER)[0])
    present = int.from_bytes(cpu.load_linear(address + _HEADER, 8), "little")
    present = present & ~requested | used & requested
    cpu.store_linear(address + _HEADER, present.to_bytes(8, "little"))


def _save_pkru(cpu: Processor, address: int) -> None:
    size = placement(cpu, PKRU_NUMBER)[1]
    cpu.store_linear(address, cpu.pkru.to_bytes(size, "little"))


@semantics("xsavec", "xsavec64")
def xsavec(cpu: Processor, insn: Instruction) -> None:
    _require_xsave(cpu, "xsavec")
    _save_compacted(cpu, insn, _requested(cpu, cpu.xcr0))


@semantics("xsaves", "xsaves64")
def xsaves(cpu: Processor, insn: Instruction) -> None:
    _require_xsave(cpu, "xsaves")
    require_cpl0(cpu)
    _save_compacted(cpu, insn, _requested(cpu, cpu.xcr0 | cpu.xss))


def _save_compacted(cpu: Processor, insn: Instruction, requested: int) -> None:
    """Components in use, one behind the other; an MXCSR that was changed counts as SSE in use."""
    used = in_use(cpu) | (SSE if cpu.mxcsr != MXCSR_DEFAULT else 0)
    present = requested & used
    address = fxsave.area(cpu, insn, compacted_size(cpu, requested), _ALIGNMENT, True)
    if present & X87:
        fxsave.save_x87(cpu, address, fxsave.is_wide(insn))
    if present & SSE:
        fxsave.save_mxcsr(cpu, address)
        fxsave.save_xmm(cpu, address)
    if present & PKRU:
        _save_pkru(cpu, address + compacted_offset(cpu, requested, PKRU_NUMBER))
    header = present.to_bytes(8, "little") + (requested | _COMPACTED).to_bytes(8, "little")
    cpu.store_linear(address + _HEADER, header)


# --- restoring --------------------------------------------------------------------------------------------


@semantics("xrstor", "xrstor64")
def xrstor(cpu: Processor, insn: Instruction) -> None:
    """Either format, told by bit 63 of XCOMP_BV."""
    _require_xsave(cpu, "xsave")
    address = fxsave.area(cpu, insn, LEGACY_AND_HEADER, _ALIGNMENT, False)
    image = cpu.load_linear(address, LEGACY_AND_HEADER)
    present, format_ = _word(image, _HEADER), _word(image, _HEADER + 8)
    requested = _requested(cpu, cpu.xcr0)
    if format_ & _COMPACTED and cpu.features.xsavec:
        _restore_compacted(cpu, insn, address, image, requested, cpu.xcr0)
        return
    if present & ~cpu.xcr0 or format_ or _word(image, _HEADER + 16):
        raise Fault.gp()
    # MXCSR comes from the area even where XSTATE_BV says that SSE is in its initial state.
    mxcsr = fxsave.mxcsr_of(cpu, image) if requested & SSE else cpu.mxcsr
    pkru = _load_pkru(cpu, address + placement(cpu, PKRU_NUMBER)[0], requested & present)
    _restore(cpu, insn, image, requested, present, mxcsr, pkru)


@semantics("xrstors", "xrstors64")
def xrstors(cpu: Processor, insn: Instruction) -> None:
    """The compacted format only."""
    _require_xsave(cpu, "xsaves")
    require_cpl0(cpu)
    enabled = cpu.xcr0 | cpu.xss
    address = fxsave.area(cpu, insn, LEGACY_AND_HEADER, _ALIGNMENT, False)
    image = cpu.load_linear(address, LEGACY_AND_HEADER)
    if not _word(image, _HEADER + 8) & _COMPACTED:
        raise Fault.gp()
    _restore_compacted(cpu, insn, address, image, _requested(cpu, enabled), enabled)


def _restore_compacted(
    cpu: Processor, insn: Instruction, address: int, image: bytes, requested: int, enabled: int
) -> None:
    present, format_ = _word(image, _HEADER), _word(image, _HEADER + 8) & ~_COMPACTED
    if format_ & ~enabled or present & ~format_ or any(image[_HEADER + 16 : LEGACY_AND_HEADER]):
        raise Fault.gp()
    mxcsr = cpu.mxcsr
    if requested & SSE:
        mxcsr = fxsave.mxcsr_of(cpu, image) if present & SSE else MXCSR_DEFAULT
    offset = compacted_offset(cpu, format_, PKRU_NUMBER)
    pkru = _load_pkru(cpu, address + offset, requested & present)
    _restore(cpu, insn, image, requested, present, mxcsr, pkru)


def _load_pkru(cpu: Processor, address: int, wanted: int) -> int:
    if not wanted & PKRU:
        return 0
    return int.from_bytes(cpu.load_linear(address, _PKRU_VALUE_BYTES), "little")


def _restore(
    cpu: Processor, insn: Instruction, image: bytes, requested: int, present: int, mxcsr: int, pkru: int
) -> None:
    """Load what is requested and present, initialize what is requested only; nothing faults any more."""
    if requested & X87:
        if present & X87:
            fxsave.load_x87(cpu, image, fxsave.is_wide(insn))
        else:
            stack.initialize(cpu.x87)
            cpu.x87.registers[:] = [0] * 8
    if requested & SSE:
        cpu.mxcsr = mxcsr
        fxsave.load_xmm(cpu, image if present & SSE else bytes(LEGACY_AND_HEADER))
    if requested & PKRU:
        cpu.pkru = pkru
        cpu.flush_tlb()
