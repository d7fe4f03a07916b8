"""``pykvm interleave``: KVM's lockless rules under every schedule, as they are or with one of them broken."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.table import Table

from pykvm.cli.session import Session, common_options
from pykvm.errors import PykvmError, UsageError, VerificationError
from pykvm.model.interleave import CASES, MUTATIONS, TOPICS, Case, Mutation, Result


@click.command("interleave", short_help="Explore all schedules of KVM's lockless dirty tracking.")
@click.option("--case", "case_name", metavar="NAME", help="Explore this case only; --list has the names.")
@click.option(
    "--mutation",
    "mutation_name",
    metavar="NAME",
    help="Break this rule in its case and show what comes of it.",
)
@click.option("--large", is_flag=True, help="Explore the large cases, too: about a minute.")
@click.option("--list", "only_list", is_flag=True, help="List the cases and the mutations.")
@common_options
def command(
    session: Session, case_name: str | None, mutation_name: str | None, large: bool, only_list: bool
) -> None:
    """Let a few actors (stores, page faults, collections, tracking, deletion of a slot) take their steps in
    every possible order, and check that no write is lost, that no tracked page is written unnoticed, and
    that nothing is used after it was freed.

    Without --mutation it is KVM's rules that are explored: the result is a proof for cases of that size, or
    a counterexample and exit status 10. With --mutation one rule is broken, and the shortest schedule that
    loses something is printed. No machine is created, whatever --backend says. docs/interleavings.md tells
    what each mutation is about.
    """
    if only_list:
        _list(session)
    elif mutation_name is not None:
        if case_name is not None or large:
            raise UsageError("A mutation has its own case; leave out --case and --large.")
        _mutate(session, _named(MUTATIONS, mutation_name, "mutation"))
    elif case_name is not None:
        _prove(session, [_named(CASES, case_name, "case")])
    else:
        _prove(session, [case for case in CASES.values() if large or not case.large])


def _named(known: dict[str, Any], name: str, what: str) -> Any:
    if name not in known:
        raise UsageError(f"There is no {what} '{name}'; 'pykvm interleave --list' has the names.")
    return known[name]


def _list(session: Session) -> None:
    session.document |= {
        "cases": [_case(case) for case in CASES.values()],
        "mutations": [_mutation(mutation) for mutation in MUTATIONS.values()],
    }
    table = _table("case", "what it is", "bounds")
    for case in CASES.values():
        table.add_row(case.name, case.summary, case.bounds + (" (--large)" if case.large else ""))
    session.out.print(table)
    for topic, mutations in TOPICS.items():
        session.out.print()
        table = _table(topic, "case", "what is different")
        for mutation in mutations:
            table.add_row(mutation.name, mutation.case, mutation.change)
        session.out.print(table)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(names):
        table.add_column(name, no_wrap=not index)
    return table


def _prove(session: Session, cases: list[Case]) -> None:
    """Explore under KVM's rules; raises VerificationError at the first counterexample."""
    results: list[dict[str, Any]] = []
    session.document["results"] = results
    table = _table("case", "bounds")
    for name in ("states", "schedules", "longest", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        begin = time.perf_counter()
        result = case.explore()
        seconds = time.perf_counter() - begin
        results.append({"case": case.name, "mutation": None, "seconds": seconds} | _result(result))
        if result.counterexample is not None:
            session.out.print(str(result.counterexample), markup=False, soft_wrap=True)
            raise VerificationError(
                f"Case {case.name} breaks under KVM's rules: {result.counterexample.broken}."
            )
        schedules = "no bound" if result.schedules is None else _large(result.schedules)
        longest = "" if result.longest is None else str(result.longest)
        table.add_row(case.name, case.bounds, f"{result.states:,}", schedules, longest, f"{seconds:.1f}")
    session.out.print(table)
    session.out.print(f"All schedules of {_cases(len(cases))} keep every promise.")


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"


def _large(number: int) -> str:
    """Readable where it has twenty digits."""
    return f"{number:,}" if number < 10**6 else f"{number:.1e}"


def _mutate(session: Session, mutation: Mutation) -> None:
    """Explore with one rule broken; raises PykvmError if the outcome is not the documented one."""
    begin = time.perf_counter()
    result = mutation.explore()
    seconds = time.perf_counter() - begin
    session.document |= _mutation(mutation)
    session.document["results"] = [
        {"case": mutation.case, "mutation": mutation.name, "seconds": seconds} | _result(result)
    ]

    def say(text: str) -> None:
        session.out.print(text, markup=False, soft_wrap=True)

    say(f"{mutation.name}: {mutation.change}")
    say(f"Case {mutation.case}: {CASES[mutation.case].bounds}.")
    if result.counterexample is not None:
        say(str(result.counterexample))
    else:
        say(f"Nothing is lost in any schedule: {result.states:,} states.")
    say(f"Why: {mutation.outcome}")
    say(f"Rule: {mutation.rule}")
    if mutation.harmless != (result.counterexample is None):
        expected = "nothing" if mutation.harmless else "something"
        raise PykvmError(f"Mutation {mutation.name} should lose {expected}, and it does not; report it.")


def _case(case: Case) -> dict[str, Any]:
    return {"name": case.name, "summary": case.summary, "bounds": case.bounds, "large": case.large}


def _mutation(mutation: Mutation) -> dict[str, Any]:
    return {
        "name": mutation.name,
        "case": mutation.case,
        "change": mutation.change,
        "outcome": mutation.outcome,
        "rule": mutation.rule,
        "harmless": mutation.harmless,
    }


def _result(result: Result) -> dict[str, Any]:
    found = result.counterexample
    return {
        "states": result.states,
        "transitions": result.transitions,
        "schedules": result.schedules,
        "longest": result.longest,
        "counterexample": found
        and {
            "start": found.start,
            "schedule": [{"actor": line.actor, "step": line.text} for line in found.lines],
            "broken": found.broken,
        },
    }
