"""Who waits for whom before the first turn of a machine."""

from __future__ import annotations

import time

import pytest

from pykvm.model import schedule
from pykvm.model.schedule import Schedule


def test_without_gathering_nobody_waits_for_a_vcpu_that_never_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_HELD_SECONDS", 3600.0)
    alone = Schedule(0)
    alone.gathers = False
    alone.expect(0)
    alone.expect(1)
    assert alone.begin(0, lambda: False) > 0


def test_with_gathering_the_first_turn_is_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_HELD_SECONDS", 0.2)
    together = Schedule(0)
    together.expect(0)
    together.expect(1)
    begun = time.monotonic()
    assert together.begin(0, lambda: False) > 0
    assert time.monotonic() - begun >= 0.2, "it waited for the other one as long as it may"
