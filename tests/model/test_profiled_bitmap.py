"""Dirty bitmaps of a machine with a host profile: KVM's own tests, on the model of the host."""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_traps_bitmap",
    profiled=True,
    without={
        "test_an_address_space_too_many",
        "test_in_ring_mode_every_bitmap_call_is_refused_before_its_arguments",
        "test_an_impossible_slot_id_is_not_the_same_as_an_absent_one",
        "test_clear_ranges",
        "test_manual_protection_knows_three_values",
        "test_a_fault_on_the_buffer_loses_the_bits",
        "test_manual_protection_may_change_at_any_time",
        "test_a_fault_on_the_buffer_keeps_the_bits_with_manual_protection",
        "test_get_writes_whole_words_and_no_more",
        "test_a_slot_without_logging_has_no_log",
    },
)
