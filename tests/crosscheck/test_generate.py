"""Random scenarios: reproducible, shrinking, and real KVM and the model agree about them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.compare import Agreement, Difference
from pykvm.crosscheck.generate import RandomSource, RecordedSource, random_scenario, scenarios
from pykvm.crosscheck.mass import ScenarioReport, check, judge, run_scenarios
from pykvm.crosscheck.run import run
from pykvm.crosscheck.saved import load_case
from pykvm.crosscheck.scenario import TRACKERS, CodeGuest, Scenario
from pykvm.crosscheck.shrink import shrink
from pykvm.errors import PykvmError
from pykvm.kvm import KvmSystem
from pykvm.machine import System
from pykvm.model.system import ModelSystem

QUIET = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


def made(seed: object) -> Scenario:
    return random_scenario(RandomSource(str(seed)), "test")


def test_the_same_seed_gives_the_same_scenario() -> None:
    assert made(1) == made(1) != made(2)


def test_recorded_choices_give_the_scenario_again() -> None:
    source = RandomSource("5")
    scenario = random_scenario(source, "test")
    assert random_scenario(RecordedSource(source.choices), "test") == scenario


@pytest.mark.parametrize("seed", range(20))
def test_any_list_of_choices_gives_a_scenario(seed: int) -> None:
    random = Random(seed)
    choices = [random.randrange(1 << random.randrange(1, 33)) for _ in range(random.randrange(300))]
    scenario = random_scenario(RecordedSource(choices), "test")
    assert Scenario.from_json(scenario.to_json()) == scenario


def test_random_scenarios_reach_everything() -> None:
    modes, trackers, kinds = set(), set(), set()
    for seed in range(300):
        scenario = made(seed)
        assert isinstance(scenario.guest, CodeGuest)
        modes.add((scenario.guest.vcpus[0].mode, scenario.guest.vcpus[0].cpl))
        trackers.add(scenario.tracker)
        kinds |= {step.kind for step in scenario.steps}
    assert modes == {("real", 0), ("protected32", 0), ("protected32", 3), ("long", 0), ("long", 3)}
    assert trackers == set(TRACKERS)
    # Answers and new registers need to know the program; single steps are not possible everywhere; the
    # last three are for the scenarios of KVM's MMU.
    others = {"answer", "set_registers", "single_step", "access", "set_controls", "translate"}
    assert kinds == set(plan.KINDS) - others


@pytest.mark.kvm
@QUIET
@given(scenarios())
def test_kvm_and_the_model_agree(scenario: Scenario) -> None:
    with KvmSystem() as system, ModelSystem() as model:
        result = check(scenario, system, model)
    assert isinstance(result, Agreement), str(result)


def test_a_seeded_batch_agrees(system: KvmSystem, model: ModelSystem, tmp_path: Path) -> None:
    heard: list[int] = []

    def hear(report: ScenarioReport) -> None:
        heard.append(report.cases)

    report = run_scenarios(system, model, seconds=3, seed=1, directory=tmp_path, progress=hear)
    assert [str(each) for each in report.disagreements] == []
    assert report.cases > 20
    assert heard == list(range(1, report.cases + 1))
    assert report.coverage["step run"] > report.cases
    assert sum(count for name, count in report.coverage.items() if name.startswith("mode ")) == report.cases
    assert not list(tmp_path.iterdir())


# --- finding and shrinking -------------------------------------------------------------------------


class Forgetful:
    """The model, but for a page that its log forgets: data page 3, in whatever slot it is."""

    backend = "forgetful"
    description = "a machine with a bug"

    def __init__(self, model: System) -> None:
        self._model = model

    def create_machine(self) -> object:
        machine = self._model.create_machine()
        get = machine.get_dirty_log

        def forget(slot: object) -> object:
            gfns = get(slot)  # type: ignore[arg-type]
            return gfns[gfns != 0x83]

        machine.get_dirty_log = forget  # type: ignore[method-assign]
        return machine


def test_a_lost_page_is_found_shrunk_and_saved(model: ModelSystem, tmp_path: Path) -> None:
    """The bug needs a store to page 3 under a bitmap: that, a collection and little else must be left."""
    buggy: System = Forgetful(model)  # type: ignore[assignment]
    report = run_scenarios(model, buggy, seconds=20, seed=3, directory=tmp_path / "new", most_failures=1)
    assert report.disagreements
    difference = report.disagreements[0]
    scenario = load_case(Path(difference.file))
    assert isinstance(scenario, Scenario)
    assert difference.what.startswith("gfn 0x83 of slot ")
    assert isinstance(check(scenario, model, buggy), Difference)
    assert isinstance(check(scenario, model, model), Agreement)
    sizes = [len(made(f"seed 3, case {n}").steps) for n in range(20)]
    assert len(scenario.steps) <= sorted(sizes)[len(sizes) // 2]
    assert len([step for step in scenario.steps if step.kind == "run"]) <= 3


def test_shrinking_keeps_what_fails_and_drops_the_rest() -> None:
    def fails(scenario: Scenario) -> bool:
        return any(isinstance(step, plan.HostWrite) for step in scenario.steps)

    for seed in range(20):
        source = RandomSource(f"shrink {seed}")
        if fails(random_scenario(source)):
            break
    small = shrink(source.choices, fails, name="small", seconds=10)
    assert fails(small)
    assert sum(isinstance(step, plan.HostWrite) for step in small.steps) == 1
    assert len(small.steps) < len(random_scenario(RecordedSource(source.choices)).steps)


def test_hypothesis_shrinks_to_a_small_reproducer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypothesis.internal.conjecture.engine.MAX_SHRINKING_SECONDS", 4)
    found: list[Scenario] = []

    @settings(QUIET, max_examples=2000)
    @given(scenarios())
    def never_in_long_mode_with_a_host_write(scenario: Scenario) -> None:
        assert isinstance(scenario.guest, CodeGuest)
        writes = any(isinstance(step, plan.HostWrite) for step in scenario.steps)
        if writes and scenario.guest.vcpus[0].mode == "long":
            found.append(scenario)
            raise AssertionError

    with pytest.raises(AssertionError):
        never_in_long_mode_with_a_host_write()
    # Four seconds are not enough for the smallest one on a busy host, but for much of the way.
    first, last = (len(json.dumps(each.to_json())) for each in (found[0], found[-1]))
    assert last < first
    assert len(found[-1].steps) <= len(found[0].steps)


def test_a_machine_that_cannot_be_made_is_no_disagreement(tmp_path: Path) -> None:
    with ModelSystem() as closed:
        pass
    with pytest.raises(PykvmError):
        run_scenarios(closed, closed, seconds=1, seed=1, directory=tmp_path)


def test_judging_names_the_most_telling_level_first(model: ModelSystem) -> None:
    trace = run(made(4), model)
    assert isinstance(judge(trace, trace), Agreement)
