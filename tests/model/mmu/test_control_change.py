"""What changes of control registers do to roots and TLB requests (docs/reference/kvm-mmu.md 13.5, 10.1)."""

from __future__ import annotations

from typing import Any

import pytest

from pykvm.model.mmu.vcpu import ControlChange, VcpuMmu
from pykvm.model.paging import Control
from pykvm.x86.bits import Cr4, Efer
from tests.model.mmu.shadow_guest import LONG, PAE, PAGE, ShadowGuest
from tests.model.mmu.tdp_rig import LONG_MODE, TdpRig

ROOT, PDPT, PD, PT = 0x10, 0x11, 0x12, 0x13
SCE = int(Efer.SCE)
PCIDE = int(Cr4.PCIDE)
KEEP = ControlChange.MOV_CR3_NO_FLUSH


def guest(control: Control = LONG) -> tuple[ShadowGuest, VcpuMmu]:
    made = ShadowGuest()
    made.map_long(ROOT, (PDPT, PD, PT), 0, 256, PAGE)
    made.map_long(0x20, (PDPT, PD, PT), 0, 256, PAGE)
    vcpu = made.vcpu(control, ROOT)
    made.enter(vcpu)
    return made, vcpu


def change(vcpu: VcpuMmu, how: ControlChange = ControlChange.OTHER, **registers: Any) -> None:
    vcpu.set_control(vcpu.control._replace(**registers), how)


def test_only_efer_bits_of_the_role_reset_the_context() -> None:
    """10.1: EFER.LME, LMA and NX; SCE is none of the MMU's business."""
    made, vcpu = guest()
    made.load(vcpu, 0x50000)
    change(vcpu, efer=vcpu.control.efer | SCE)
    assert vcpu.roots.current is not None
    assert made.enter(vcpu).moved == {}
    change(vcpu, efer=vcpu.control.efer & ~int(Efer.NXE))
    assert vcpu.roots.current is None


@pytest.mark.parametrize(("control", "flushes"), [(LONG, 0), (PAE, 1)], ids=["long", "PAE"])
def test_setting_the_same_registers_reads_pdptes_again(control: Control, flushes: int) -> None:
    """KVM_SET_SREGS of a PAE guest loads the PDPTEs, and resets the context for it."""
    made = ShadowGuest()
    made.entry(0x10, 0, 0x11 << 12 | 1)
    vcpu = made.vcpu(control._replace(pdptrs=(0x11001, 0, 0, 0)), ROOT)
    made.enter(vcpu)
    change(vcpu, ControlChange.HOST)
    assert made.enter(vcpu).moved.get("tlb_flush", 0) == flushes


def with_pcids() -> tuple[ShadowGuest, VcpuMmu]:
    """A guest that runs on PCID 1 and has a cached root of PCID 0."""
    made, vcpu = guest(LONG._replace(cr4=LONG.cr4 | PCIDE))
    change(vcpu, KEEP, cr3=ROOT << 12 | 1)
    made.enter(vcpu)
    return made, vcpu


def cached(vcpu: VcpuMmu) -> list[int]:
    return [root.pgd for root in vcpu.roots.previous if root is not None]


@pytest.mark.parametrize(
    ("how", "pcid", "kept"),
    [(ControlChange.MOV_CR3, 1, False), (ControlChange.MOV_CR3, 2, True), (KEEP, 1, True)],
    ids=str,
)
def test_a_flush_of_a_pcid_drops_its_cached_roots(how: ControlChange, pcid: int, kept: bool) -> None:
    """With PCIDE, a MOV to CR3 without bit 63 drops the previous roots of the PCID that it loads."""
    _made, vcpu = with_pcids()
    change(vcpu, how, cr3=0x20 << 12 | pcid)
    assert (ROOT << 12 | 1 in cached(vcpu)) == kept
    assert ROOT << 12 in cached(vcpu), "PCID 0 is another"
    assert vcpu.requests.sync == (how is ControlChange.MOV_CR3)


@pytest.mark.parametrize(
    ("kind", "pcid", "moved"),
    [
        (0, 1, {"invlpg": 1, "pages_4k": -1}),
        (1, 1, {"mmu_unsync": -1}),
        (1, 0, {}),
        (2, 0, {"mmu_unsync": -1}),
        (3, 0, {"mmu_unsync": -1}),
    ],
    ids=str,
)
def test_invpcid(kind: int, pcid: int, moved: dict[str, int]) -> None:
    """13.5: one address counts as invlpg and syncs its SPTE; a PCID or all synchronise at the next entry."""
    made, vcpu = with_pcids()
    made.store(vcpu, 0x50000)
    made.store(vcpu, PT << 12)
    made.entry(PT, 0x50, 0)
    made.enter(vcpu)
    vcpu.invpcid(kind, pcid, 0x50000)
    now, later = made.did().moved, made.enter(vcpu).moved
    assert now.get("invlpg", 0) == moved.get("invlpg", 0)
    assert now.get("pages_4k", 0) == moved.get("pages_4k", 0)
    assert later.get("mmu_unsync", 0) == moved.get("mmu_unsync", 0)
    assert bool(later.get("tlb_flush")) == bool(moved)  # a flush that KVM asked of all vCPUs included


def test_a_flush_without_pcids_keeps_the_cached_roots() -> None:
    _made, vcpu = guest()
    change(vcpu, ControlChange.MOV_CR3, cr3=0x20 << 12)
    assert cached(vcpu) == [ROOT << 12]


def test_the_same_cr3_keeps_pae_roots() -> None:
    """A PAE guest's MOV of the same CR3 loads the PDPTEs; the roots go only if one of them changed."""
    made = ShadowGuest()
    vcpu = made.vcpu(PAE._replace(pdptrs=(0x11001, 0, 0, 0)), ROOT)
    made.enter(vcpu)
    change(vcpu, ControlChange.MOV_CR3)
    assert vcpu.roots.current is not None
    change(vcpu, ControlChange.MOV_CR3, pdptrs=(0x12001, 0, 0, 0))
    assert vcpu.roots.current is None


@pytest.mark.parametrize(
    ("name", "bit", "flushes"),
    [
        ("amd-npt 6.12", Cr4.PGE, 1),
        ("amd-npt 6.12", Cr4.SMEP, 1),
        ("amd-npt 6.12", Cr4.SMAP, 0),
        ("intel-ept 6.12", Cr4.PGE, 0),
        ("intel-ept 6.12", Cr4.SMEP, 1),
    ],
    ids=str,
)
def test_what_cr4_flushes_under_nested_paging(name: str, bit: Cr4, flushes: int) -> None:
    """CR4.PGE is the guest's own with EPT (no exit); SMEP 0 to 1 flushes the current PCID everywhere."""
    rig = TdpRig(name)
    before = rig.vcpu.counters.tlb_flush
    rig.vcpu.set_control(LONG_MODE._replace(cr4=LONG_MODE.cr4 | int(bit)), ControlChange.OTHER)
    rig.vcpu.enter()
    assert rig.vcpu.counters.tlb_flush - before == flushes


def test_invpcid_of_another_pcid_leaves_the_current_tables() -> None:
    made, vcpu = with_pcids()
    made.store(vcpu, 0x50000)
    made.store(vcpu, PT << 12)
    made.entry(PT, 0x50, 0)
    vcpu.invpcid(0, 2, 0x50000)
    assert made.did().moved == {"invlpg": 1}
