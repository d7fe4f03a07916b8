"""Making a workload of a machine that arrived; the one place here that knows pykvm.guest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pykvm.errors import UsageError
from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.machine import Machine
from pykvm.memory import GuestMemory

_KINDS = {"int": (int,), "str": (str,), "int | None": (int, type(None))}


def parse_config(description: Mapping[str, Any]) -> WorkloadConfig:
    """A workload's configuration from a source that is not trusted.  Raises UsageError."""
    kinds = {field.name: _KINDS[str(field.type)] for field in fields(WorkloadConfig)}
    if set(description) != set(kinds):
        odd = ", ".join(sorted(set(description) ^ set(kinds)))
        raise UsageError(f"The workload's description has other members than this side knows: {odd[:200]}.")
    for name, value in description.items():
        if type(value) not in kinds[name]:
            raise UsageError(f"The workload's {name} is of the wrong type.")
    return WorkloadConfig(**description)


def adopt_workload(machine: Machine, memory: GuestMemory, description: Mapping[str, Any]) -> WorkloadGuest:
    """The default for ``receive``: host parts for a workload of pykvm.  Raises UsageError."""
    return WorkloadGuest.adopt(machine, memory, parse_config(description))
