"""The tests of tests/kvm/test_vcpu_state.py on the model,
without what the model has no part of (controllers, quirks, TSC scaling, feature MSRs).
"""

from __future__ import annotations

from tests.backends import borrow

borrow(
    globals(),
    "tests.kvm.test_vcpu_state",
    without={
        "test_intels_real_mode_pages",
        "test_every_listed_msr_can_be_read_or_is_left_out",
        "test_a_pause_notice_needs_kvmclock",
        "test_quirks",
        "test_enable_cap_refuses_what_cannot_be_switched",
        "test_tsc_frequency",
        "test_feature_msrs",
        "test_shadow_pages",
        "test_mp_state",
        "test_xsave_reaches_the_guest",
        "test_what_the_host_supports",
        "test_quirk_lint0",
        "test_kvmclock_adds_the_real_time_that_passed",
    },
)
