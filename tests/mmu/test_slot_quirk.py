"""Slots that go without all mappings: the quirk SLOT_ZAP_ALL off (docs/reference/kvm-mmu.md 2)."""

from __future__ import annotations

from typing import Any

import pytest

from pykvm.kvm.capabilities import Capability
from pykvm.kvm.tuning import Quirk
from pykvm.memory import PAGE_SIZE, GuestMemory
from tests.mmu_rig import DATA, PAGE, PD, SHADOW, TABLE, Host, Rig, hosts

AT = 0x8000
"""The first gfn of the other slot, at linear addresses that no table maps yet."""


def _off(machine: Any) -> None:
    machine.disable_quirks(Quirk.SLOT_ZAP_ALL)


@hosts(*SHADOW)
@pytest.mark.parametrize("holds_table", [False, True])
@pytest.mark.parametrize("quirk", [True, False])
def test_a_deleted_slot(shadow: Host, quirk: bool, holds_table: bool) -> None:
    """Its leaves go, and the shadow pages of its tables; with the quirk, everything does."""
    system: Any = shadow.system
    if shadow.kvm and not system.check_extension(Capability.DISABLE_QUIRKS2) & Quirk.SLOT_ZAP_ALL:
        pytest.skip("Before 6.12 there is no such quirk.")
    memory = GuestMemory(4 * PAGE_SIZE)
    memory.write(8, (AT + 1 << 12 | PAGE).to_bytes(8, "little"))
    entries = {(PD, AT >> 9): AT << 12 | TABLE}
    with Rig(shadow, prepare=None if quirk else _off, entries=entries) as rig:
        slot = rig.machine.create_slot(memory, AT << 12)
        rig.store(DATA << 12)
        if holds_table:
            rig.store(AT + 1 << 12)
        before = rig.counters()
        slot.delete()
        after = rig.counters()
        moved = {name: after[name] - before[name] for name in ("mmu_shadow_zapped", "pages_4k")}
        if quirk:
            assert after["pages_4k"] == 0
            assert moved["mmu_shadow_zapped"] > 3
        else:
            assert moved == {"mmu_shadow_zapped": int(holds_table), "pages_4k": -int(holds_table)}
            again = rig.store(DATA << 12).moved
            assert "pf_taken" not in again, "the mappings of the other slot are still there"
    memory.close()
