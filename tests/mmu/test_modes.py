"""What the MMU does for guests that are not long mode at CPL 3 (docs/reference/hosts.md C.1)."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pykvm.machine import Vcpu
from pykvm.x86.registers import DescriptorTable, Segment, SpecialRegisters
from tests.mmu_rig import (
    CODE,
    DATA,
    DATA_PT,
    FRESH,
    PAGE,
    PD,
    PDPT,
    PML4,
    PT,
    SHADOW,
    STORE,
    TSS,
    Host,
    Rig,
    hosts,
)

pytestmark = hosts(*SHADOW)
VA = DATA << 12
LOW = 9
"""A page that 16-bit code reaches."""


class Unpaged(Rig):
    """A guest without paging: in real mode, or in 32-bit protected mode at CPL 0."""

    protected = False

    def _fill(self, upper: int, leaf: int, code: int, entries: Mapping[tuple[int, int], int]) -> None:
        """No tables."""

    def enter(self, vcpu: Vcpu, **changes: int) -> None:
        special: SpecialRegisters = vcpu.get_special_registers()
        self._segments(special)
        special.tr = Segment(TSS << 12, 0x67, 0x40, 0xB, 1, 0, 0, 0, 0, 0)
        special.gdt = special.idt = DescriptorTable(0, 0)
        special.cr0, special.cr3, special.cr4, special.efer = 0x10 | self.protected, 0, 0, 0
        for name, value in changes.items():
            setattr(special, name, value)
        vcpu.set_special_registers(special)

    def _segments(self, special: SpecialRegisters) -> None:
        wide = int(self.protected)
        limit = 0xFFFFFFFF if wide else 0xFFFF
        special.cs = Segment(0, limit, 8 * wide, 0xB, 1, 0, wide, 1, 0, wide)
        data = Segment(0, limit, 16 * wide, 3, 1, 0, wide, 1, 0, wide)
        special.ds = special.es = special.fs = special.gs = special.ss = data

    def put_low(self) -> dict[str, int]:
        """mov [bx], al or mov [edi], al, to page 9."""
        if self.protected:
            return self.run(STORE[1], rdi=LOW << 12, rsp=0x8000).moved
        return self.run(b"\x88\x07", rbx=LOW << 12, rsp=0x8000).moved


class Protected(Unpaged):
    protected = True


@pytest.mark.parametrize("kind", [Unpaged, Protected], ids=["real mode", "protected mode"])
def test_unpaged(shadow: Host, kind: type[Unpaged]) -> None:
    """C.1: emulated: 4 shadow pages of the root, no SPTEs, dirty is the data only; native: a direct MMU, the
    code page is dirty on fetch, and pf_fast after logging."""
    with kind(shadow, pages=0x200) as rig:
        moved = rig.put_low()
        if shadow.profile.emulates_all_but_user:
            assert moved == {"mmu_cache_miss": 4}
            assert rig.dirty() == [LOW]
            assert rig.put_low() == {}
            return
        assert moved["mmu_cache_miss"] >= 4
        assert rig.dirty() == [CODE, LOW]
        assert rig.put_low() == {"pf_taken": 1, "pf_fixed": 1, "pf_fast": 1}
        assert rig.dirty() == [LOW]


def test_long_mode_at_cpl_0(shadow: Host) -> None:
    """C.1: emulated: mmu_cache_miss +1, the root only, and mmu_pte_write +1 for each store; A and D are set
    exactly like hardware, and the ring has 2 100 101 102 101 112 2000 either way."""
    with Rig(shadow, upper=FRESH, leaf=FRESH, code=FRESH, ring=4096, cpl=0) as rig:
        seen = rig.store(VA)
        assert seen.pushed == [PML4, PDPT, PD, PT, PD, DATA_PT, DATA]
        assert rig.leaf(DATA) == PAGE
        again = rig.store(VA + 0x1000)
        assert again.pushed == [DATA_PT, DATA + 1]
        if shadow.profile.emulates_all_but_user:
            assert seen.moved == {"mmu_cache_miss": 1, "mmu_pte_write": 1}
            assert again.moved == {"mmu_pte_write": 1}
        else:
            assert seen.moved == {"mmu_cache_miss": 5, "pages_4k": 2, "pf_taken": 2, "pf_fixed": 2}


def test_a_read_at_cpl_0_dirties_nothing_where_it_is_emulated(shadow: Host) -> None:
    """B.0: unlike at CPL 3, where D of the entry is set."""
    with Rig(shadow, cpl=0) as rig:
        rig.load(VA)
        assert rig.dirty() == ([] if shadow.profile.emulates_all_but_user else [DATA])


class Compatibility(Rig):
    """32-bit code at CPL 3 in long mode."""

    def _segments(self, special: SpecialRegisters) -> None:
        super()._segments(special)
        special.cs = Segment(0, 0xFFFFFFFF, 0x33, 0xB, 1, 3, 1, 1, 0, 1)


def test_compatibility_mode(shadow: Host) -> None:
    """C.1: emulated or native; what is dirty is the same."""
    with Compatibility(shadow, upper=FRESH, leaf=FRESH, code=FRESH) as rig:
        seen = rig.run(STORE[4], rdi=VA, rax=0x42)
        assert rig.value(DATA) == 0x42
        assert rig.dirty() == [PML4, PDPT, PD, PT, DATA_PT, DATA]
        assert ("pf_taken" in seen.moved) == (not shadow.profile.emulates_all_but_user)


def test_a_pvm_guest_cannot_use_pml4_entry_256(shadow: Host) -> None:
    """C.1: at CPL 3 #PF straight to the guest, without pf_taken; at CPL 0 it can be read."""
    if not shadow.profile.emulates_all_but_user:
        pytest.skip("Only kvm_pvm keeps that part of the address space to itself.")
    address = 0xFFFF << 48 | 256 << 39
    for index, usable in ((255, True), (256, False), (257, True), (511, True)):
        with Rig(shadow, entries={(PML4, index): PDPT << 12 | 0x27}) as rig:
            rig.prime()
            there = (0xFFFF << 48 if index >= 256 else 0) | index << 39 | VA
            seen = rig.load(there)
            if usable:
                assert seen.fault is None
                continue
            assert there == address | VA
            assert seen.fault is not None
            assert seen.fault[0] == 14
            assert "pf_taken" not in seen.moved
            assert rig.at_cpl0(b"\x48\x8b\x07", rdi=there).fault is None
