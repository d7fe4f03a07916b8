"""Debugging of a machine with a host profile: KVM's own tests, on the model of the host."""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_debugging",
    profiled=True,
    without={
        "test_blocked_interrupts_wait",
        "test_signal_mask",
        "test_signal_mask_refusals",
        "test_shared_registers_are_those_of_the_exit",
        "test_a_put_register_reaches_the_guest",
        "test_a_put_value_that_kvm_refuses_fails_the_run",
        "test_put_events",
        "test_sharing_refusals",
    },
)
