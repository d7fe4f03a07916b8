"""The tests of tests/kvm/test_exits.py on the model,
without what needs an address of the host.
"""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_exits",
    without={
        "test_inaccessible_host_memory_is_an_error_or_mmio",
    },
)
