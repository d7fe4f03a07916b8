"""Kicks of a machine with a host profile: KVM's own tests, on the model of the host."""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_traps_kick",
    profiled=True,
    without={
        "test_kick_and_wait_gives_up_in_time",
        "test_a_signal_at_any_moment_reaches_its_python_handler",
        "test_ctrl_c_ends_a_run_of_the_main_thread",
    },
)
