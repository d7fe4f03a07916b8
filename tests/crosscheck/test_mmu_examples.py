"""The worked examples of docs/reference/kvm-mmu.md, sections 14.2 and 14.3, on real KVM and on the model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pykvm.crosscheck.mmu_example import Example, Expected, HostKind, mismatches
from pykvm.crosscheck.mmu_examples import EXAMPLES
from pykvm.crosscheck.run import EVERYTHING, run
from pykvm.crosscheck.scenario import Scenario, check
from pykvm.kvm import KvmSystem
from pykvm.model.system import ModelSystem
from pykvm.profiles import DEVELOPMENT_HOST, profile

pytestmark = pytest.mark.interruptible

ROWS = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22}


def test_every_row_of_the_sheet_has_an_example() -> None:
    sources = {example.source for example in EXAMPLES.values()}
    assert {f"kvm-mmu.md 14.2, row {row}" for row in ROWS} <= sources
    assert {f"kvm-mmu.md 14.3, {letter}" for letter in "ABCDEFG"} <= sources


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_survives_json(name: str) -> None:
    scenario = EXAMPLES[name].scenario
    check(scenario)
    assert Scenario.from_json(json.loads(json.dumps(scenario.to_json()))) == scenario


def require_host(system: KvmSystem, example: Example) -> None:
    """Skip on hosts that the example's values are not for, which a store at CPL 0 tells."""
    moved = run(EXAMPLES["store-load"].scenario, system, watch=EVERYTHING).steps[0].counters
    if not moved["machine.mmu_cache_miss"]:
        kind = HostKind.NESTED if moved["vcpu0.pf_taken"] > 2 else HostKind.PML
    else:
        kind = HostKind.EMULATES_KERNEL if moved["vcpu0.insn_emulation"] else HostKind.NATIVE_SHADOW
    if example.host is not kind:
        pytest.skip(f"this host has {kind.value}")


PROFILES = {
    HostKind.EMULATES_KERNEL: [DEVELOPMENT_HOST],
    HostKind.NATIVE_SHADOW: [("amd-shadow", "6.12"), ("intel-shadow", "7.2")],
    HostKind.NESTED: [("amd-npt", "6.12"), ("intel-ept-nopml", "6.12"), ("amd-npt", "7.2")],
    HostKind.PML: [("intel-ept", "6.12")],
}


@pytest.mark.parametrize(
    ("name", "host"),
    [
        pytest.param(example.name, host, id=f"{example.name}-{'-'.join(host)}")
        for example in EXAMPLES.values()
        for host in PROFILES[example.host]
    ],
)
def test_the_model_shows_what_the_sheet_says(name: str, host: tuple[str, str]) -> None:
    example = EXAMPLES[name]
    with ModelSystem(profile=profile(*host)) as model:
        trace = run(example.scenario, model, watch=EVERYTHING)
    assert mismatches(example, trace) == []


def test_pml_entries_come_oldest_first_since_they_were_turned() -> None:
    """kvm-mmu.md 4.6: the one behaviour that row C of 14.3 depends on."""
    scenario = EXAMPLES["pml-rearmed"].scenario
    with ModelSystem(profile=profile("intel-ept", "7.2")) as model:
        pushed = run(scenario, model, watch=EVERYTHING).steps[2].pushed
    assert [offset for _, _, offset in pushed] == [0x10, 0x11, 0x12, 0x13, 5]


@pytest.mark.parametrize("name", EXAMPLES)
def test_real_kvm_shows_what_the_sheet_says(name: str, system: KvmSystem) -> None:
    example = EXAMPLES[name]
    require_host(system, example)
    trace = run(example.scenario, system, watch=EVERYTHING)
    assert mismatches(example, trace) == []


def test_what_differs_is_told(system: KvmSystem) -> None:
    example = EXAMPLES["first-store"]
    require_host(system, example)
    trace = run(example.scenario, system, watch=EVERYTHING)
    wrong = Expected(0, {"pf_taken": 3}, ring=(1, 2), harvested=1, exits=("Halted",), refused="BusyError")
    assert mismatches(replace(example, expected=(wrong, Expected(7))), trace) == [
        "step 0: pf_taken moved by 2, not by 3",
        "step 0: ring 10 11 12 13 13 5, not 1 2",
        "step 0: entries taken 0, not 1",
        "step 0: exits IoOut, not Halted",
        "step 0: refused nothing, not BusyError",
        "step 7 was not reached",
    ]
