"""Lifetimes of a machine with a host profile: KVM's own tests, on the model of the host."""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_lifetimes",
    profiled=True,
    without={
        "test_two_slots_of_two_machines_share_a_memory",
        "test_everything_of_a_closed_machine_raises",
        "test_a_slot_keeps_its_memory_alive",
        "test_a_failed_slot_does_not_pin_its_memory",
        "test_a_slot_is_not_deleted_under_a_log_being_fetched",
        "test_machines_whose_creation_fails_leak_nothing",
        "test_memory_stays_while_a_thread_is_on_its_way_into_the_guest",
    },
)
