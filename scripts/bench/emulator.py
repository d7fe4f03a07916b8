"""The reference machine's speed beside other ways to execute the same guest code and see each write.

All of them take turns within each round; a row is the ratio of two of them, in time per instruction.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, NamedTuple

from emulator_sides import LOOPS, Loop, Outcome, Side, UnicornSide, kvm, model
from measure import Effort, Row, quiet, ratio_row

from pykvm.errors import PykvmError

TURNS = 20000
OURS = "model"


class Yardstick(NamedTuple):
    """What the model is held against."""

    side: str
    name: str
    target: float | None


YARDSTICKS = (
    Yardstick("kvm", "KVM's emulator at CPL 0", 1.0),
    Yardstick("unicorn", "unicorn, hooks on instructions and writes", 1.0),
    Yardstick("unicorn-writes", "unicorn, hook on writes", None),
    Yardstick("plain", "model's plain interpreter", None),
)


def measure(yardstick: Any, effort: Effort) -> Iterator[Row]:
    for loop in LOOPS:
        with ExitStack() as stack:
            sides = dict(_sides(loop))
            for side in sides.values():
                stack.callback(side.close)
            with quiet():
                times = _rounds(sides, effort.rounds(15, 3))
        count = TURNS * loop.length
        for each in YARDSTICKS:
            if each.side in sides:
                yield ratio_row(
                    "emulator",
                    f"{loop.name} / {each.name}",
                    list(zip(times[OURS], times[each.side], strict=True)),
                    count=count,
                    per="instruction",
                    target=each.target,
                )


def _sides(loop: Loop) -> Iterator[tuple[str, Side]]:
    yield OURS, model(loop, TURNS, translate=True)
    yield "plain", model(loop, TURNS, translate=False)
    try:
        real = kvm(loop, TURNS)
    except PykvmError as error:
        _note(f"no KVM to compare with: {error}")
    else:
        if real.emulated():
            yield "kvm", real
        else:
            real.close()
            _note("KVM executes CPL 0 natively here, so its emulator is not compared")
    if find_spec("unicorn") is None:
        _note(
            "unicorn is not installed and not compared; install it with: .venv/bin/pip install -e '.[bench]'"
        )
        return
    yield "unicorn", UnicornSide(loop, TURNS, each=True)
    yield "unicorn-writes", UnicornSide(loop, TURNS, each=False)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _rounds(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Times by side; every pass must do what the others did, and who goes first changes."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        order.append(order.pop(0))
        outcomes: dict[str, Outcome] = {name: sides[name].run() for name in order}
        expected = outcomes[OURS]
        for name, outcome in outcomes.items():
            if outcome[1:] != expected[1:]:
                raise RuntimeError(f"{name} ended in another state than the model: {outcome} and {expected}")
            times[name].append(outcome.nanoseconds)
    return times


__all__ = ["measure"]
