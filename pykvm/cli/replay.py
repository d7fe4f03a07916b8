"""``pykvm replay``: run a saved case again on two machines and say whether they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pykvm.backends import open_system
from pykvm.cli.mmu import open_model
from pykvm.cli.parameters import duration_type
from pykvm.cli.session import Session, common_options
from pykvm.cli.walks import explain
from pykvm.crosscheck import paging_run
from pykvm.crosscheck.compare import Difference, Result
from pykvm.crosscheck.instructions.bench import UNEXPLAINED, Bench, Kind, processor
from pykvm.crosscheck.instructions.case import InstructionCase
from pykvm.crosscheck.instructions.compare import describe as describe_case
from pykvm.crosscheck.instructions.compare import ending
from pykvm.crosscheck.mass import judge, traces
from pykvm.crosscheck.mmu_findings import NAMED
from pykvm.crosscheck.mmu_mass import MmuCheck
from pykvm.crosscheck.run import EVERYTHING
from pykvm.crosscheck.saved import SavedPaging, load_case
from pykvm.crosscheck.scenario import Scenario, is_mmu_scenario
from pykvm.crosscheck.steps import describe
from pykvm.crosscheck.trace import Trace
from pykvm.errors import DisagreementError
from pykvm.machine import System
from pykvm.model.oracle import InstructionOracle


@click.command("replay", short_help="Run a saved case on two machines again.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--against",
    type=click.Choice(["model", "kvm"]),
    default="model",
    show_default=True,
    help="The machine to hold the one of --backend against.",
)
@click.option(
    "--timeout",
    type=duration_type(minimum=0.001),
    default="10s",
    show_default=True,
    help="How long a scenario may run on each machine.",
)
@click.option("--steps", is_flag=True, help="Show what each step of a scenario did on both machines.")
@common_options
def command(session: Session, file: Path, against: str, timeout: float, steps: bool) -> None:
    """Run the case in FILE, which 'pykvm crosscheck' saved, on two machines and compare.

    FILE may also be the name of a worked example or finding ('pykvm explain --list').

    The exit status is 0 if they agree and 13 if they do not. Scenarios are compared at the levels L4
    (state), L0 (no page is lost) and L1 (the same pages are reported), those of KVM's MMU at L3 (counters).
    """
    named = NAMED.get(str(file))
    case = load_case(file) if named is None else named.scenario
    with open_system(session.backend) as first, open_system(against) as second:
        machines = (first.backend, second.backend)
        session.document |= {"file": str(file), "kind": case.to_json()["kind"], "machines": machines}
        if first.backend == second.backend and not isinstance(case, InstructionCase):
            session.note(f"Only the {first.backend} is used: it is held against itself.")
        if isinstance(case, Scenario):
            words = _replay_scenario(session, case, (first, second), file, timeout=timeout, steps=steps)
        elif isinstance(case, SavedPaging):
            words = _replay_paging(session, case, (first, second))
        else:
            words = _replay_instruction(session, case, (first, second))
    session.document["agrees"] = not words
    if words:
        raise DisagreementError(words)


def _replay_scenario(
    session: Session,
    scenario: Scenario,
    systems: tuple[System, System],
    file: Path,
    *,
    timeout: float,
    steps: bool,
) -> str:
    """The first difference in words, empty if there is none."""
    if is_mmu_scenario(scenario):
        first, second, result = _mmu_traces(scenario, systems, timeout)
    else:
        first, second = traces(scenario, *systems, seconds=timeout)
        result = judge(first, second)
    if steps:
        _show(session, first)
        _show(session, second)
    session.document |= {"name": scenario.name, "steps": len(scenario.steps), "difference": None}
    if isinstance(result, Difference):
        session.document["difference"] = _difference(result)
        return str(result).replace(result.command, f"pykvm replay {file}")
    session.document["note"] = result.note
    session.out.print(str(result), markup=False, soft_wrap=True)
    return ""


def _mmu_traces(
    scenario: Scenario, systems: tuple[System, System], seconds: float
) -> tuple[Trace, Trace, Result]:
    """Scenarios of KVM's MMU are compared at L3, a model being that of the other machine's host."""
    kvm = next((system for system in systems if system.backend == "kvm"), None)
    with open_model(kvm) as model:
        first, second = (model if system.backend == "model" else system for system in systems)
        with MmuCheck(first, second, seconds=seconds) as check:
            one, other = check.traces(scenario, EVERYTHING)
            return one, other, check.judge(one, other)


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        "level": difference.level.value,
        "step": difference.step,
        "action": difference.action,
        "what": difference.what,
        "values": difference.values,
        "rule": difference.rule,
    }


def _show(session: Session, trace: Trace) -> None:
    session.note(f"On {trace.backend}:")
    for step in trace.steps:
        session.note(f"  step {step.number}: {describe(step.step)}")
        for reason in step.exits:
            session.note(f"    exit {reason}")
        for text in filter(None, (step.message, step.impossible, "out of time" if step.overdue else "")):
            session.note(f"    {text}")
        if step.pushed:
            session.note("    ring: " + " ".join(f"{slot}:{page:#x}" for _, slot, page in step.pushed))
        if step.dirty is not None:
            session.note("    dirty: " + (", ".join(f"{s}:{gfn:#x}" for s, gfn in step.dirty) or "nothing"))
        if step.changed:
            session.note("    changed: " + ", ".join(f"{m}:{page:#x}" for m, page in sorted(step.changed)))


def _replay_paging(session: Session, case: SavedPaging, systems: tuple[System, System]) -> str:
    """In words what differs and should not, empty if nothing does."""
    session.note(paging_run.replay(systems, case.index, explain))
    result = paging_run.run_paging(*systems, [case.index])
    known = [each.known for each in result.differences if each.known]
    wrong = [words for each in result.disagreements for words in each.words]
    session.document |= {"index": case.index, "difference": wrong or None, "note": " ".join(known)}
    if not wrong:
        session.out.print(" ".join([f"Both machines agree about paging case {case.index}.", *known]))
    return "; ".join(wrong)


def _replay_instruction(session: Session, case: InstructionCase, systems: tuple[System, System]) -> str:
    """In words what nobody can explain, empty if there is nothing; the host's processor is asked, too."""
    cpuid = processor(systems[0])
    oracle = InstructionOracle(cpuid)
    # The bench takes its first system, the model, for the one to judge.
    ordered = sorted({system.backend: system for system in systems}.values(), key=_is_real)
    with Bench(case.mode, case.cpl, ordered, oracle, cpuid) as bench:
        for who, outcome in bench.outcomes(case).items():
            session.note(f"{who}: {ending(outcome)}")
        verdict = bench.judge(case)
        session.document["machines"] = bench.names
    text = describe_case(case, oracle)
    unexplained = verdict.kind in UNEXPLAINED or verdict.kind is Kind.MISSING
    words = [f"{who} has {difference}" for who, difference in verdict.words.items()]
    session.document |= {
        "instruction": text,
        "verdict": verdict.kind.value,
        "difference": words or None,
        "note": verdict.known.why if verdict.known else "",
    }
    if unexplained:
        return f"{text}: {verdict}"
    session.out.print(f"{text}: {verdict}.", markup=False, soft_wrap=True)
    return ""


def _is_real(system: System) -> bool:
    return system.backend != "model"
