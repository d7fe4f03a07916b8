"""FXSAVE, the XSAVE family, and the same state in the forms of KVM (SDM vol. 1, 10.5 and ch. 13)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.errors import UsageError
from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.cpu.fpu_state import get_fpu, get_xsave, set_fpu, set_xsave
from pykvm.x86.fpu import FloatingPoint
from tests.model.chip import DATA, Chip

RAX, RDX, RDI = 0, 2, 7
OSFXSR, OSXSAVE, TS, EM = 1 << 9, 1 << 18, 1 << 3, 1 << 2
FXSAVE, FXRSTOR = "0fae07", "0fae0f"
XSAVE, XSAVEOPT, XRSTOR, XSAVEC, XSAVES, XRSTORS = (
    "480fae27", "480fae37", "480fae2f", "480fc727", "480fc72f", "480fc71f",
)  # fmt: skip
GP, UD = "#GP(0x0)", "#UD"
XSTATE_BV, XCOMP_BV, PKRU_AT = DATA + 512, DATA + 520, DATA + 2688
COMPACTED = 1 << 63
ONE = 0x3FFF << 64 | 1 << 63  # 1.0 in 80 bits


def machine(cpl: int = 0, mask: int = 0x203) -> Chip:
    """ST(0) is 1.0 at TOP 7, XMM1 and XMM9 and PKRU are set; RDI and EDX:EAX are ready."""
    chip = Chip(64, cpl)
    chip.cr4 |= OSXSAVE
    chip.xcr0 = 0x203
    chip.regs[RDI], chip.regs[RAX], chip.regs[RDX] = DATA, mask, 0
    assert chip.do("d9e8") is None  # FLD1
    chip.xmm[1], chip.xmm[9], chip.pkru = 0x1111, 0x9999, 0x54
    return chip


def empty(chip: Chip) -> Chip:
    """Another processor on the same memory."""
    other = Chip(64, chip.cpl)
    other.bus = chip.bus
    other.cr4, other.xcr0 = chip.cr4, chip.xcr0
    other.regs[:] = chip.regs
    return other


# --- FXSAVE -----------------------------------------------------------------------------------------------


def test_fxsave_lays_out_the_area() -> None:
    chip = machine()
    chip.put(DATA, b"\xee" * 512)
    assert chip.do(FXSAVE) is None
    assert chip.at(DATA, 2) == 0x37F
    assert chip.at(DATA + 2, 2) == 7 << 11
    assert chip.at(DATA + 4, 1) == 0x80  # only R7 is in use
    assert chip.at(DATA + 24, 4) == 0x1F80
    assert chip.at(DATA + 28, 4) == 0xFFFF
    assert chip.at(DATA + 32, 16) == ONE
    assert chip.at(DATA + 160 + 16, 16) == 0x1111
    assert chip.at(DATA + 160 + 9 * 16, 16) == 0x9999
    assert chip.at(DATA + 416, 8) == 0xEEEEEEEEEEEEEEEE
    other = empty(chip)
    assert other.do(FXRSTOR) is None
    assert get_fpu(other).fpr == get_fpu(chip).fpr
    assert other.xmm == chip.xmm


def test_fxsave_outside_64_bit_mode_has_eight_xmm_registers() -> None:
    chip = Chip(32)
    chip.regs[RDI], chip.xmm[9] = DATA, 0x9999
    chip.put(DATA, b"\xee" * 512)
    assert chip.do(FXSAVE) is None
    assert chip.at(DATA + 160 + 7 * 16, 16) == 0
    assert chip.at(DATA + 160 + 8 * 16, 1) == 0xEE


@pytest.mark.parametrize("bits", [16, 32])
def test_fxsave_leaves_xmm_out_without_osfxsr(bits: int) -> None:
    chip = Chip(bits)
    chip.cr4 &= ~OSFXSR
    chip.regs[3 if bits == 16 else RDI] = DATA
    chip.put(DATA, b"\xee" * 512)
    assert chip.do("0fae07" if bits == 16 else FXSAVE) is None
    assert chip.at(DATA + 160, 1) == 0xEE


def test_fxsave_and_fxrstor_refuse() -> None:
    chip = machine()
    chip.regs[RDI] = DATA + 8
    assert chip.do(FXSAVE) == GP
    chip.regs[RDI] = DATA
    chip.put(DATA + 24, (1 << 16).to_bytes(4, "little"))
    before = get_fpu(chip)
    assert chip.do(FXRSTOR) == GP
    assert get_fpu(chip) == before
    for bit in (TS, EM):
        chip.cr0 = chip.cr0 & ~(TS | EM) | bit
        assert chip.do(FXSAVE) == "#NM"


# --- XSAVE ------------------------------------------------------------------------------------------------


def test_xsave_writes_what_was_asked_for() -> None:
    chip = machine(mask=2)
    chip.put(DATA, b"\xee" * 512)
    chip.put(XSTATE_BV, (0x80).to_bytes(8, "little") + b"\xaa" * 8)
    assert chip.do(XSAVE) is None
    assert chip.at(DATA, 1) == 0xEE  # x87 was not asked for
    assert chip.at(DATA + 24, 4) == 0x1F80
    assert chip.at(DATA + 160 + 16, 16) == 0x1111
    assert chip.at(XSTATE_BV, 8) == 0x82  # other bits stay
    assert chip.at(XCOMP_BV, 1) == 0xAA


def test_xsaveopt_leaves_out_initial_components() -> None:
    chip = machine()
    chip.xmm[:] = [0] * 16
    chip.put(DATA, b"\xee" * 512)
    assert chip.do(XSAVEOPT) is None
    assert chip.at(XSTATE_BV, 8) == 0x201
    assert chip.at(DATA + 160, 1) == 0xEE
    assert chip.at(PKRU_AT, 8) == 0x54


@pytest.mark.parametrize(("code", "cpl"), [(XSAVEC, 3), (XSAVES, 0)])
def test_compacted_form(code: str, cpl: int) -> None:
    chip = machine(cpl)
    assert chip.do(code) is None
    assert chip.at(XSTATE_BV, 8) == 0x203
    assert chip.at(XCOMP_BV, 8) == COMPACTED | 0x203
    assert chip.at(DATA + 576, 8) == 0x54
    other = empty(chip)
    assert other.do(XRSTOR) is None
    assert (get_fpu(other).fpr, other.xmm, other.pkru) == (get_fpu(chip).fpr, chip.xmm, 0x54)


def test_xsavec_counts_a_changed_mxcsr_as_sse() -> None:
    chip = machine(mask=2)
    chip.xmm[:] = [0] * 16
    assert chip.do(XSAVEC) is None
    assert chip.at(XSTATE_BV, 8) == 0
    chip.mxcsr = 0x1FA0
    assert chip.do(XSAVEC) is None
    assert chip.at(XSTATE_BV, 8) == 2


def test_xrstor_initializes_what_is_absent_but_loads_mxcsr() -> None:
    chip = machine()
    chip.put(DATA, bytes(576))
    chip.put(DATA + 24, (0x3F80).to_bytes(4, "little"))
    assert chip.do(XRSTOR) is None
    assert get_fpu(chip) == FloatingPoint(mxcsr=0x3F80)
    assert chip.pkru == 0


def test_xrstor_of_the_compacted_form_initializes_mxcsr() -> None:
    chip = machine()
    chip.mxcsr = 0x3F80
    chip.put(DATA, bytes(576))
    chip.put(XCOMP_BV, (COMPACTED | 3).to_bytes(8, "little"))
    assert chip.do(XRSTORS) is None
    assert chip.mxcsr == 0x1F80


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (XSTATE_BV, 4),  # AVX is not in XCR0
        (XCOMP_BV, 1),  # neither form
        (DATA + 528, 1),  # reserved in the standard form
        (XCOMP_BV, COMPACTED | 4),  # not in XCR0
        (DATA + 24, 1 << 16),  # MXCSR
    ],
)
def test_xrstor_checks_the_header(at: int, value: int) -> None:
    chip = machine()
    chip.put(DATA, bytes(576))
    chip.put(at, value.to_bytes(8, "little"))
    before = get_fpu(chip)
    assert chip.do(XRSTOR) == GP
    assert get_fpu(chip) == before


def test_compacted_header_is_checked_more() -> None:
    chip = machine()
    chip.put(DATA, bytes(576))
    chip.put(XSTATE_BV, (2).to_bytes(8, "little") + (COMPACTED | 1).to_bytes(8, "little"))
    assert chip.do(XRSTOR) == GP  # SSE is not in XCOMP_BV
    chip.put(XSTATE_BV, (0).to_bytes(8, "little") + (COMPACTED | 1).to_bytes(8, "little"))
    chip.put(DATA + 575, b"\1")
    assert chip.do(XRSTOR) == GP


def test_xsave_conditions() -> None:
    chip = machine()
    chip.regs[RDI] = DATA + 32
    assert chip.do(XSAVE) == GP  # 64 bytes
    chip.regs[RDI] = DATA
    assert chip.do(XRSTORS) == GP  # wants the compacted form
    chip.cr0 |= TS
    assert chip.do(XSAVE) == "#NM"
    chip.cr4 &= ~OSXSAVE
    assert chip.do(XSAVE) == UD
    user = machine(3)
    assert user.do(XSAVES) == GP
    assert user.do(XRSTORS) == GP
    plain = [replace(e, eax=0) if (e.function, e.index) == (0xD, 1) else e for e in supported_cpuid()]
    old = Chip(cpuid=plain)
    old.cr4 |= OSXSAVE
    for code in (XSAVEC, XSAVEOPT, XSAVES, XRSTORS):
        assert old.do(code) == UD


# --- KVM's forms ------------------------------------------------------------------------------------------


def test_fpu_goes_and_comes() -> None:
    value = FloatingPoint(
        fpr=tuple(bytes([n + 1] * 10) + bytes(6) for n in range(8)),
        fcw=0x27F,
        fsw=0x1800,
        ftwx=0x5A,
        last_opcode=0x107,
        last_ip=0x1234,
        last_dp=0x5678,
        xmm=tuple(bytes([n] * 16) for n in range(16)),
        mxcsr=0x1FA0,
    )
    chip = Chip()
    set_fpu(chip, value)
    assert get_fpu(chip) == value
    assert chip.x87.registers[3] == int.from_bytes(bytes([1] * 10), "little")  # ST(0) at TOP 3
    for wrong in (replace(value, mxcsr=1 << 16), replace(value, xmm=value.xmm[:8])):
        with pytest.raises(UsageError):
            set_fpu(chip, wrong)


def test_xsave_area_goes_and_comes() -> None:
    chip = machine()
    area = get_xsave(chip)
    assert len(area) == 4096
    assert int.from_bytes(area[512:520], "little") == 0x203
    assert area[32:42] == ONE.to_bytes(10, "little")
    assert area[2688:2692] == (0x54).to_bytes(4, "little")
    other = Chip()
    set_xsave(other, area)
    assert get_xsave(other) == area
    set_xsave(other, bytes(4096))
    assert get_fpu(other) == FloatingPoint()


def test_xsave_area_with_what_the_model_lacks_is_refused() -> None:
    chip = machine()
    area = bytearray(get_xsave(chip))
    area[512] |= 4  # AVX, in its initial state
    set_xsave(chip, bytes(area))
    area[576] = 1
    with pytest.raises(UsageError, match="components 0x4"):
        set_xsave(chip, bytes(area))
    with pytest.raises(UsageError, match="compacted"):
        set_xsave(chip, bytes(520) + bytes([1]) + bytes(3575))
    with pytest.raises(UsageError, match="576"):
        set_xsave(chip, bytes(512))
