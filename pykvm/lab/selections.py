"""Which tests run in a lab: named selections, so that a cell of the matrix takes minutes and not hours.

Python under an emulator is some thirty times slower than outside, and collecting the whole suite takes
minutes of it.  So a selection names files, and the limits fit the emulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pykvm.errors import UsageError

REAL_KVM = "kvm and not slow and not lab"
"""The expression for -m: tests on a real KVM, without long sweeps and without the tests that start labs."""


@dataclass(frozen=True)
class Selection:
    """A choice of tests: files, folders or node ids relative to the checkout, and an expression for -k.

    ``timeout`` bounds a whole lab and ``test_timeout`` a single test, in seconds under QEMU (``limits`` has
    those under Bochs).  There the matrix takes the selection ``under_bochs`` instead.
    """

    name: str
    about: str
    paths: tuple[str, ...]
    keyword: str = ""
    timeout: float = 1200
    test_timeout: float = 240
    under_bochs: str = ""


BOCHS_FACTOR = 4.0
BOCHS_CLOCK = 15.0  # seconds of ours for one of the guest's, measured on a busy machine
START_UP = 180.0  # seconds in which pytest may say nothing while it starts

SELECTIONS: Mapping[str, Selection] = {
    item.name: item
    for item in (
        Selection(
            "smoke",
            "slots, fetched logs, each tracker, each guest mode: does KVM work at all",
            (
                "tests/kvm/test_traps_slots.py",
                "tests/kvm/test_dirty_log_fetch.py",
                "tests/track/test_trackers.py",
                "tests/guest/test_launch.py",
            ),
            # These take as long as all others together.
            keyword="not each_log_comes_out and not forked_child",
            timeout=900,
        ),
        Selection(
            "core",
            "KVM's interface and its traps, dirty logging in each paging mode, each tracker, each guest mode",
            ("tests/kvm", "tests/track", "tests/guest/test_launch.py"),
            keyword="not hundreds_of_machines and not closing_in_any_order_from_any_thread",
            timeout=2400,
            under_bochs="smoke",
        ),
        Selection(
            "all",
            "every test that needs a real KVM",
            ("tests",),
            timeout=4 * 3600,
            test_timeout=600,
            under_bochs="core",
        ),
    )
}


def selection(name: str) -> Selection:
    """The selection of that name; UsageError names the ones there are."""
    if name not in SELECTIONS:
        raise UsageError(f"There is no selection '{name}'; choose one of {', '.join(SELECTIONS)}.")
    return SELECTIONS[name]


def fitting(chosen: Selection, *, slow: bool) -> Selection:
    """What the matrix runs of ``chosen``: a smaller selection under ``slow`` emulators (Bochs)."""
    return SELECTIONS[chosen.under_bochs] if slow and chosen.under_bochs else chosen


@dataclass(frozen=True)
class Limits:
    """In seconds: ``whole`` for a lab, ``silence`` between two signs of life, ``test`` for one test.

    The first two are of our clock, the last one is of the guest's.
    """

    whole: float
    test: float
    silence: float


def limits(chosen: Selection, *, slow: bool, test: float | None = None) -> Limits:
    """The limits that fit the emulator; ``test`` instead of the selection's own."""
    if slow:
        # Bochs counts instructions for its clock, so a minute of the guest's is a quarter of an hour of ours.
        single = test or chosen.test_timeout / BOCHS_FACTOR
        return Limits(chosen.timeout * BOCHS_FACTOR, single, BOCHS_CLOCK * single + START_UP)
    single = test or chosen.test_timeout
    return Limits(chosen.timeout, single, 2 * single + START_UP)


def both(one: str, other: str) -> str:
    """An expression for -k that holds where both do; empty ones hold everywhere."""
    return f"({one}) and ({other})" if one and other else one or other
