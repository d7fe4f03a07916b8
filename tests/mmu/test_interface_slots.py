"""The tests of tests/model/test_machine_slots.py on the MMU of known hosts (docs/reference/hosts.md D)."""

from __future__ import annotations

from tests.mmu.profiled import borrow_profiled

borrow_profiled(globals(), "tests.model.test_machine_slots")
