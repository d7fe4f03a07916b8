"""Memslots of a machine with a host profile: KVM's own tests, on the model of the host."""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_traps_slots",
    profiled=True,
    without={
        "test_a_wrong_new_slot_is_refused",
        "test_an_inaccessible_host_address_is_accepted_and_fails_when_used",
        "test_a_collector_does_not_meet_a_slot_that_only_the_kernel_knows",
        "test_a_live_slot_cannot_change_size_memory_or_readonly",
        "test_the_first_matching_reason_wins",
        "test_the_kernel_never_sees_numbers_that_do_not_fit",
        "test_an_address_space_that_does_not_exist_is_refused",
    },
)
