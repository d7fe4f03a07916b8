"""Interrupts of a machine with a host profile: KVM's own tests, on the model of the host."""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_interrupts",
    profiled=True,
    without={
        "test_a_pit_needs_the_interrupt_controllers",
        "test_pit_creation",
        "test_what_needs_controllers_says_so",
        "test_a_processor_that_waits_for_init_is_started",
        "test_lapic_after_reset_and_round_trip",
        "test_pit_round_trip",
        "test_creation_after_a_vcpu",
        "test_lapic_timer",
        "test_msi_is_delivered",
        "test_irqfd_raises_an_msi",
        "test_creation_has_its_order",
        "test_a_gsi_without_a_route_goes_nowhere",
        "test_irq_line_through_the_ioapic",
        "test_a_level_triggered_irqfd_is_resampled_at_the_end_of_interrupt",
        "test_routes_that_do_not_exist",
        "test_an_msi_that_nobody_takes",
        "test_controllers_after_reset",
        "test_irqfd_wants_an_eventfd",
    },
)
