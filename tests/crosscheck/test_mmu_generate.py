"""Random scenarios for KVM's MMU: what they reach, that they repeat exactly on real KVM, and that a failing
one is found and shrunk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pykvm.cli.mmu import host_profile
from pykvm.crosscheck import mmu_mass
from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.compare import Agreement, Difference, Level, compare
from pykvm.crosscheck.counters import DETERMINISTIC, NOISY, Counters, differing
from pykvm.crosscheck.generate import RandomSource, RecordedSource
from pykvm.crosscheck.mmu_examples import EXAMPLES
from pykvm.crosscheck.mmu_generate import random_mmu_scenario
from pykvm.crosscheck.mmu_mass import MmuCheck, run_mmu_scenarios
from pykvm.crosscheck.rig import MemoryPool, Rig
from pykvm.crosscheck.run import COUNTERS, EVERYTHING, run
from pykvm.crosscheck.scenario import CodeGuest, Scenario, check, is_mmu_scenario
from pykvm.crosscheck.shrink_steps import shrink_steps
from pykvm.crosscheck.snippets import FETCH_OFFSET, SNIPPETS, image, place
from pykvm.crosscheck.trace import Trace
from pykvm.kvm import KvmSystem, KvmVcpu
from pykvm.memory import PAGE_SIZE
from pykvm.model.system import ModelSystem

REPEATED = 40


def made(seed: int) -> Scenario:
    return random_mmu_scenario(RandomSource(f"seed {seed}"), f"seed {seed}")


# --- what is generated ---------------------------------------------------------------------------


def test_a_seed_gives_the_same_scenario_and_json_gives_it_back() -> None:
    for seed in range(50):
        scenario = made(seed)
        assert scenario == made(seed)
        assert is_mmu_scenario(scenario)
        check(scenario)
        assert Scenario.from_json(json.loads(json.dumps(scenario.to_json()))) == scenario


def test_random_scenarios_reach_everything() -> None:
    kinds, snippets, trackers, rings, levels, vcpus = set(), set(), set(), set(), set(), set()
    for seed in range(600):
        scenario = made(seed)
        assert isinstance(scenario.guest, CodeGuest)
        trackers.add(scenario.tracker)
        rings.add(scenario.ring_entries)
        vcpus.add(len(scenario.guest.vcpus))
        for step in scenario.steps:
            kinds.add(step.kind)
            if isinstance(step, plan.Access):
                snippets.add(step.snippet)
                levels.add(step.cpl)
    assert trackers == {"none", "bitmap", "manual", "manual-initially-set", "ring"}
    assert rings == {256, 512, 1024, 4096}
    assert vcpus == {1, 2}
    assert levels == {0, 3}
    assert kinds == {
        "access", "set_controls", "translate", "collect", "clear", "harvest", "host_write", "logging",
        "add_slot", "move_slot", "delete_slot",
    }  # fmt: skip
    left_out = {"fxsave"}  # what it stores is the processor's affair
    assert len(snippets) > 70
    assert left_out.isdisjoint(snippets)


def test_the_simplest_choices_make_a_scenario() -> None:
    check(random_mmu_scenario(RecordedSource([])))


def test_snippets_lie_apart_and_leave_room_for_fetched_code() -> None:
    places = [place(name) for name in SNIPPETS]
    assert len(set(places)) == len(SNIPPETS)
    assert len(image()) <= FETCH_OFFSET < PAGE_SIZE
    for name, snippet in SNIPPETS.items():
        assert image()[place(name) :].startswith(snippet.code + b"\xe6\x10")


# --- real KVM ------------------------------------------------------------------------------------


def test_real_kvm_does_the_same_again(system: KvmSystem) -> None:
    """The scenarios and the list of deterministic counters: nothing of the host's shows in them."""
    with MmuCheck(system, system) as both:
        for seed in range(REPEATED):
            result = both.check(made(seed))
            assert isinstance(result, Agreement), f"made({seed}): {result}"


def test_every_statistic_is_compared_or_said_to_be_noise(system: KvmSystem) -> None:
    assert DETERMINISTIC.keys() & NOISY.keys() == set()
    with system.create_machine() as machine:
        vcpu = machine.create_vcpu()
        names = {*machine.statistics(), *vcpu.statistics()}
    assert names - DETERMINISTIC.keys() - NOISY.keys() == set()


def test_fast_counters_are_those_of_the_statistics(system: KvmSystem) -> None:
    with Rig(EXAMPLES["first-store"].scenario, system) as rig:
        vcpu = rig.machine.vcpus[0]
        rig.machine.vcpus[0].run()
        counted = Counters(rig.machine).read()
        machine, own = rig.machine.statistics(), vcpu.statistics()
        assert counted["vcpu0.pf_taken"] == own.value("pf_taken") > 0
        assert counted["machine.mmu_cache_miss"] == machine.value("mmu_cache_miss") > 0
        assert counted.keys() >= {f"machine.{name}" for name in machine if name in DETERMINISTIC}


def test_a_look_into_the_ring_takes_nothing_out(system: KvmSystem) -> None:
    with Rig(EXAMPLES["first-store"].scenario, system) as rig:
        vcpu = rig.machine.vcpus[0]
        assert isinstance(vcpu, KvmVcpu)
        vcpu.run()
        first, count = vcpu.peek_ring(0)
        assert first is not None
        assert first.offsets.tolist() == vcpu.peek_ring(0)[0].offsets.tolist()  # type: ignore[union-attr]
        assert vcpu.peek_ring(count) == (None, count)
        (taken,) = rig.machine.collect_rings().entries
        assert taken.offsets.tolist() == first.offsets.tolist()
        assert vcpu.peek_ring(0) == (None, count)


def test_memories_of_a_pool_come_back_empty() -> None:
    pool = MemoryPool()
    memory = pool.take(PAGE_SIZE)
    memory.write(8, b"\xff")
    pool.put(memory)
    again = pool.take(PAGE_SIZE)
    assert again is memory
    assert not any(again.read(0, PAGE_SIZE))
    pool.put(again)
    pool.close()
    assert memory.closed


# --- comparing -----------------------------------------------------------------------------------


def broken(trace: Trace, step: int, **members: object) -> Trace:
    steps = list(trace.steps)
    steps[step] = replace(steps[step], **members)  # type: ignore[arg-type]
    return replace(trace, steps=tuple(steps), backend="model")


def moved(counters: Mapping[str, int], name: str, by: int) -> dict[str, int]:
    return dict(counters) | {name: counters[name] + by}


@pytest.fixture
def trace(system: KvmSystem) -> Trace:
    return run(EXAMPLES["store-to-directory"].scenario, system, watch=EVERYTHING)


@pytest.mark.parametrize("name", ["vcpu0.pf_taken", "machine.mmu_unsync", "machine.pages_4k"])
def test_a_counter_that_differs_is_told_with_its_rule(trace: Trace, name: str) -> None:
    wrong = broken(trace, 1, counters=moved(trace.steps[1].counters, name, 1))
    assert isinstance(compare(trace, wrong, Level.L2), Agreement)
    result = compare(trace, wrong, Level.L3)
    assert isinstance(result, Difference)
    assert (result.level, result.step) == (Level.L3, 1)
    assert result.what.startswith(name.partition(".")[2])
    assert result.rule == DETERMINISTIC[name.partition(".")[2]]
    value = wrong.steps[1].counters[name]
    assert f"model has {value} (+{value - trace.steps[0].counters[name]} in this step)" in str(result)


def test_counters_that_differ_from_the_start_are_found(trace: Trace) -> None:
    wrong = replace(trace, counters=moved(trace.counters, "machine.mmu_cache_miss", 2))
    result = compare(trace, wrong, Level.L3)
    assert isinstance(result, Difference)
    assert result.action == "before the first step"


@pytest.mark.parametrize("level", [Level.L2, Level.L3])
def test_the_order_of_ring_entries_matters(trace: Trace, level: Level) -> None:
    pushed = trace.steps[0].pushed
    wrong = broken(trace, 0, pushed=(*pushed[:-2], pushed[-1], pushed[-2]))
    result = compare(trace, wrong, level)
    assert isinstance(result, Difference)
    assert (result.level, result.what) == (Level.L2, "ring entries pushed")
    assert result.values == ("6, from number 4 on [0:0x13 0:0x5]", "6, from number 4 on [0:0x5 0:0x13]")


def test_memory_that_differs_in_the_end_is_found(system: KvmSystem) -> None:
    trace = run(EXAMPLES["first-store"].scenario, system, watch=COUNTERS)
    data = bytearray(trace.final[0])
    data[0x5010] ^= 1
    result = compare(trace, replace(trace, final=(bytes(data),), backend="model"), Level.L3)
    assert isinstance(result, Difference)
    assert (result.level, result.what) == (Level.L4, "memory 0 at 0x5010")


def test_differing_counters_come_with_the_cause_first() -> None:
    one = {"machine.pages_4k": 1, "vcpu0.pf_taken": 1, "machine.mmu_unsync": 0}
    other = {"machine.pages_4k": 2, "vcpu0.pf_taken": 2, "machine.mmu_unsync": 0}
    assert list(differing(one, other)) == ["vcpu0.pf_taken", "machine.pages_4k"]
    assert differing(one, dict(one)) == ()


# --- the model -----------------------------------------------------------------------------------


@pytest.fixture
def like_host(system: KvmSystem) -> Iterator[ModelSystem]:
    """The model of this host, where its scenarios are known to agree to the last counter."""
    known = host_profile(system)
    if known.name != "pvm-shadow":
        pytest.skip(f"random scenarios are held against kvm_pvm hosts, this one is {known.name}")
    with ModelSystem(profile=known) as model:
        yield model


@pytest.mark.parametrize("seed", [71, 72])
def test_model_and_real_kvm_agree(
    system: KvmSystem, like_host: ModelSystem, tmp_path: Path, seed: int
) -> None:
    """Replay: pykvm crosscheck --kind scenarios --level L3 --seed SEED --count 40"""
    report = run_mmu_scenarios(system, like_host, seconds=120, seed=seed, count=40, directory=tmp_path)
    assert [str(each) for each in report.disagreements] == []
    assert report.cases == 40


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_many_agree_and_fast(system: KvmSystem, like_host: ModelSystem, tmp_path: Path) -> None:
    """At least 50 a second on a machine that is not shared; what others take does not count here."""
    begin = time.process_time()
    report = run_mmu_scenarios(system, like_host, seconds=600, seed=73, count=1000, directory=tmp_path)
    rate = report.cases / (time.process_time() - begin)
    assert [str(each) for each in report.disagreements] == []
    assert report.unrepeatable < 10
    assert rate > 40, "50 with some room for a processor whose caches others use, too"


# --- mass runs and shrinking ---------------------------------------------------------------------


def test_a_mass_run_is_clean_and_counts(system: KvmSystem, tmp_path: Path) -> None:
    report = run_mmu_scenarios(system, system, seconds=60, seed=7, count=30, directory=tmp_path)
    assert report.disagreements == []
    assert report.cases == 30
    assert report.steps > 240
    assert report.counters > 20 * report.steps
    assert report.coverage["counter pf_taken"]
    assert list(tmp_path.iterdir()) == []


def test_a_failing_scenario_is_shrunk_and_saved(
    system: KvmSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two runs is made to count page faults twice that a store8 takes."""
    calls = []

    def sabotaged(scenario: Scenario, *arguments: object, **options: object) -> Trace:
        trace = run(scenario, *arguments, **options)  # type: ignore[arg-type]
        calls.append(trace)
        if len(calls) % 2:
            return trace
        extra, steps = 0, []
        for step in trace.steps:
            extra += isinstance(step.step, plan.Access) and step.step.snippet == "store8"
            steps.append(replace(step, counters=moved(step.counters, "vcpu0.pf_taken", extra)))
        return replace(trace, steps=tuple(steps), backend="model")

    monkeypatch.setattr(mmu_mass, "run", sabotaged)
    report = run_mmu_scenarios(
        system, system, seconds=60, seed=1, directory=tmp_path, most_failures=1, shrink_seconds=20
    )
    (difference,) = report.disagreements
    assert difference.what == "pf_taken of vCPU 0"
    scenario = Scenario.from_json(json.loads(Path(difference.file).read_text()))
    (step,) = scenario.steps
    assert isinstance(step, plan.Access)
    assert step.snippet == "store8"


def test_shrinking_keeps_what_the_failure_needs() -> None:
    scenario = made(5)

    def fails(candidate: Scenario) -> bool:
        return any(isinstance(step, plan.Collect) and step.slot == 1 for step in candidate.steps)

    small = shrink_steps(scenario, fails, seconds=20)
    check(small)
    assert small.steps == (plan.Collect(1),)
    assert isinstance(small.guest, CodeGuest)
    assert [slot.slot for slot in small.guest.slots] == [1]
    assert small.guest.contents == ()
