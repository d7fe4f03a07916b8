"""What running a scenario showed, step by step, as plain values that two machines can be compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pykvm.crosscheck.scenario import Scenario
from pykvm.crosscheck.steps import SlotPlan, Step
from pykvm.machine import DirtyPages, Exit, Registers, SpecialRegisters

Page = tuple[int, int]
"""Number of a memory and of a page within it."""


@dataclass(frozen=True, slots=True)
class VcpuView:
    """A vCPU's registers at the end of a step."""

    registers: Registers
    special: SpecialRegisters


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What one step did.

    ``refused``: class of the error that the machine raised, or empty.  ``impossible``: why this machine
    cannot do the step at all, or empty; nothing was done then.  ``overdue``: the time limit ended it.
    ``dirty``: what Collect or Harvest reported.  ``ring``: the entries harvested during the step, each
    (vCPU, slot, page offset), also those taken because a ring was full.  ``changed``: contents of the pages
    that differ from before the step.  ``slots``: the live slots after the step.

    Only where counters are watched: ``pushed`` are the ring entries that the vCPUs pushed during the step,
    and ``counters`` the deterministic ones after it.
    """

    number: int
    step: Step
    exits: tuple[Exit, ...]
    refused: str
    message: str
    impossible: str
    overdue: bool
    dirty: DirtyPages | None
    ring: tuple[tuple[int, int, int], ...]
    vcpus: tuple[VcpuView, ...]
    changed: Mapping[Page, bytes]
    slots: tuple[SlotPlan, ...]
    statistics: Mapping[str, int] = field(default_factory=dict)
    pushed: tuple[tuple[int, int, int], ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    translated: int | None = None
    """What Translate found."""

    @property
    def ends(self) -> bool:
        """Whether nothing after this step can be compared: it was not possible here, or out of time."""
        return bool(self.impossible) or self.overdue


@dataclass(frozen=True, slots=True)
class Trace:
    """A scenario's run on one machine.

    ``start``: the live slots before the first step.  ``marks_reads``: whether this machine's log also names
    pages that were only read (pykvm.crosscheck.abilities).  ``copies_roots``: it is the model of a host
    whose vCPUs have each their own copy of a root.  Only where counters are watched: ``counters`` are those
    before the first step, ``final`` the memories after the last one.
    """

    backend: str
    scenario: Scenario
    start: tuple[SlotPlan, ...]
    steps: tuple[StepTrace, ...]
    marks_reads: bool = False
    copies_roots: bool = False
    counters: Mapping[str, int] = field(default_factory=dict)
    final: tuple[bytes, ...] = ()
