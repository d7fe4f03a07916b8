"""Scenarios as data: through JSON and back, and a sentence for everything that cannot be one."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.generate import scenarios
from pykvm.crosscheck.mmu_examples import EXAMPLES
from pykvm.crosscheck.scenario import Scenario, Surplus, WorkloadPlan
from pykvm.errors import UsageError
from pykvm.machine import SlotFlags
from tests.crosscheck import samples

FULL = samples.every_step()


def through_json(scenario: Scenario) -> Scenario:
    return Scenario.from_json(json.loads(json.dumps(scenario.to_json())))


MMU = replace(
    EXAMPLES["first-store"].scenario,
    steps=(
        plan.Access("movs8", 0x5000, 1, 2, 0x7000, 0, 0),
        plan.SetControls(0, cr3=0x10000),
        plan.SetControls(0, cr0=1, cr4=2, efer=3),
        plan.Translate(0x5000),
    ),
)


def test_every_kind_of_step_survives_json() -> None:
    assert {step.kind for step in (*FULL.steps, *MMU.steps)} == set(plan.KINDS)
    assert through_json(FULL) == FULL
    assert through_json(MMU) == MMU


def mmu_with(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data: dict[str, Any] = MMU.to_json()
    change(data)
    return data


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (mmu_with(lambda d: d["steps"][0].update(snippet="store3")), "steps[0].snippet must be one of load1"),
        (mmu_with(lambda d: d["steps"][0].update(cpl=4)), "steps[0].cpl must be in 0 to 0x3"),
        (mmu_with(lambda d: d["steps"][0].update(vcpu=1)), "steps[0].vcpu must be below 1"),
        (mmu_with(lambda d: d["steps"][1].update(cr3="x")), "steps[1].cr3 must be an integer"),
        (mmu_with(lambda d: d["steps"][3].pop("linear")), "steps[3].linear is missing"),
        (
            mmu_with(lambda d: d["guest"].update(snippets=None)),
            "steps[0] needs a guest with a page for snippets",
        ),
        (mmu_with(lambda d: d["guest"].update(snippets=8)), "guest.snippets must be a multiple of 4096"),
        (mmu_with(lambda d: d["guest"].update(snippets=1 << 30)), "guest.snippets reaches beyond memory 0"),
        (
            mmu_with(lambda d: d["guest"]["vcpus"][0]["controls"].pop("cr3")),
            "guest.vcpus[0].controls.cr3 is missing",
        ),
        (
            mmu_with(lambda d: d["guest"]["vcpus"].append(d["guest"]["vcpus"][0] | {"controls": None})),
            "guest.vcpus[].controls must be given for all vCPUs or none",
        ),
    ],
)
def test_a_malformed_scenario_of_the_mmu_is_refused(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        Scenario.from_json(data)


def test_a_workload_survives_json() -> None:
    workload = WorkloadPlan("hotspot", 4 << 20, 2, 0, 7, 1)
    scenario = Scenario("w", workload, (plan.Run(1),), "ring", 512, (Surplus(0, 1, 2, 3, "why"),))
    assert through_json(scenario) == scenario


def test_a_file_holds_what_was_saved(tmp_path: Path) -> None:
    FULL.save(tmp_path / "case.json")
    saved = json.loads((tmp_path / "case.json").read_text())
    assert saved["kind"] == "scenario"
    assert Scenario.from_json(saved) == FULL


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(scenarios())
def test_generated_scenarios_survive_json(scenario: Scenario) -> None:
    assert through_json(scenario) == scenario


def put(*path: str | int, value: object) -> Callable[[Any], None]:
    """Set a member of the JSON form."""

    def change(data: Any) -> None:
        for name in path[:-1]:
            data = data[name]
        data[path[-1]] = value

    return change


def drop(*path: str | int) -> Callable[[Any], None]:
    """Remove a member of the JSON form."""

    def change(data: Any) -> None:
        for name in path[:-1]:
            data = data[name]
        del data[path[-1]]

    return change


MALFORMED: dict[str, tuple[Callable[[Any], None], str]] = {
    "another kind": (put("kind", value="instruction"), "scenario.kind must be one of scenario"),
    "no steps": (drop("steps"), "scenario.steps is missing"),
    "an unknown member": (put("color", value=1), "unknown member 'color'"),
    "an unknown step": (put("steps", 0, "step", value="jump"), r"scenario.steps\[0\].step must be one of"),
    "a step without kind": (drop("steps", 0, "step"), r"scenario.steps\[0\].step is missing"),
    "a step's odd member": (put("steps", 0, "exits", value=True), r"steps\[0\].exits must be an integer"),
    "a step as a list": (put("steps", 0, value=[]), r"scenario.steps\[0\] must be an object, not a list"),
    "an unknown vCPU": (put("steps", 0, "vcpu", value=1), r"steps\[0\].vcpu must be below 1"),
    "a slot from nowhere": (put("steps", 1, "slot", value=9), r"steps\[1\].slot names a slot"),
    "a host write outside": (put("steps", 4, "offset", value=1 << 40), r"steps\[4\] reaches beyond memory 1"),
    "odd hexadecimal": (put("steps", 4, "data", value="0g"), r"steps\[4\].data must consist of pairs"),
    "on as a number": (put("steps", 5, "on", value=1), r"steps\[5\].on must be true or false"),
    "flags out of range": (put("guest", "slots", 0, "flags", value=4), r"slots\[0\].flags must be in 0 to"),
    "an unknown guest": (put("guest", "guest", value="linux"), "guest.guest must be one of code, workload"),
    "an unknown mode": (put("guest", "vcpus", 0, "mode", value="smm"), r"vcpus\[0\].mode must be one of"),
    "a register too wide": (
        put("guest", "vcpus", 0, "registers", "rax", value=1 << 64),
        r"vcpus\[0\].registers.rax must be in 0 to",
    ),
    "no memory": (put("guest", "memories", value=[]), "memories must have 1 to 16 items"),
    "odd memory": (put("guest", "memories", 1, value=100), r"memories\[1\] must be a positive multiple"),
    "too much memory": (put("guest", "memories", 1, value=1 << 40), r"memories\[1\] must be in 0 to"),
    "too much memory in all": (put("guest", "memories", value=[1 << 28, 4096]), "must not exceed"),
    "a slot on no memory": (put("guest", "slots", 0, "memory", value=7), r"slots\[0\].memory must be below"),
    "a slot beyond": (put("guest", "slots", 0, "size", value=1 << 30), r"slots\[0\] reaches beyond memory 0"),
    "contents beyond": (put("guest", "contents", 0, "offset", value=1 << 30), r"contents\[0\] reaches"),
    "no tables": (put("guest", "tables", value=None), "tables may be null only if"),
    "tables beyond": (put("guest", "tables", "pages", value=60000), "guest.tables reaches beyond"),
    "tables not aligned": (put("guest", "tables", "start", value=5), "tables.start must be a multiple"),
    "an unknown tracker": (put("tracker", value="magic"), "scenario.tracker must be one of"),
    "a name as a number": (put("name", value=3), "scenario.name must be a string"),
    "a name too long": (put("name", value="x" * 500), "scenario.name must have at most 400"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_cannot_be_a_scenario_is_refused_in_a_sentence(case: str) -> None:
    change, expected = MALFORMED[case]
    data = copy.deepcopy(FULL.to_json())
    change(data)
    with pytest.raises(UsageError, match=expected):
        Scenario.from_json(data)


@pytest.mark.parametrize("data", [None, 3, "scenario", [], {}])
def test_something_else_is_refused(data: object) -> None:
    with pytest.raises(UsageError, match=r"^scenario(\.kind)? "):
        Scenario.from_json(data)


def test_an_unknown_workload_is_refused() -> None:
    scenario = Scenario("w", WorkloadPlan("nothing", 4 << 20, 1, 3, 1, 1), ())
    with pytest.raises(UsageError, match=r"guest\.workload must be one of burst"):
        Scenario.from_json(scenario.to_json())


def test_steps_describe_themselves_in_a_line() -> None:
    assert plan.describe(plan.Run(1, 3)) == "run vcpu=1 exits=3 fill=None"
    assert plan.describe(plan.HostWrite(0, 4096, b"\1\2")) == "host_write memory=0 offset=0x1000 data=0102"
    assert plan.describe(plan.MoveSlot(3, 4096)) == "move_slot slot=3 gpa=0x1000"
    assert SlotFlags.READONLY == 2  # what the JSON form counts on
