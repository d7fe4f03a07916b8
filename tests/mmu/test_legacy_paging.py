"""32-bit and PAE guests on shadow paging (docs/reference/hosts.md B.7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

from pykvm.errors import PykvmError
from pykvm.machine import Shutdown, Vcpu
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import DescriptorTable, Segment, SpecialRegisters
from tests.mmu_rig import (
    CODE,
    DATA,
    FRESH,
    PAGE,
    PAGES_64M,
    PD,
    PDPT,
    PML4,
    PVM,
    SPARE,
    TABLE,
    Host,
    Rig,
    hosts,
)
from tests.paged import with_everything

VA = DATA << 12
FIXED = {"pf_taken": 1, "pf_fixed": 1}
EMULATED = {"pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1}
FLUSH = {"remote_tlb_flush_requests": 1}
PT = 0x102
NATIVE = hosts("amd-shadow 6.1", "amd-shadow 6.12", "amd-shadow 7.2")
_PAE, _PSE, _FXSR = 1 << 5, 1 << 4, 0x600


class Legacy(Rig):
    """A guest in 32-bit code at CPL 3: ``PD`` at 101 and page tables from 102 on, of 4-byte entries (64 MiB
    are 16 of them, 2000 is in 10a), or with PAE those of long mode below a PDPT at 100."""

    pae = False

    def _fill(self, upper: int, leaf: int, code: int, entries: Mapping[tuple[int, int], int]) -> None:
        if self.pae:
            super()._fill(upper, leaf, code, entries)
            self.put(PDPT, 0, PD << 12 | 1)
            return
        leaves = np.arange(PAGES_64M, dtype=np.uint32) << np.uint32(12) | np.uint32(leaf)
        leaves[CODE] = CODE << 12 | code
        self.memory.write(PT << 12, leaves.tobytes())
        for index in range(PAGES_64M // 1024):
            self.put4(PD, index, PT + index << 12 | upper)
        for (gfn, index), value in entries.items():
            self.put4(gfn, index, value)

    def put4(self, gfn: int, index: int, value: int) -> None:
        self.memory.write((gfn << 12) + index * 4, value.to_bytes(4, "little"))

    def enter(self, vcpu: Vcpu, **changes: int) -> None:
        special: SpecialRegisters = vcpu.get_special_registers()
        self._segments(special)
        special.tr = Segment(3 << 12, 0x67, 0x40, 0xB, 1, 0, 0, 0, 0, 0)
        special.gdt = special.idt = DescriptorTable(0, 0)
        special.cr0, special.efer = 0x80010033, 0
        special.cr3, special.cr4 = (PDPT << 12, _PAE | _FXSR) if self.pae else (PD << 12, _PSE | _FXSR)
        for name, value in changes.items():
            setattr(special, name, value)
        vcpu.set_special_registers(special)

    def _segments(self, special: SpecialRegisters) -> None:
        special.cs = Segment(0, 0xFFFFFFFF, 0x33, 0xB, 1, 3, 1, 1, 0, 1)
        data = Segment(0, 0xFFFFFFFF, 0x2B, 3, 1, 3, 1, 1, 0, 1)
        special.ds = special.es = special.fs = special.gs = special.ss = data


class FiveLevel(Rig):
    """Long mode with a PML5 at 1f0 above the PML4."""

    pml5 = 0x1F0

    def _fill(self, upper: int, leaf: int, code: int, entries: Mapping[tuple[int, int], int]) -> None:
        super()._fill(upper, leaf, code, entries)
        self.put(self.pml5, 0, PML4 << 12 | upper)

    def _cpuid(self) -> Sequence[CpuidEntry]:
        return with_everything(self.machine.supported_cpuid) if not self.host.kvm else super()._cpuid()

    def enter(self, vcpu: Vcpu, **changes: int) -> None:
        super().enter(vcpu, **({"cr3": self.pml5 << 12, "cr4": 0x1620} | changes))


class Pae(Legacy):
    pae = True


@pytest.fixture
def pg32(native: Host) -> Iterator[Legacy]:
    """Entries of pages whose D is clear, so that reads do not dirty."""
    with Legacy(native, leaf=TABLE) as rig:
        yield rig


def read(rig: Rig, address: int) -> dict[str, int]:
    return rig.load(address, 4).moved


@NATIVE
def test_the_directory_is_four_quadrants(pg32: Legacy) -> None:
    """B.7: mmu_cache_miss 6 for code and data: 4 of the root and 2 page tables."""
    moved = pg32.store(VA, 1, 4).moved
    assert moved["mmu_cache_miss"] == 6
    assert moved["pf_taken"] == moved["pf_fixed"] == 2


@NATIVE
def test_a_page_table_has_two_shadow_pages(pg32: Legacy) -> None:
    """B.7: one for each 2 MiB half."""
    read(pg32, VA)
    assert read(pg32, VA + (2 << 20))["mmu_cache_miss"] == 1
    assert "mmu_cache_miss" not in read(pg32, VA + (2 << 20) + 0x8000)


@NATIVE
def test_other_quadrants_reuse_the_page_table(native: Host) -> None:
    """B.7: PD[i] and PD[i + 100h] to one page table: pf_spurious +1."""
    entries = {(PD, 8 + 0x100 * quadrant): PT + 8 << 12 | TABLE for quadrant in range(1, 4)}
    with Legacy(native, leaf=TABLE, entries=entries) as rig:
        read(rig, VA)
        for quadrant in range(1, 4):
            assert read(rig, (quadrant << 30) + VA) == {"pf_taken": 1, "pf_spurious": 1}


@NATIVE
@pytest.mark.parametrize("index", [5, 0x205], ids=["lower half", "upper half"])
def test_a_write_to_the_page_table_unsyncs_both(native: Host, index: int) -> None:
    """B.7: in either half: mmu_unsync +2."""
    with Legacy(native, leaf=PAGE) as rig:
        rig.prime()
        read(rig, VA)
        read(rig, VA + (2 << 20))
        assert rig.store((PT + 8 << 12) + index * 4, 0, 4).moved["mmu_unsync"] == 2


@NATIVE
def test_a_write_to_the_directory_hits_two_entries(pg32: Legacy) -> None:
    """B.7: mmu_pde_zapped +2."""
    read(pg32, VA)
    read(pg32, PD << 12)
    seen = pg32.store((PD << 12) + 0x1F0 * 4, SPARE << 12 | TABLE, 4)
    assert seen.moved == EMULATED | {"mmu_pde_zapped": 2}


@NATIVE
def test_pae(native: Host) -> None:
    """B.7: 3 misses for the first store; the PDPT is never dirty, its entries have no A."""
    with Pae(native, upper=FRESH, leaf=FRESH, code=FRESH, ring=4096) as rig:
        seen = rig.store(VA, 1, 4)
        assert seen.moved["mmu_cache_miss"] == 3
        assert seen.pushed == [PD, PT, PD, 0x112, DATA]


@hosts(PVM)
@pytest.mark.parametrize("kind", [Legacy, Pae], ids=["32-bit", "PAE"])
def test_a_pvm_guest_has_no_paging_but_long_mode(host: Host, kind: type[Legacy]) -> None:
    """B.7: SET_SREGS succeeds, KVM_RUN ends in SHUTDOWN."""
    if not host.profile.emulates_all_but_user:
        pytest.skip("Only kvm_pvm refuses such guests.")
    with kind(host) as rig:
        rig.vcpu.set_registers(rig.vcpu.get_registers())
        assert isinstance(rig.resume().exit, Shutdown)


@NATIVE
def test_five_levels(native: Host) -> None:
    """C.1: LA57 adds one level to what a first store takes: root to page table, and another page table."""
    try:
        rig = FiveLevel(native, upper=FRESH, leaf=FRESH, code=FRESH, ring=4096)
    except PykvmError:
        pytest.skip("The guest has no 57-bit linear addresses (CPUID 7, ECX bit 16).")
    with rig:
        seen = rig.store(VA)
        assert seen.moved["mmu_cache_miss"] == 6
        assert seen.pushed == [rig.pml5, PML4, PDPT, PD, PT, PD, 0x112, DATA]


@hosts()
def test_a_pvm_guest_has_no_five_levels(host: Host) -> None:
    """C.1: SET_SREGS with CR4.LA57 is refused."""
    if not host.profile.emulates_all_but_user:
        pytest.skip("Only kvm_pvm has no 57-bit linear addresses for its guests.")
    with Rig(host) as rig, pytest.raises(PykvmError):
        rig.enter(rig.vcpu, cr4=0x1620)
