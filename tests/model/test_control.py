"""Control, debug and descriptor-table registers against the rules of the SDM."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.cpu.faults import NeedInput
from pykvm.model.cpu.instruction import CS
from pykvm.x86.registers import DescriptorTable, Segment
from tests.model.chip import DATA, TOP_TABLE, Chip

RAX, RCX = 0, 1
PE, MP, EM, TS, ET, NE, WP, NW, CD, PG = (1 << n for n in (0, 1, 2, 3, 4, 5, 16, 29, 30, 31))
PAE, PGE, UMIP, LA57, VMXE, FSGSBASE, PCIDE, SMEP = (1 << n for n in (5, 7, 11, 12, 13, 16, 17, 20))
DE = 1 << 3
LME, LMA = 1 << 8, 1 << 10
GP = "#GP(0x0)"
UD = "#UD"
TO_CR0, TO_CR3, TO_CR4, TO_CR8 = "0f22c0", "0f22d8", "0f22e0", "440f22c0"
FROM_CR0, FROM_CR8 = "0f20c0", "440f20c0"


def write(chip: Chip, code: str, value: int) -> str | None:
    chip.regs[RAX] = value
    return chip.do(code)


def without(*names: tuple[int, int, str, int]) -> list[object]:
    """The model's CPUID without some bits: (leaf, subleaf, register, bit)."""
    entries = list(supported_cpuid())
    for leaf, index, register, bit in names:
        entries = [
            replace(e, **{register: getattr(e, register) & ~(1 << bit)})
            if (e.function, e.index) == (leaf, index)
            else e
            for e in entries
        ]
    return entries  # type: ignore[return-value]


# --- CR0 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (PE | PG | 1 << 32, GP),  # reserved upper half
        (PG | ET, GP),  # PG without PE
        (PE | PG | NW, GP),  # NW without CD
        (PE | ET, GP),  # paging off in 64-bit code
        (PE | PG | CD | NW, None),
        (PE | PG | CD, None),
    ],
)
def test_cr0_refuses_contradictions(value: int, fault: str | None) -> None:
    chip = Chip()
    before = chip.cr0
    assert write(chip, TO_CR0, value) == fault
    assert chip.cr0 == (before if fault else value | ET)


def test_cr0_ignores_undefined_low_bits_and_keeps_et() -> None:
    chip = Chip(32)
    assert write(chip, TO_CR0, PE | 1 << 6 | 1 << 17 | 1 << 19 | 1 << 28) is None
    assert chip.cr0 == PE | ET


def test_leaving_and_entering_long_mode_follows_pg() -> None:
    chip = Chip()
    chip.segments[CS] = replace(chip.segments[CS], l=0, db=1)
    chip.update_mode()
    assert write(chip, TO_CR0, PE | ET) is None
    assert chip.efer & LMA == 0
    assert not chip.long_mode
    assert write(chip, TO_CR0, PE | PG) is None
    assert chip.efer & LMA


def test_paging_off_with_pcide_is_refused() -> None:
    chip = Chip()
    chip.segments[CS] = replace(chip.segments[CS], l=0, db=1)
    chip.cr4 |= PCIDE
    chip.update_mode()
    assert write(chip, TO_CR0, PE | ET) == GP


@pytest.mark.parametrize(
    ("cr4", "code", "tr_type", "fault"),
    [
        (0, Segment(db=1, g=1, type=0xB), 0xB, GP),  # no PAE
        (PAE, Segment(l=1, g=1, type=0xB), 0xB, GP),  # CS.L
        (PAE, Segment(db=1, g=1, type=0xB), 3, GP),  # a 16-bit TSS
        (PAE, Segment(db=1, g=1, type=0xB), 0xB, None),
    ],
)
def test_activating_long_mode_checks_consistency(
    cr4: int, code: Segment, tr_type: int, fault: str | None
) -> None:
    chip = Chip(32)
    chip.put(TOP_TABLE, (TOP_TABLE + 0x1000 | 7).to_bytes(8, "little"))
    chip.put(TOP_TABLE + 0x1000, (0x87).to_bytes(8, "little"))
    chip.cr3, chip.cr4, chip.efer = TOP_TABLE, cr4, LME
    chip.segments[CS] = replace(code, limit=0xFFFFFFFF)
    chip.tr = replace(chip.tr, type=tr_type)
    chip.update_mode()
    assert write(chip, TO_CR0, PE | PG) == fault
    assert bool(chip.efer & LMA) == (fault is None)


def test_pae_loads_pdptes_when_paging_starts() -> None:
    chip = Chip(32)
    chip.cr3, chip.cr4 = 0x2000, PAE
    chip.put(0x2000, (0x3001).to_bytes(8, "little"))
    chip.put(0x3000, (0x83).to_bytes(8, "little"))
    assert write(chip, TO_CR0, PE | PG) is None
    assert chip.pdptrs == (0x3001, 0, 0, 0)


def test_reserved_bits_of_pdptes_raise_and_change_nothing() -> None:
    chip = Chip(32)
    chip.cr3, chip.cr4 = 0x2000, PAE
    chip.put(0x2000, (0x3003).to_bytes(8, "little"))  # bit 1 is reserved in a PDPTE
    assert write(chip, TO_CR0, PE | PG) == GP
    assert not chip.cr0 & PG
    assert chip.pdptrs == (0, 0, 0, 0)


def test_mov_cr_needs_cpl0_and_an_existing_register() -> None:
    assert Chip(64, 3).do(FROM_CR0) == GP
    assert Chip(64, 3).do("0f20c8") == UD  # CR1: told before the privilege (host)
    for code in ("0f20c8", "0f20e8", "0f22f0", "0f20f8", "440f20c8"):
        assert Chip().do(code) == UD


def test_lmsw_sets_but_does_not_clear_pe() -> None:
    chip = Chip(32)
    assert write(chip, "0f01f0", MP | TS) is None
    assert chip.cr0 & 0xF == PE | MP | TS
    assert write(chip, "0f01f0", 0xFFF0) is None
    assert chip.cr0 & 0x3F == PE | ET | NE
    real = Chip(16)
    assert write(real, "0f01f0", PE) is None
    assert real.cr0 & PE


def test_smsw_by_size_and_umip() -> None:
    chip = Chip(64, 3)
    chip.regs[RAX] = 0xFFFFFFFFFFFFFFFF
    assert chip.do("660f01e0") is None
    assert chip.regs[RAX] == 0xFFFFFFFFFFFF0033
    assert chip.do("0f01e0") is None
    assert chip.regs[RAX] == 0x80010033
    chip.cr4 |= UMIP
    assert chip.do("0f01e0") == GP
    chip.cr0 |= TS
    assert Chip().do("0f06") is None
    assert chip.do("0f06") == GP


# --- CR3, CR4, CR8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "pcide", "fault"),
    [
        (1 << 46, 0, GP),  # beyond MAXPHYADDR
        (1 << 63 | TOP_TABLE, 0, GP),
        (1 << 63 | TOP_TABLE, PCIDE, None),  # do not flush
        (TOP_TABLE | 0xFFF, PCIDE, None),
    ],
)
def test_cr3_reserved_bits(value: int, pcide: int, fault: str | None) -> None:
    chip = Chip()
    chip.cr4 |= pcide
    assert write(chip, TO_CR3, value) == fault
    assert chip.cr3 == (TOP_TABLE if fault else value & ~(1 << 63))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (VMXE, GP),
        (1 << 15, GP),
        (1 << 32, GP),
        (PAE, GP),  # off in long mode
        (LA57, GP),  # toggled in long mode
        (PCIDE, None),
        (PGE | SMEP | UMIP | FSGSBASE, None),
    ],
)
def test_cr4_in_long_mode(change: int, fault: str | None) -> None:
    chip = Chip()
    before = chip.cr4
    assert write(chip, TO_CR4, before ^ change) == fault
    assert chip.cr4 == (before if fault else before ^ change)


def test_pcide_needs_long_mode_and_pcid_zero() -> None:
    assert write(Chip(32), TO_CR4, PCIDE) == GP
    chip = Chip()
    chip.cr3 |= 1
    assert write(chip, TO_CR4, chip.cr4 | PCIDE) == GP


@pytest.mark.parametrize(
    ("bit", "where"),
    [
        (UMIP, (7, 0, "ecx", 2)),
        (SMEP, (7, 0, "ebx", 7)),
        (1 << 21, (7, 0, "ebx", 20)),
        (1 << 22, (7, 0, "ecx", 3)),
        (1 << 24, (7, 0, "ecx", 31)),
        (FSGSBASE, (7, 0, "ebx", 0)),
        (1 << 18, (1, 0, "ecx", 26)),
    ],
)
def test_cr4_bits_need_their_feature(bit: int, where: tuple[int, int, str, int]) -> None:
    with_feature = Chip()
    assert write(with_feature, TO_CR4, with_feature.cr4 | bit) is None
    chip = Chip(cpuid=without(where))  # type: ignore[arg-type]
    assert write(chip, TO_CR4, chip.cr4 | bit) == GP


def test_cr8_holds_four_bits() -> None:
    chip = Chip()
    assert write(chip, TO_CR8, 15) is None
    assert write(chip, TO_CR8, 16) == GP
    assert chip.do(FROM_CR8) is None
    assert chip.regs[RAX] == 15


def test_a_new_cr3_takes_effect_at_once() -> None:
    chip = Chip()
    chip.put(DATA, b"\x11")
    assert chip.do("8a0425" + DATA.to_bytes(4, "little").hex()) is None  # mov al, [DATA]
    chip.put(0x4000, (0x5007).to_bytes(8, "little"))
    chip.put(0x5000, (0x40000087).to_bytes(8, "little"))  # the second GiB: no memory
    assert write(chip, TO_CR3, 0x4000) is None
    with pytest.raises(NeedInput):
        chip.fetch()


# --- debug registers --------------------------------------------------------------------------------------


def test_debug_registers_keep_their_fixed_bits() -> None:
    chip = Chip()
    assert write(chip, "0f23f8", 0xFFFFDFFF) is None  # DR7, without GD
    assert chip.dr7 == 0xFFFF07FF
    assert write(chip, "0f23f0", 0xFFFFFFFF) is None  # DR6
    assert chip.dr6 == 0xFFFFEFFF
    assert write(chip, "0f23f0", 0) is None
    assert chip.dr6 == 0xFFFF0FF0
    for code in ("0f23f0", "0f23f8"):
        assert write(chip, code, 1 << 32) == GP
    assert write(chip, "0f23c0", 1 << 40) is None
    assert chip.dr[0] == 1 << 40


def test_dr4_is_dr6_unless_de() -> None:
    chip = Chip()
    assert chip.do("0f21e0") is None
    assert chip.regs[RAX] == chip.dr6
    chip.cr4 |= DE
    assert chip.do("0f21e0") == UD
    assert chip.do("440f21c0") == UD  # DR8


def test_general_detect_raises_before_the_access() -> None:
    chip = Chip()
    chip.dr7 |= 1 << 13
    assert chip.do("0f21c0") == "#DB"
    assert Chip(64, 3).do("0f21c0") == GP


# --- descriptor tables ------------------------------------------------------------------------------------


def test_lgdt_takes_ten_bytes_in_64_bit_mode() -> None:
    chip = Chip()
    chip.regs[RAX] = DATA
    chip.put(DATA, (0xFFFF800012345678 << 16 | 0xABCD).to_bytes(10, "little"))
    assert chip.do("0f0110") is None
    assert chip.gdt == DescriptorTable(0xFFFF800012345678, 0xABCD)
    assert chip.do("0f0100") is None  # and SGDT gives them back
    assert chip.at(DATA, 10) == 0xFFFF800012345678 << 16 | 0xABCD
    chip.put(DATA, (0x800012345678 << 16).to_bytes(10, "little"))
    assert chip.do("0f0118") == GP  # LIDT with a base that is not canonical


@pytest.mark.parametrize(("code", "base"), [("0f0110", 0x12345678), ("660f0110", 0x345678)])
def test_lgdt_uses_24_bits_of_base_with_a_16_bit_operand(code: str, base: int) -> None:
    chip = Chip(32)
    chip.regs[RAX] = DATA
    chip.put(DATA, (0x12345678 << 16 | 0x37).to_bytes(6, "little"))
    assert chip.do(code) is None
    assert chip.gdt == DescriptorTable(base, 0x37)


def test_sidt_clears_the_fourth_byte_with_a_16_bit_operand() -> None:
    chip = Chip(32)
    chip.regs[RAX] = DATA
    chip.idt = DescriptorTable(0x12345678, 0x3FF)
    assert chip.do("660f0108") is None
    assert chip.at(DATA, 6) == 0x345678 << 16 | 0x3FF


def test_descriptor_tables_and_privilege() -> None:
    chip = Chip(64, 3)
    chip.regs[RAX] = DATA
    assert chip.do("0f0110") == GP
    assert chip.do("0f0100") is None
    chip.cr4 |= UMIP
    assert chip.do("0f0100") == GP
    assert chip.do("0f0108") == GP


# --- translations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pcid", "address", "fault"),
    [
        (0, 0, 0x1000, None),
        (0, 0, 1 << 47, GP),  # not canonical
        (0, 1, 0, GP),  # a PCID without CR4.PCIDE
        (1, 1, 0, GP),
        (2, 1, 1 << 47, None),
        (3, 0, 0, None),
        (4, 0, 0, GP),
        (2, 1 << 12, 0, GP),  # reserved bits
    ],
)
def test_invpcid_checks_its_descriptor(kind: int, pcid: int, address: int, fault: str | None) -> None:
    chip = Chip()
    chip.regs[RAX], chip.regs[RCX] = DATA, kind
    chip.put(DATA, pcid.to_bytes(8, "little") + address.to_bytes(8, "little"))
    assert chip.do("660f388208") == fault


def test_cache_and_tlb_instructions_need_cpl0() -> None:
    for code in ("0f0138", "0f08", "0f09", "660f388208"):
        chip = Chip(64, 3)
        chip.regs[RAX] = DATA
        assert chip.do(code) == GP
        chip = Chip()
        chip.regs[RAX] = DATA
        assert chip.do(code) is None
