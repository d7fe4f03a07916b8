"""The tests of tests/kvm/test_traps_exits.py on the model,
without what goes to the ioctls directly, or is about how KVM emulates.
"""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_traps_exits",
    without={
        "test_signal_mask_needs_eight_bytes",
        "test_statistics_stay_readable_in_a_kept_descriptor",
        "test_an_unknown_ioctl_says_so",
        "test_emulated_code_shows_in_the_counters",
    },
)
