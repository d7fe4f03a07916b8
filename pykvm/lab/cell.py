"""One cell of the matrix, as a process of its own: ``python -m pykvm.lab.cell ORDER``.

ORDER is JSON.  Progress goes to standard output, a JSON object a line; the result goes into the store, so
nothing is lost with whoever started this.  A process of its own keeps two labs apart, and a signal to it
cleans up one lab.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pykvm.errors import HostError, PykvmError
from pykvm.lab import session
from pykvm.lab.cache import Cache
from pykvm.lab.emulator import Emulator
from pykvm.lab.emulators import Accel, choose
from pykvm.lab.kernels import PreparedKernel, select
from pykvm.lab.kinds import kind
from pykvm.lab.matrix import Saved, Store, now, state_of
from pykvm.lab.results import Case
from pykvm.lab.selections import fitting, limits, selection
from pykvm.lab.suite import Runner, SuiteSpec, run_suite

INTERRUPTED_STATUS = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Order:
    """Which cell, of the tests of the checkout at ``root``."""

    cache: str
    root: str
    release: str
    kind: str
    selection: str
    accel: Accel = "auto"


Say = Callable[[dict[str, Any]], None]


class _Lines:
    """A watcher that passes everything on as lines."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def note(self, text: str) -> None:
        self._say({"note": text})

    def case(self, case: Case, done: int, collected: int) -> None:
        self._say({"case": asdict(case), "done": done, "collected": collected})


def run_cell(order: Order, kernel: PreparedKernel, emulator: Emulator, runner: Runner, say: Say) -> Saved:
    """Run the tests and save the cell, with the state of the checkout that the lab packs."""
    slow = emulator.slug == "bochs"
    asked = selection(order.selection)
    chosen = fitting(asked, slow=slow)
    state = state_of(Path(order.root))
    within = limits(chosen, slow=slow)
    spec = SuiteSpec(
        kernel=kernel,
        kind=kind(order.kind),
        root=Path(order.root),
        paths=chosen.paths,
        keyword=chosen.keyword,
        timeout=within.whole,
        test_timeout=within.test,
        silence=within.silence,
        emulator=emulator.name,
        slug=emulator.slug,
    )
    result = run_suite(spec, _Lines(say), runner)
    saved = Saved(
        *(kernel.series, kernel.release, order.kind, chosen.name, state.fingerprint, state.revision, now()),
        result=result,
    )
    Store(Cache(Path(order.cache)), order.selection).save(saved)
    return saved


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(arguments: list[str]) -> int:
    """Run the cell that the order names; the exit status is 0, or that of the error that was said."""
    signal.signal(signal.SIGTERM, _stop)

    def say(line: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    order = Order(**json.loads(arguments[0]))
    try:
        cache = Cache(Path(order.cache))
        kernel = select(cache, order.release)
        if kernel is None:
            raise HostError(f"Linux {order.release} was removed from the lab cache; run the matrix again.")
        emulator = choose(cache, kind(order.kind), order.accel, lambda text: say({"note": text}))
        run_cell(order, kernel, emulator, partial(session.run, cache, emulator), say)
    except PykvmError as error:
        say({"error": str(error)})
        return error.exit_status
    except BrokenPipeError:
        return INTERRUPTED_STATUS  # whoever started this is gone, and so is the need for it
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
