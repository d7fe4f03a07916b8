"""The profile that the MMU of the model follows: see pykvm.profiles."""

from pykvm.profiles import (
    DEVELOPMENT_HOST,
    ERAS,
    KINDS,
    Execution,
    Paging,
    Profile,
    WriteTrackAllocation,
    profile,
)

__all__ = [
    "DEVELOPMENT_HOST",
    "ERAS",
    "KINDS",
    "Execution",
    "Paging",
    "Profile",
    "WriteTrackAllocation",
    "profile",
]
