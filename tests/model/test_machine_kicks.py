"""The tests of tests/kvm/test_traps_kick.py on the model,
without what puts something else in KVM's place, or a signal amid its entry.
"""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_traps_kick",
    without={
        "test_kick_and_wait_gives_up_in_time",
        "test_a_signal_at_any_moment_reaches_its_python_handler",
        "test_ctrl_c_ends_a_run_of_the_main_thread",
    },
)
