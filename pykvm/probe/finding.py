"""One behaviour of a host: its value, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class How(Enum):
    """By what a behaviour was found, the most direct first."""

    PROBE = "probe"
    """A guest showed it."""
    CAPABILITY = "capability"
    """KVM says so when asked (KVM_CHECK_EXTENSION, KVM_GET_SUPPORTED_CPUID, the list of statistics)."""
    PARAMETER = "parameter"
    """A parameter of a KVM module says so."""
    BUILD = "build"
    """How the kernel was built: a symbol it has, or what it allocates."""
    ASSUMED = "assumed"
    """The host cannot show it: taken from the known profile that is nearest in everything else."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A behaviour (a field of Profile), its value and how it was found; ``evidence`` in a few words."""

    behaviour: str
    value: Any
    how: How
    evidence: str
