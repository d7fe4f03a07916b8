"""Rings that overflow of a machine with a host profile: KVM's own tests, on the model of the host."""

from __future__ import annotations

from tests.backends import borrow

borrow(globals(), "tests.kvm.test_traps_overflow", profiled=True)
