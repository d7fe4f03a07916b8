"""Exits of a machine with a host profile: KVM's own tests, on the model of the host."""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_exits",
    profiled=True,
    without={
        "test_inaccessible_host_memory_is_an_error_or_mmio",
    },
)
