"""CPUID: the model's own leaves, and how KVM answers from configured ones."""

from __future__ import annotations

from dataclasses import replace

from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.cpu.fpu_state import XSAVE_BYTES
from pykvm.x86.cpuid import CpuidEntry, find, has_1g_pages, has_la57, physical_address_bits
from tests.model.chip import Chip

RAX, RBX, RCX, RDX = 0, 3, 1, 2
OSXSAVE, PKE = 1 << 18, 1 << 22


def ask(chip: Chip, function: int, index: int = 0) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX."""
    chip.regs[RAX], chip.regs[RCX] = function, index
    chip.regs[RBX] = chip.regs[RDX] = 2**64 - 1
    assert chip.do("0fa2") is None
    return chip.regs[RAX], chip.regs[RBX], chip.regs[RCX], chip.regs[RDX]


def test_vendor_and_ranges() -> None:
    eax, ebx, ecx, edx = ask(Chip(), 0)
    assert b"".join(each.to_bytes(4, "little") for each in (ebx, edx, ecx)) == b"GenuineIntel"
    assert eax == 0xD
    assert ask(Chip(), 0x80000000)[0] == 0x80000008


def test_addresses_and_pages() -> None:
    entries = supported_cpuid()
    assert physical_address_bits(entries) == 46
    assert has_la57(entries)
    assert has_1g_pages(entries)
    assert ask(Chip(), 0x80000008)[0] == 46 | 57 << 8


def test_what_is_not_there_is_not_offered() -> None:
    _, _, ecx, edx = ask(Chip(), 1)
    for bit in (3, 5, 12, 25, 28, 29, 30, 31):  # MONITOR VMX FMA AES AVX F16C RDRAND hypervisor
        assert not ecx >> bit & 1
    for bit in (1, 21, 22, 28):  # VME DS ACPI HTT
        assert not edx >> bit & 1
    _, ebx, ecx, edx = ask(Chip(), 7)
    for bit in (5, 16, 18, 29):  # AVX2 AVX512F RDSEED SHA
        assert not ebx >> bit & 1


def test_bits_that_follow_control_registers() -> None:
    chip = Chip()
    assert not ask(chip, 1)[2] >> 27 & 1
    assert not ask(chip, 7)[2] >> 4 & 1
    chip.cr4 |= OSXSAVE | PKE
    assert ask(chip, 1)[2] >> 27 & 1
    assert ask(chip, 7)[2] >> 4 & 1
    assert ask(chip, 1)[3] >> 9 & 1
    chip.apic_base &= ~0x800
    assert not ask(chip, 1)[3] >> 9 & 1


def test_sizes_of_the_xsave_area_follow_xcr0() -> None:
    chip = Chip()
    assert ask(chip, 0xD) == (0x203, 576, 2696, 0)
    assert ask(chip, 0xD, 9) == (8, 2688, 0, 0)
    chip.xcr0 = 0x203
    assert ask(chip, 0xD)[1] == 2696 <= XSAVE_BYTES
    assert ask(chip, 0xD, 1)[1] == 584


def test_leaves_out_of_range_answer_by_vendor() -> None:
    intel = Chip()
    assert ask(intel, 0x12345, 9) == ask(intel, 0xD, 9)
    assert ask(intel, 0x80001000) == ask(intel, 0xD)
    assert ask(intel, 0x40000000) == ask(intel, 0xD)
    assert ask(intel, 5) == (0, 0, 0, 0)
    amd = tuple(
        replace(e, ebx=0x68747541, edx=0x69746E65, ecx=0x444D4163) if e.function == 0 else e
        for e in supported_cpuid()
    )
    chip = Chip(cpuid=amd)
    assert chip.features.amd
    assert ask(chip, 0x12345, 9) == (0, 0, 0, 0)


def test_topology_beyond_its_last_level() -> None:
    entries = [*supported_cpuid()]
    entries = [replace(e, edx=5) if e.function == 0xB else e for e in entries]
    assert ask(Chip(cpuid=entries), 0xB, 0x304) == (0, 0, 4, 5)


def test_no_leaves_at_all() -> None:
    assert ask(Chip(32, cpuid=()), 1) == (0, 0, 0, 0)


def test_significant_index() -> None:
    entries = (CpuidEntry(0, 0, 0, 7, 0, 0, 0), CpuidEntry(7, 1, 1, 1, 2, 3, 4))
    assert find(entries, 7, 0) is None
    assert ask(Chip(32, cpuid=entries), 7, 1) == (1, 2, 3, 4)
    assert ask(Chip(32, cpuid=entries), 7, 0) == (0, 0, 0, 0)
