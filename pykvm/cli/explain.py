"""``pykvm explain``: what KVM's MMU does in a scenario, step by step, and by which rule."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click
from rich.table import Table

from pykvm.backends import open_system
from pykvm.cli.mmu import MmuListener, folded, indented, open_model
from pykvm.cli.session import Session, common_options
from pykvm.crosscheck.compare import Difference, Level, compare
from pykvm.crosscheck.counters import rule_of
from pykvm.crosscheck.mmu_example import Example, mismatches
from pykvm.crosscheck.mmu_findings import NAMED
from pykvm.crosscheck.saved import load_case
from pykvm.crosscheck.scenario import Scenario
from pykvm.crosscheck.story import StepStory, Story, tell
from pykvm.errors import UsageError
from pykvm.machine import System
from pykvm.profiles import ERAS, KINDS

_WIDTH: Final = 26


@click.command("explain", short_help="Tell what KVM's MMU does in a scenario, and by which rule.")
@click.argument("scenario", required=False)
@click.option("--list", "listing", is_flag=True, help="List the worked examples and findings.")
@click.option(
    "--profile",
    type=click.Choice(KINDS),
    help="The kind of host to explain; by default the one that runs here, else pvm-shadow.",
)
@click.option("--era", type=click.Choice(ERAS), help="The era of that host's KVM; by default 6.12.")
@click.option("--walks", is_flag=True, help="Show every walk of the guest's tables with all its entries.")
@common_options
def command(
    session: Session, scenario: str | None, listing: bool, profile: str | None, era: str | None, walks: bool
) -> None:
    """Run SCENARIO on the model of KVM's MMU and tell what happened in each step, and by which rule.

    SCENARIO is a file (saved by 'pykvm crosscheck', or by hand) or the name of a worked example; --list
    shows those and the findings of docs/kvm-findings.md. Where real KVM can run it, too, its counters stand
    beside the model's.
    """
    if listing:
        _list(session)
        return
    if scenario is None:
        raise UsageError("Say which scenario: a file, or a name of 'pykvm explain --list'.")
    chosen, example = _find(scenario)
    with ExitStack() as stack:
        kvm = _real(session, chosen, profile)
        if kvm is not None:
            stack.enter_context(kvm)
        model = stack.enter_context(open_model(kvm, profile, era))
        systems = [model, *([kvm] if kvm is not None else [])]
        session.note(f"model of {model.description}" + ("" if kvm is None else f"; {kvm.description}"))
        story = tell(chosen, systems, MmuListener())
    _show(session, chosen, example, story, [system.backend for system in systems], walks=walks)


def _find(name: str) -> tuple[Scenario, Example | None]:
    """The scenario of a worked example or of a file.  Raises UsageError."""
    if name in NAMED:
        return NAMED[name].scenario, NAMED[name]
    path = Path(name)
    if not path.exists():
        raise UsageError(
            f"There is neither a file nor a worked example '{name}'; 'pykvm explain --list' has the names."
        )
    case = load_case(path)
    if not isinstance(case, Scenario):
        raise UsageError(f"{path} holds a case of one instruction or walk; pykvm replay explains those.")
    return case, None


def _real(session: Session, scenario: Scenario, profile: str | None) -> System | None:
    """The real KVM to show beside, if there is one and the profile is meant to be its own."""
    if session.backend == "model" or (profile is not None and session.backend == "auto"):
        return None
    system = open_system(session.backend)
    if system.backend == "kvm":
        return system
    system.close()
    return None


def _list(session: Session) -> None:
    table = Table("name", "what happens", "source")
    for example in NAMED.values():
        table.add_row(example.name, example.title, example.source)
    session.out.print(table)
    session.document["examples"] = [
        {"name": each.name, "title": each.title, "source": each.source} for each in NAMED.values()
    ]


def _show(
    session: Session,
    scenario: Scenario,
    example: Example | None,
    story: Story,
    backends: list[str],
    *,
    walks: bool,
) -> None:
    lines = [f"{scenario.name}: {example.title} ({example.source})" if example else scenario.name]
    for step in story.steps:
        lines += _step(step, backends, walks=walks)
    difference = _difference(story)
    if difference is not None:
        lines += ["", f"The machines differ: {difference}"]
    unexpected: dict[str, list[str]] = {}
    if example is not None:
        for trace in story.traces:
            unexpected[trace.backend] = mismatches(example, trace)
            said = "; ".join(unexpected[trace.backend]) or "as the sheet says"
            lines.append(f"{trace.backend}: {said}")
    for line in lines:
        session.out.print(line, markup=False, soft_wrap=True)
    document: dict[str, Any] = {
        "name": scenario.name,
        "source": example.source if example else "",
        "machines": backends,
        "steps": [step.to_json() for step in story.steps],
        "difference": None if difference is None else str(difference),
        "unexpected": unexpected,
    }
    session.document |= document


def _difference(story: Story) -> Difference | None:
    if len(story.traces) < 2:
        return None
    result = compare(story.traces[0], story.traces[1], Level.L3)
    return result if isinstance(result, Difference) else None


def _step(step: StepStory, backends: list[str], *, walks: bool) -> list[str]:
    lines = ["", f"step {step.number}: {step.action}"]
    lines += indented([f"tables: {step.walks[0]}", *step.walks[1:]] if step.walks else [])
    told: list[list[str]] = []
    for what, rule in step.events:
        first, *more = f"{what} [{rule}]".split("\n")
        if more and not walks:
            # A walk in short: the access and how it ended.
            first, more = f"{first.partition(',')[0]}: {more[-1].strip()}", []
        told.append([*indented([first]), *indented([line.strip() for line in more], 2)])
    lines += folded(told)
    shown = list(step.shown.values())
    if shown and all(each == shown[0] for each in shown):
        lines += indented(shown[0])
    else:
        for backend, text in step.shown.items():
            lines += indented([f"{backend}: {line}" for line in text])
    if step.moved:
        head = "".join(f"{backend:>8}" for backend in backends)
        lines.append(f"  {'counter':<{_WIDTH}}{head}  rule")
    for name, values in step.moved.items():
        counter = name.removeprefix("machine.").removeprefix("vcpu0.")
        numbers = "".join(f"{values.get(backend, 0):>+8}" for backend in backends)
        lines.append(f"  {counter:<{_WIDTH}}{numbers}  {rule_of(name)}")
    return lines
