"""A scenario: a small machine and what is done to it, as plain data that goes through JSON.

Whatever implements ``pykvm.machine`` can run one (``pykvm.crosscheck.run``), so that two machines can be
compared step by step.  ``Scenario.from_json`` is strict: anything malformed raises one UsageError that
names the member.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from pykvm.crosscheck.steps import (
    BYTES,
    MAX_VCPUS,
    MEMORY_INDEX,
    REGISTERS,
    SLOT_PLAN,
    STEPS,
    Access,
    AddSlot,
    HostWrite,
    SlotPlan,
    Step,
    step_json,
)
from pykvm.errors import UsageError
from pykvm.guest import catalog
from pykvm.guest.modes import MODES
from pykvm.guest.pagetables import USER
from pykvm.machine import Registers
from pykvm.machine.codec import Decoder, choice, encode, optional, record, sequence, tagged, text, unsigned
from pykvm.memory import PAGE_SIZE

KIND: Final = "scenario"
"""What the member ``kind`` of a saved scenario says."""
TRACKERS: Final = ("none", "bitmap", "manual", "manual-initially-set", "ring")
MAX_MEMORY: Final = 1 << 28
"""Bytes that the memories of a scenario may have together: they are looked at after every step."""
TABLE: Final = 0x27
"""Flags of an entry that points to a table: present, writable, user, accessed."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Bytes that lie in memory number ``memory`` at ``offset`` before the guest starts."""

    memory: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Mapping:
    """``size`` bytes at linear address ``linear``, mapped to ``physical`` (see PageTables.map)."""

    linear: int
    physical: int
    size: int
    page_size: int = PAGE_SIZE
    flags: int = int(USER)
    table_flags: int = TABLE


@dataclass(frozen=True, slots=True)
class Controls:
    """Control registers to start with."""

    cr0: int
    cr3: int
    cr4: int
    efer: int


@dataclass(frozen=True, slots=True)
class VcpuPlan:
    """A vCPU's start: ``mode`` is a key of ``pykvm.guest.modes.MODES``.

    In real mode RIP is the linear address of the first instruction, below 1 MiB.  ``controls`` are the
    control registers instead of the mode's; the page tables are those that the contents hold.
    """

    mode: str
    cpl: int
    registers: Registers
    controls: Controls | None = None


@dataclass(frozen=True, slots=True)
class TablePlan:
    """Where descriptor and page tables go: pages of memory 0, which the guest sees from gpa 0 on.

    ``handlers``: the page for one handler per exception, or None for an empty IDT.  A handler writes AL to
    port 0x40 + vector and halts.
    """

    start: int
    pages: int
    handlers: int | None = None


@dataclass(frozen=True, slots=True)
class CodeGuest:
    """A guest from bytes.  ``image`` names a mode test of the catalogue, loaded at its usual address.

    ``snippets``: the page of memory 0 for the snippets of ``Access`` steps, at which the guest's linear
    addresses show it, too.
    """

    memories: tuple[int, ...]
    slots: tuple[SlotPlan, ...]
    contents: tuple[Contents, ...]
    vcpus: tuple[VcpuPlan, ...]
    tables: TablePlan | None = None
    mappings: tuple[Mapping, ...] = ()
    image: str | None = None
    snippets: int | None = None


@dataclass(frozen=True, slots=True)
class WorkloadPlan:
    """A workload of the catalogue: memory 0 with ``memory`` bytes, slot 0 (and 1 above 3 GiB)."""

    workload: str
    memory: int
    vcpus: int
    cpl: int
    seed: int
    passes: int


@dataclass(frozen=True, slots=True)
class Surplus:
    """Pages that KVM may report although nobody wrote them, from step ``since`` on, and by which ``rule``.

    ``pages`` pages of ``slot`` from its page ``first`` on.  A page that was written must be reported
    nevertheless.
    """

    slot: int
    first: int
    pages: int
    since: int
    rule: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """A machine and what is done to it.

    ``tracker`` (one of TRACKERS) is how the machine was prepared; ``ring_entries`` counts for ``ring``.
    """

    name: str
    guest: CodeGuest | WorkloadPlan
    steps: tuple[Step, ...]
    tracker: str = "bitmap"
    ring_entries: int = 1024
    surplus: tuple[Surplus, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The scenario as JSON values, ``kind`` being ``scenario``."""
        kind = "workload" if isinstance(self.guest, WorkloadPlan) else "code"
        plain: dict[str, Any] = encode(replace(self, steps=()))
        plain["guest"] = {"guest": kind} | plain["guest"]
        plain["steps"] = [step_json(step) for step in self.steps]
        return {"kind": KIND} | plain

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The inverse.  Raises UsageError, naming the member, for anything that cannot be a scenario."""
        scenario = cls(**_SCENARIO(data, "scenario"))
        check(scenario)
        return scenario

    def save(self, path: Path) -> None:
        """Write the scenario into a file.  Raises OSError."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")


def is_mmu_scenario(scenario: Scenario) -> bool:
    """Whether it is one for KVM's MMU: its guest has page tables of its own."""
    guest = scenario.guest
    return isinstance(guest, CodeGuest) and guest.vcpus[0].controls is not None


# --- what the members may hold -------------------------------------------------------------------

_U16, _U32, _U64 = unsigned(16), unsigned(32), unsigned(64)
_CPL: Final = unsigned(2)
_CONTROLS: Final = record(Controls, dict.fromkeys(("cr0", "cr3", "cr4", "efer"), _U64))
_CODE: Final[Decoder[CodeGuest | WorkloadPlan]] = record(
    CodeGuest,
    {
        "memories": sequence(unsigned(64, MAX_MEMORY), 16, 1),
        "slots": sequence(SLOT_PLAN, 256),
        "contents": sequence(record(Contents, {"memory": MEMORY_INDEX, "offset": _U64, "data": BYTES}), 1024),
        "vcpus": sequence(
            record(
                VcpuPlan,
                {
                    "mode": choice(*MODES),
                    "cpl": _CPL,
                    "registers": REGISTERS,
                    "controls": optional(_CONTROLS),
                },
            ),
            MAX_VCPUS,
            1,
        ),
        "tables": optional(
            record(TablePlan, {"start": _U64, "pages": unsigned(16), "handlers": optional(_U64)})
        ),
        "mappings": sequence(
            record(
                Mapping,
                dict.fromkeys(("linear", "physical", "size", "page_size", "flags", "table_flags"), _U64),
            ),
            1024,
        ),
        "image": optional(choice(*MODES)),
        "snippets": optional(_U64),
    },
)
_WORKLOAD: Final[Decoder[CodeGuest | WorkloadPlan]] = record(
    WorkloadPlan,
    {
        "workload": text(40),
        "memory": unsigned(64, MAX_MEMORY),
        "vcpus": unsigned(8, MAX_VCPUS),
        "cpl": _CPL,
        "seed": unsigned(63),
        "passes": _U32,
    },
)
_SURPLUS: Final = record(
    Surplus, {"slot": _U16, "first": _U64, "pages": _U64, "since": _U32, "rule": text(400)}
)
_SCENARIO: Final = record(
    lambda **members: {name: value for name, value in members.items() if name != "kind"},
    {
        "kind": choice(KIND),
        "name": text(400),
        "guest": tagged("guest", {"code": _CODE, "workload": _WORKLOAD}),
        "steps": STEPS,
        "tracker": choice(*TRACKERS),
        "ring_entries": _U32,
        "surplus": sequence(_SURPLUS, 1024),
    },
)


# --- whether the parts fit each other ------------------------------------------------------------


def check(scenario: Scenario) -> None:
    """Raise UsageError for a member that names what does not exist or lies outside."""
    guest = scenario.guest
    if isinstance(guest, WorkloadPlan):
        if guest.workload not in catalog.workloads():
            raise UsageError(
                f"scenario.guest.workload must be one of {', '.join(catalog.workloads())}, "
                f"not {guest.workload!r}."
            )
        sizes: tuple[int, ...] = (guest.memory,)
        slots, vcpus = {0, 1}, guest.vcpus
    else:
        sizes = guest.memories
        slots, vcpus = {plan.slot for plan in guest.slots}, len(guest.vcpus)
        _check_code(guest)
    snippets = isinstance(guest, CodeGuest) and guest.snippets is not None
    for number, step in enumerate(scenario.steps):
        path = f"scenario.steps[{number}]"
        if isinstance(step, AddSlot):
            _check_slot(step.plan, sizes, f"{path}.plan")
            slots.add(step.plan.slot)
        elif isinstance(step, HostWrite):
            _check_range(sizes, step.memory, step.offset, len(step.data), path)
        elif getattr(step, "slot", None) not in {None, *slots}:
            raise UsageError(f"{path}.slot names a slot that no earlier step created.")
        if isinstance(step, Access) and not snippets:
            raise UsageError(f"{path} needs a guest with a page for snippets (scenario.guest.snippets).")
        if not 0 <= getattr(step, "vcpu", 0) < vcpus:
            raise UsageError(f"{path}.vcpu must be below {vcpus}, the number of vCPUs.")


def _check_code(guest: CodeGuest) -> None:
    for number, size in enumerate(guest.memories):
        if size % PAGE_SIZE or not size:
            raise UsageError(f"scenario.guest.memories[{number}] must be a positive multiple of 4096.")
    if sum(guest.memories) > MAX_MEMORY:
        raise UsageError(f"scenario.guest.memories must not exceed {MAX_MEMORY:#x} bytes together.")
    for number, plan in enumerate(guest.slots):
        _check_slot(plan, guest.memories, f"scenario.guest.slots[{number}]")
    for number, part in enumerate(guest.contents):
        path = f"scenario.guest.contents[{number}]"
        _check_range(guest.memories, part.memory, part.offset, len(part.data), path)
    if guest.tables is not None:
        path = "scenario.guest.tables"
        if guest.tables.start % PAGE_SIZE:
            raise UsageError(f"{path}.start must be a multiple of 4096.")
        _check_range(guest.memories, 0, guest.tables.start, guest.tables.pages * PAGE_SIZE, path)
        if guest.tables.handlers is not None:
            _check_range(guest.memories, 0, guest.tables.handlers, PAGE_SIZE, f"{path}.handlers")
    elif any(vcpu.mode != "real" for vcpu in guest.vcpus):
        raise UsageError("scenario.guest.tables may be null only if all vCPUs are in real mode.")
    if len({vcpu.mode for vcpu in guest.vcpus}) > 1:
        raise UsageError("scenario.guest.vcpus must all have the same mode.")
    if guest.snippets is not None:
        if guest.snippets % PAGE_SIZE or guest.vcpus[0].mode != "long":
            raise UsageError("scenario.guest.snippets must be a multiple of 4096, and the mode long.")
        _check_range(guest.memories, 0, guest.snippets, PAGE_SIZE, "scenario.guest.snippets")
    own = {vcpu.controls is not None for vcpu in guest.vcpus}
    if True in own and (False in own or guest.mappings):
        raise UsageError(
            "scenario.guest.vcpus[].controls must be given for all vCPUs or none, and then without mappings."
        )


def _check_slot(plan: SlotPlan, sizes: tuple[int, ...], path: str) -> None:
    _check_range(sizes, plan.memory, plan.offset, plan.size, path)


def _check_range(sizes: tuple[int, ...], memory: int, offset: int, length: int, path: str) -> None:
    if memory >= len(sizes):
        raise UsageError(f"{path}.memory must be below {len(sizes)}, the number of memories.")
    if offset + length > sizes[memory]:
        raise UsageError(f"{path} reaches beyond memory {memory}, which has {sizes[memory]:#x} bytes.")
