"""Which kernel judges, for tests whose expectation changed with a fix in KVM."""

from __future__ import annotations

import platform


def kernel() -> tuple[int, int]:
    """Major and minor number of the running kernel, such as (6, 12)."""
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()))
