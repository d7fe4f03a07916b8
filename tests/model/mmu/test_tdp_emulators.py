"""How emulators deviate from the processor they stand for, where their page walks show it (labs.md)."""

from __future__ import annotations

import pytest

from pykvm.model.mmu.outcomes import GuestPageFault
from pykvm.model.paging import Control
from pykvm.profiles import Execution
from tests.model.mmu.tdp_rig import DATA, DATA_PT, LONG_MODE, PD, PML4, PRESET, READ, TdpRig, faults


@pytest.mark.parametrize(("execution", "error"), [(Execution.HARDWARE, 0xD), (Execution.TCG, 0xC)])
def test_qemu_reports_a_reserved_bit_as_if_nothing_were_present(execution: Execution, error: int) -> None:
    rig = TdpRig("amd-npt 6.12", leaf=PRESET, execution=execution)
    rig.put(DATA_PT, 0, 1 << 51 | DATA << 12 | PRESET)
    rig.vcpu.enter()
    with pytest.raises(GuestPageFault) as fault:
        rig.vcpu.translate(DATA << 12, READ)
    assert fault.value.error == error


def test_qemu_does_not_reserve_bit_8_of_a_pml4e() -> None:
    control = LONG_MODE._replace(amd=True)
    rig = TdpRig("amd-npt 6.12", leaf=PRESET, control=control, execution=Execution.TCG)
    rig.put(PML4, 0, rig.entry(PML4, 0) | 0x100)
    assert rig.load(DATA) == faults(7, pages_4k=7)
    rig = TdpRig("amd-npt 6.12", leaf=PRESET, control=control)
    rig.put(PML4, 0, rig.entry(PML4, 0) | 0x100)
    rig.vcpu.enter()
    with pytest.raises(GuestPageFault) as fault:
        rig.vcpu.translate(DATA << 12, READ)
    assert fault.value.error == 0xD


@pytest.mark.parametrize(("execution", "flags"), [(Execution.HARDWARE, 0x01), (Execution.TCG, 0x21)])
def test_qemu_sets_an_a_flag_in_a_pdpte(execution: Execution, flags: int) -> None:
    rig = TdpRig("amd-npt 6.12", control=Control(0x80010033, 0x180 << 12, 0x620, 0), execution=execution)
    rig.put(0x180, 0, PD << 12 | 1)
    rig.store(0x300)
    assert rig.entry(0x180, 0) & 0xFFF == flags


@pytest.mark.parametrize(
    ("execution", "cost", "reported"),
    [
        (Execution.HARDWARE, faults(2, pf_fast=1, pages_4k=1), [DATA_PT, DATA + 7]),
        (Execution.BOCHS, faults(1, pages_4k=1), [DATA + 7]),
    ],
)
def test_bochs_sets_guest_flags_past_ept_without_a_and_d(
    execution: Execution, cost: dict[str, int], reported: list[int]
) -> None:
    rig = TdpRig("intel-ept-noad 6.12", execution=execution)
    rig.store(DATA)
    rig.harvest()
    assert rig.load(DATA + 7) == cost
    assert rig.pushed() == reported
    assert rig.entry(DATA_PT, 7) & 0x20
