"""What KVM hosts do about memory: behaviours by name, and the hosts whose behaviours are known."""

from pykvm.profiles.known import DEVELOPMENT_HOST, ERAS, KINDS, profile
from pykvm.profiles.profile import Execution, Paging, Profile, WriteTrackAllocation

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
