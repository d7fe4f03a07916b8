"""Dirty rings of a machine with a host profile: KVM's own tests, on the model of the host."""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_traps_ring",
    profiled=True,
    without={
        "test_ring_mappings_that_the_kernel_refuses",
        "test_without_rings_there_is_nothing_to_reset",
        "test_a_ring_with_more_entries_than_its_soft_limit_is_no_overflow",
        "test_entries_that_denote_no_page_are_dropped_and_counted",
        "test_the_write_that_filled_the_ring_may_not_have_happened_yet",
        "test_ring_sizes_that_are_no_power_of_two_or_too_small",
        "test_the_kernel_re_reads_slot_and_offset_at_the_reset",
        "test_full_rings_stop_the_vcpu_at_the_soft_limit",
        "test_a_full_ring_stays_full_until_the_reset",
        "test_x86_has_no_ring_with_bitmap",
        "test_a_ring_larger_than_the_limit",
        "test_the_ring_is_not_part_of_the_vcpu_mapping",
        "test_only_bit_1_means_harvested",
        "test_reset_keeps_slot_and_offset_and_counts_over_all_vcpus",
        "test_reset_stops_at_the_first_entry_that_was_not_harvested",
        "test_a_write_between_harvest_and_reset_is_covered_by_the_entry_before_it",
    },
)
