"""What a machine can do is found out by trying, and remembered."""

from __future__ import annotations

import numpy as np
import pytest

from pykvm.crosscheck.abilities import can_single_step, marks_reads
from pykvm.machine import Machine, System
from pykvm.model.system import ModelSystem
from tests.crosscheck.samples import MODES


class Marking:
    """The model as a host with two-dimensional paging would log: every page of a slot."""

    backend = "marking"
    description = "a machine that marks what it reads"

    def __init__(self, model: System) -> None:
        self._model = model
        self.made = 0

    def create_machine(self) -> Machine:
        self.made += 1
        machine = self._model.create_machine()
        machine.get_dirty_log = lambda slot: np.arange(slot.size // 4096, dtype=np.uint64)  # type: ignore[method-assign]
        return machine


class Deaf(Marking):
    """The model without single step."""

    def create_machine(self) -> Machine:
        machine = super().create_machine()
        create = machine.create_vcpu

        def create_vcpu() -> object:
            vcpu = create()
            vcpu.set_guest_debug = lambda *, single_step=False: None  # type: ignore[attr-defined]
            return vcpu

        machine.create_vcpu = create_vcpu  # type: ignore[method-assign,assignment]
        return machine


@pytest.mark.parametrize(("mode", "cpl"), MODES)
def test_the_model_steps_everywhere_and_marks_only_writes(model: ModelSystem, mode: str, cpl: int) -> None:
    assert can_single_step(model, mode, cpl)
    assert not marks_reads(model, mode, cpl)


@pytest.mark.parametrize(("mode", "cpl"), MODES)
def test_others_are_found_out(model: ModelSystem, mode: str, cpl: int) -> None:
    marking: System = Marking(model)  # type: ignore[assignment]
    deaf: System = Deaf(model)  # type: ignore[assignment]
    assert marks_reads(marking, mode, cpl)
    assert not can_single_step(deaf, mode, cpl)


def test_a_system_is_asked_once(model: ModelSystem) -> None:
    marking = Marking(model)
    for _ in range(3):
        assert marks_reads(marking, "long", 3)  # type: ignore[arg-type]
    assert marking.made == 1
