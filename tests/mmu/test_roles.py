"""What makes other shadow pages, and what finds the old ones again (docs/reference/hosts.md B.8, Roles)."""

from __future__ import annotations

import pytest

from pykvm.errors import PykvmError
from pykvm.machine import Shutdown
from tests.mmu_rig import DATA, FRESH, PDPT, PML4, SHADOW, SPARE, TABLE, Host, Rig, hosts

pytestmark = hosts(*SHADOW)
VA = DATA << 12
CR0, CR4, EFER = 0x80010033, 0x620, 0xD00
WP, PGE, SMEP, NXE = 1 << 16, 1 << 7, 1 << 20, 1 << 11


def access(rig: Rig) -> dict[str, int]:
    """The code, and a read of the data page."""
    return rig.load(VA).moved


def test_toggling_wp_makes_a_second_set(shadow: Host) -> None:
    """B.8: a complete one; back again, none."""
    with Rig(shadow, leaf=TABLE) as rig:
        rig.prime(DATA)
        rig.enter(rig.vcpu, cr0=CR0 & ~WP)
        # Root, PDPT, PD, the code's page table and the data's; +6 in hosts.md with one more table in use.
        assert access(rig)["mmu_cache_miss"] == 5
        rig.enter(rig.vcpu, cr0=CR0)
        assert "mmu_cache_miss" not in access(rig)


@pytest.mark.parametrize(
    ("register", "value"), [("efer", EFER & ~NXE), ("cr4", CR4 | PGE)], ids=["EFER.NX", "CR4.PGE"]
)
def test_registers_that_are_not_part_of_the_role(shadow: Host, register: str, value: int) -> None:
    """B.8: EFER.NX and CR4.PGE change no roles in shadow mode."""
    with Rig(shadow, leaf=TABLE) as rig:
        rig.prime(DATA)
        rig.enter(rig.vcpu, **{register: value})
        assert "mmu_cache_miss" not in access(rig)


def test_smep(shadow: Host) -> None:
    """B.8: new roles only where role.cr4_smep exists [7.2]."""
    with Rig(shadow, leaf=TABLE) as rig:
        rig.prime(DATA)
        try:
            rig.enter(rig.vcpu, cr4=CR4 | SMEP)
        except PykvmError:
            pytest.skip("This KVM's guests have no SMEP.")
        assert access(rig).get("mmu_cache_miss", 0) == (5 if shadow.profile.smep_in_role else 0)


def test_switching_between_roots_that_share_their_tables(shadow: Host) -> None:
    """B.8: +1 miss the first time, then 0; the state of the A bits is kept."""
    with Rig(shadow, leaf=FRESH, upper=FRESH, entries={(SPARE, 0): PDPT << 12 | TABLE}) as rig:
        rig.load(VA)
        rig.collect()
        rig.enter(rig.vcpu, cr3=SPARE << 12)
        assert access(rig)["mmu_cache_miss"] == 1
        assert rig.dirty() == []
        for cr3 in (PML4, SPARE, PML4):
            rig.enter(rig.vcpu, cr3=cr3 << 12)
            assert "mmu_cache_miss" not in access(rig)
            assert rig.dirty() == []


def test_the_root_of_another_address_space_stays_tracked(shadow: Host) -> None:
    """B.8: as long as its shadow page exists."""
    with Rig(shadow, leaf=TABLE, entries={(SPARE, 0): PDPT << 12 | TABLE}) as rig:
        rig.prime()
        rig.enter(rig.vcpu, cr3=SPARE << 12)
        rig.run(b"")
        rig.enter(rig.vcpu, cr3=PML4 << 12)
        rig.run(b"")
        seen = rig.write_entry(SPARE, 7, 0)
        # A of its neighbours is set, D is not: they come along, read-only.
        assert seen.moved == {"pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1, "pages_4k": 8}


def test_smap_shuts_a_pvm_guest_down(shadow: Host) -> None:
    """B.8: SET_SREGS with CR4.SMAP is accepted by kvm_pvm, and KVM_RUN ends in SHUTDOWN."""
    if not shadow.profile.emulates_all_but_user:
        pytest.skip("Only kvm_pvm takes CR4.SMAP that its guests' CPUID lacks.")
    with Rig(shadow) as rig:
        rig.prime()
        rig.enter(rig.vcpu, cr4=CR4 | 1 << 21)
        assert isinstance(rig.resume().exit, Shutdown)
