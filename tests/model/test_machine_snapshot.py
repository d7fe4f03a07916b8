"""The tests of tests/kvm/test_snapshot.py on the model,
without what needs interrupt controllers or a TSC frequency, or runs too long for the model.
"""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_snapshot",
    without={
        "test_a_guest_moved_in_mid_loop_ends_as_if_it_had_stayed",
        "test_an_exit_is_completed_by_a_thread_that_runs_a_vcpu_for_the_first_time",
        "test_two_vcpus_move_together",
        "test_a_pending_event_arrives_at_the_destination",
        "test_a_damaged_state_is_taken_or_refused_with_a_reason",
        "test_the_tsc_goes_on_from_where_it_was",
        "test_a_halted_vcpu_stays_halted_and_wakes_there",
        "test_both_vms_must_have_the_same_controllers",
        "test_the_controllers_and_the_timer_move_too",
    },
)
