"""MSRs, time, and the other small system instructions against the SDM and KVM's documentation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.machine.exits import Halted
from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.cpu.instruction import FS, GS
from pykvm.x86.cpuid import CpuidEntry
from tests.model.chip import Chip

RAX, RCX, RDX = 0, 1, 2
EFER, APIC_BASE, PAT, TSC, TSC_ADJUST, KERNEL_GS_BASE = 0xC0000080, 0x1B, 0x277, 0x10, 0x3B, 0xC0000102
RDMSR, WRMSR = "0f32", "0f30"
GP, UD = "#GP(0x0)", "#UD"
SCE, LME, LMA, NXE = 1, 1 << 8, 1 << 10, 1 << 11
FSGSBASE, OSXSAVE, PKE, TSD = 1 << 16, 1 << 18, 1 << 22, 1 << 2


def put_msr(chip: Chip, index: int, value: int) -> str | None:
    chip.regs[RCX], chip.regs[RAX], chip.regs[RDX] = index, value & 0xFFFFFFFF, value >> 32
    return chip.do(WRMSR)


def get_msr(chip: Chip, index: int) -> int | str:
    chip.regs[RCX] = index
    fault = chip.do(RDMSR)
    return fault or chip.regs[RDX] << 32 | chip.regs[RAX]


def offering(function: int, register: str, bit: int, index: int = 0) -> tuple[CpuidEntry, ...]:
    """The model's CPUID and one bit more."""
    return tuple(
        replace(e, **{register: getattr(e, register) | 1 << bit})
        if (e.function, e.index) == (function, index)
        else e
        for e in supported_cpuid()
    )


@pytest.mark.parametrize(
    ("index", "good", "bad"),
    [
        (0xC0000081, 0xFFFFFFFFFFFFFFFF, None),  # STAR
        (0xC0000082, 0xFFFF800000000000, 1 << 47),  # LSTAR: canonical
        (0xC0000084, 0xFFFFFFFF, 1 << 32),  # the mask of SYSCALL
        (KERNEL_GS_BASE, 0x7FFFFFFFFFFF, 1 << 63),
        (0x175, 0xFFFF800000000000, 1 << 47),  # SYSENTER_ESP
        (0x174, 0xFFFFFFFFFFFF, None),
        (PAT, 0x0007010600070406, 2),  # type 2 is reserved
        (PAT, 0x0405060700010004, 0x0800000000000000),
        (0x2FF, 0xC06, 0xC02),  # MTRR_DEF_TYPE
        (0x250, 0x0606060606060606, 7),  # fixed ranges take no UC-
        (0x200, 0x3FFFFFFFF006, 1 << 46),  # MAXPHYADDR
        (0x201, 0x3FFFFFFFF800, 1 << 10),
        (0x6E1, 0xFFFFFFFF, 1 << 32),  # PKRS
        (0xDA0, 0, 1),  # XSS: no supervisor components
        (0xC0000103, 0xFFFFFFFF, 1 << 32),  # TSC_AUX
        (0x1D9, 3, 4),  # DEBUGCTL
    ],
)
def test_msr_stores_what_it_takes_and_refuses_the_rest(index: int, good: int, bad: int | None) -> None:
    chip = Chip()
    assert put_msr(chip, index, good) is None
    assert get_msr(chip, index) == good
    if bad is not None:
        assert put_msr(chip, index, bad) == GP
        assert get_msr(chip, index) == good


def test_unknown_read_only_and_missing_msrs() -> None:
    chip = Chip()
    assert get_msr(chip, 0x12345) == GP
    assert put_msr(chip, 0x12345, 0) == GP
    assert get_msr(chip, 0xFE) == 0x508
    assert put_msr(chip, 0xFE, 0x508) == GP
    assert get_msr(chip, 0x48) == GP  # SPEC_CTRL is not offered
    offered = Chip(cpuid=offering(7, "edx", 26))
    assert put_msr(offered, 0x48, 1) is None
    assert get_msr(offered, 0x48) == 1
    assert put_msr(offered, 0x49, 1) is None
    assert get_msr(offered, 0x49) == GP
    assert get_msr(Chip(64, 3), TSC) == GP
    assert put_msr(Chip(64, 3), TSC, 0) == GP


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (SCE | LME | NXE, None),
        (LME | LMA, None),  # LMA is not writable
        (SCE | NXE, GP),  # LME cannot change with paging
        (LME | 1 << 12, GP),  # SVME is not offered
        (LME | 2, GP),
    ],
)
def test_efer_rules_with_paging(value: int, fault: str | None) -> None:
    chip = Chip()
    before = chip.efer
    assert put_msr(chip, EFER, value) == fault
    assert chip.efer == (before if fault else value | LMA)


def test_efer_outside_paging() -> None:
    chip = Chip(32)
    assert put_msr(chip, EFER, LME | LMA) is None
    assert chip.efer == LME
    assert not chip.long_mode


def test_segment_base_msrs_are_the_hidden_bases() -> None:
    chip = Chip()
    assert put_msr(chip, 0xC0000100, 0x1234) is None
    assert chip.segments[FS].base == 0x1234
    assert chip.windows[FS].base == 0x1234
    chip.set_segment(GS, replace(chip.segments[GS], base=0x5678))
    assert get_msr(chip, 0xC0000101) == 0x5678
    assert put_msr(chip, KERNEL_GS_BASE, 0x9000) is None
    assert chip.do("0f01f8") is None  # SWAPGS
    assert chip.segments[GS].base == 0x9000
    assert get_msr(chip, KERNEL_GS_BASE) == 0x5678
    assert Chip(64, 3).do("0f01f8") == GP
    assert Chip(32).do("0f01f8") == UD


def test_apic_base() -> None:
    chip = Chip()
    assert put_msr(chip, APIC_BASE, 0xFEE00800) is None
    assert chip.apic_base == 0xFEE00800
    assert put_msr(chip, APIC_BASE, 0xFEE00801) == GP
    assert put_msr(chip, APIC_BASE, 1 << 46 | 0x800) == GP
    assert put_msr(chip, APIC_BASE, 0xFEE00C00) == GP  # no x2APIC
    x2apic = Chip(cpuid=offering(1, "ecx", 21))
    assert put_msr(x2apic, APIC_BASE, 0xFEE00400) == GP  # EXTD without EN
    assert put_msr(x2apic, APIC_BASE, 0xFEE00C00) is None
    assert put_msr(x2apic, APIC_BASE, 0xFEE00800) == GP  # only through "disabled"
    assert put_msr(x2apic, APIC_BASE, 0xFEE00000) is None
    assert put_msr(x2apic, APIC_BASE, 0xFEE00C00) == GP


# --- time -------------------------------------------------------------------------------------------------


def test_the_tsc_counts_instructions_and_can_be_set() -> None:
    chip = Chip()
    assert put_msr(chip, TSC, 1000) is None
    assert chip.do("0f31") is None
    assert chip.regs[RAX] == 1001
    assert get_msr(chip, TSC) == 1002
    assert get_msr(chip, TSC_ADJUST) == 1000
    assert put_msr(chip, TSC_ADJUST, 0) is None
    assert get_msr(chip, TSC) == 5


def test_rdtsc_and_tsd() -> None:
    chip = Chip(64, 3)
    assert chip.do("0f31") is None
    chip.cr4 |= TSD
    assert chip.do("0f31") == GP
    assert chip.do("0f01f9") == GP
    chip = Chip()
    chip.cr4 |= TSD
    put_msr(chip, 0xC0000103, 7)
    assert chip.do("0f01f9") is None
    assert chip.regs[RCX] == 7
    assert chip.do("f30fc7f8") is None
    assert chip.regs[RAX] == 7


def test_rdpmc_and_rdrand() -> None:
    assert Chip().do("0f33") == GP
    assert Chip().do("0fc7f0") == UD  # not offered
    first, second = Chip(cpuid=offering(1, "ecx", 30)), Chip(cpuid=offering(1, "ecx", 30))
    for chip in (first, second):
        assert chip.do("480fc7f0") is None
        assert chip.rflags & 1
    assert first.regs[RAX] == second.regs[RAX] != 0
    value = first.regs[RAX]
    assert first.do("480fc7f0") is None
    assert first.regs[RAX] != value


# --- the rest ---------------------------------------------------------------------------------------------


def test_hlt_exits_behind_itself() -> None:
    chip = Chip()
    chip.put(0x8000, b"\xf4")
    assert chip.run(10) == Halted()
    assert chip.rip == 0x8001
    assert Chip(64, 3).do("f4") == GP


def test_xcr0() -> None:
    chip = Chip()
    assert chip.do("0f01d0") == UD
    chip.cr4 |= OSXSAVE

    def put(value: int, index: int = 0) -> str | None:
        chip.regs[RCX], chip.regs[RAX], chip.regs[RDX] = index, value & 0xFFFFFFFF, value >> 32
        return chip.do("0f01d1")

    assert put(3) is None
    assert put(0x203) is None
    for wrong in (2, 0, 7, 1 << 63 | 1):
        assert put(wrong) == GP
    assert put(1, index=1) == GP
    chip.regs[RCX] = 0
    assert chip.do("0f01d0") is None
    assert chip.regs[RAX] == 0x203
    chip.regs[RCX], chip.xmm[3] = 1, 9
    assert chip.do("0f01d0") is None
    assert chip.regs[RAX] == 2
    chip.regs[RCX] = 2
    assert chip.do("0f01d0") == GP
    user = Chip(64, 3)
    user.cr4 |= OSXSAVE
    user.regs[RAX] = 3
    assert user.do("0f01d1") == GP


def test_fsgsbase() -> None:
    chip = Chip(64, 3)
    assert chip.do("f30faec0") == UD
    chip.cr4 |= FSGSBASE
    chip.regs[RAX] = 0xFFFF812345678000
    assert chip.do("f3480faed0") is None
    assert chip.segments[FS].base == 0xFFFF812345678000
    assert chip.do("f30faec0") is None
    assert chip.regs[RAX] == 0x45678000
    assert chip.do("f30faed8") is None
    assert chip.segments[GS].base == 0x45678000
    chip.regs[RAX] = 1 << 47
    assert chip.do("f3480faed0") == GP


def test_protection_keys() -> None:
    chip = Chip(64, 3)
    assert chip.do("0f01ee") == UD
    assert chip.do("0f01ef") == UD
    chip.cr4 |= PKE
    chip.regs[RAX], chip.regs[RDX] = 0x55555554, 0
    assert chip.do("0f01ef") is None
    assert chip.pkru == 0x55555554
    chip.regs[RAX] = chip.regs[RDX] = 9
    assert chip.do("0f01ef") == GP
    assert chip.do("0f01ee") is None
    assert (chip.regs[RAX], chip.regs[RDX]) == (0x55555554, 0)
    chip.regs[RCX] = 1
    assert chip.do("0f01ee") == GP


def test_clac_stac() -> None:
    chip = Chip()
    assert chip.do("0f01cb") is None
    assert chip.rflags >> 18 & 1
    assert chip.do("0f01ca") is None
    assert not chip.rflags >> 18 & 1
    assert Chip(64, 3).do("0f01cb") == UD


@pytest.mark.parametrize(
    ("bits", "cpl", "result"),
    [(64, 0, 2**64 - 1000), (32, 0, 2**32 - 1000), (64, 3, 2**64 - 1), (32, 3, 2**32 - 1)],
)
@pytest.mark.parametrize("code", ["0f01c1", "0f01d9"])
def test_hypercalls_answer_as_kvm_does_for_unknown_ones(code: str, bits: int, cpl: int, result: int) -> None:
    """-KVM_ENOSYS at CPL 0, -KVM_EPERM elsewhere (Documentation/virt/kvm/x86/hypercalls.rst)."""
    chip = Chip(bits, cpl)
    chip.regs[RAX] = 0xFFFF
    assert chip.do(code) is None
    assert chip.regs[RAX] == result
