"""From a failing scenario to a small one: fewer and simpler choices, as long as it still fails.

A generated scenario is the result of a list of choices, of which 0 is the simplest.  Shrinking works on that
list, so that whatever comes out is a scenario that the generator can make: blocks of choices are dropped,
then single ones are lowered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pykvm.crosscheck.generate import RecordedSource, random_scenario
from pykvm.crosscheck.scenario import Scenario

_LARGEST_BLOCK = 64


def shrink(
    choices: Sequence[int], fails: Callable[[Scenario], bool], *, name: str, seconds: float = 10.0
) -> Scenario:
    """The smallest failing scenario found within ``seconds``; the one of ``choices`` must fail."""
    deadline = time.monotonic() + seconds
    best = list(choices)

    def try_out(candidate: list[int]) -> bool:
        nonlocal best
        if time.monotonic() > deadline or not fails(_build(candidate, name)):
            return False
        best = candidate
        return True

    changed = True
    while changed and time.monotonic() < deadline:
        changed = _drop_blocks(lambda: best, try_out)
        changed |= _lower(lambda: best, try_out)
    return _build(best, name)


def _build(choices: Sequence[int], name: str) -> Scenario:
    return random_scenario(RecordedSource(choices), name)


def _drop_blocks(best: Callable[[], list[int]], try_out: Callable[[list[int]], bool]) -> bool:
    """Leave out blocks of choices, large ones first, from the end: what follows moves up."""
    changed = False
    size = _LARGEST_BLOCK
    while size:
        at = len(best()) - size
        while at >= 0:
            now = best()
            changed |= try_out(now[:at] + now[at + size :])
            at -= size
        size //= 2
    return changed


def _lower(best: Callable[[], list[int]], try_out: Callable[[list[int]], bool]) -> bool:
    """Set single choices to 0, or else halve them as often as it goes on failing."""
    changed = False
    for at in range(len(best())):
        now = best()
        if at >= len(now) or not now[at]:
            continue
        if try_out([*now[:at], 0, *now[at + 1 :]]):
            changed = True
            continue
        while best()[at] > 1 and try_out([*best()[:at], best()[at] // 2, *best()[at + 1 :]]):
            changed = True
    return changed
