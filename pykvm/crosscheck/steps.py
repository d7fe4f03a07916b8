"""The steps of a scenario: what is done to a machine, one after the other, as plain values.

Each step is one call of the machine's interface, so that a difference between two machines can be laid at
the door of one call.  In JSON a step is an object whose member ``step`` names its kind.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

from pykvm.crosscheck.snippets import SNIPPETS
from pykvm.machine import Registers, SlotFlags
from pykvm.machine.codec import (
    Decoder,
    boolean,
    choice,
    encode,
    octets,
    optional,
    record,
    sequence,
    tagged,
    unsigned,
)
from pykvm.x86.registers import GENERAL

MAX_VCPUS: Final = 16
MAX_BYTES: Final = 1 << 22
"""Bytes that one member of a scenario may hold."""


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """A slot to create: ``size`` bytes of memory number ``memory`` from ``offset`` on, seen at ``gpa``."""

    slot: int
    gpa: int
    memory: int
    offset: int
    size: int
    flags: SlotFlags = SlotFlags.NONE


@dataclass(frozen=True, slots=True)
class Run:
    """Run a vCPU to its ``exits``-th exit, or to an earlier one after which it cannot go on by itself.

    ``fill``: the byte of which answers to IoIn and MmioRead consist, after which the vCPU runs on; None: they
    end the step.
    """

    kind: ClassVar[str] = "run"
    vcpu: int = 0
    exits: int = 1
    fill: int | None = None


@dataclass(frozen=True, slots=True)
class SingleStep:
    """Run a vCPU for that many instructions (KVM_SET_GUEST_DEBUG), or to an exit that comes earlier.

    ``fill``: as of Run; port and MMIO reads then do not end the step.
    """

    kind: ClassVar[str] = "single_step"
    vcpu: int = 0
    instructions: int = 1
    fill: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the vCPU's last exit, an IoIn or MmioRead, with ``data``."""

    kind: ClassVar[str] = "answer"
    vcpu: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SetRegisters:
    """Give a vCPU these general-purpose registers, RIP and RFLAGS."""

    kind: ClassVar[str] = "set_registers"
    vcpu: int
    registers: Registers


@dataclass(frozen=True, slots=True)
class SetControls:
    """Give a vCPU these control registers (KVM_SET_SREGS); None leaves one as it is."""

    kind: ClassVar[str] = "set_controls"
    vcpu: int = 0
    cr0: int | None = None
    cr3: int | None = None
    cr4: int | None = None
    efer: int | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """Run one of the guest's snippets (pykvm.crosscheck.snippets) at ``cpl``, up to its OUT.

    RDI is ``address``, RAX ``value``, RCX ``count``, RSI ``second``.  It ends with the OUT, of the snippet or
    of a handler; stores to MMIO pass on the way, loads from there get zeros.
    """

    kind: ClassVar[str] = "access"
    snippet: str
    address: int
    value: int = 0
    count: int = 0
    second: int = 0
    cpl: int = 3
    vcpu: int = 0


@dataclass(frozen=True, slots=True)
class Translate:
    """KVM_TRANSLATE of a linear address by a vCPU's tables."""

    kind: ClassVar[str] = "translate"
    linear: int
    vcpu: int = 0


@dataclass(frozen=True, slots=True)
class Logging:
    """Turn a slot's LOG_DIRTY_PAGES on or off."""

    kind: ClassVar[str] = "logging"
    slot: int
    on: bool


@dataclass(frozen=True, slots=True)
class Collect:
    """KVM_GET_DIRTY_LOG of a slot."""

    kind: ClassVar[str] = "collect"
    slot: int


@dataclass(frozen=True, slots=True)
class Clear:
    """KVM_CLEAR_DIRTY_LOG of ``pages`` pages from ``first_page`` on; ``marks`` is the bitmap, None: all."""

    kind: ClassVar[str] = "clear"
    slot: int
    first_page: int
    pages: int
    marks: bytes | None = None


@dataclass(frozen=True, slots=True)
class Harvest:
    """Harvest the rings of all vCPUs and reset them."""

    kind: ClassVar[str] = "harvest"


@dataclass(frozen=True, slots=True)
class HostWrite:
    """The host writes ``data`` into memory number ``memory`` at ``offset``: no log sees that."""

    kind: ClassVar[str] = "host_write"
    memory: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class AddSlot:
    """Create a slot."""

    kind: ClassVar[str] = "add_slot"
    plan: SlotPlan


@dataclass(frozen=True, slots=True)
class MoveSlot:
    """Show a slot at another guest-physical address."""

    kind: ClassVar[str] = "move_slot"
    slot: int
    gpa: int


@dataclass(frozen=True, slots=True)
class DeleteSlot:
    """Delete a slot."""

    kind: ClassVar[str] = "delete_slot"
    slot: int


@dataclass(frozen=True, slots=True)
class ReflagSlot:
    """Set a slot's flags to exactly these; KVM refuses to change READONLY."""

    kind: ClassVar[str] = "reflag_slot"
    slot: int
    flags: SlotFlags


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """Read the statistics of the machine and of its vCPUs."""

    kind: ClassVar[str] = "statistics"


@dataclass(frozen=True, slots=True)
class SaveLoad:
    """Save the state, through JSON, and load it: into a ``fresh`` machine with the same slots, or the same
    one.  The logs of the old machine go with it."""

    kind: ClassVar[str] = "save_load"
    fresh: bool = False


Step = (
    Run
    | SingleStep
    | Answer
    | SetRegisters
    | SetControls
    | Access
    | Translate
    | Logging
    | Collect
    | Clear
    | Harvest
    | HostWrite
    | AddSlot
    | MoveSlot
    | DeleteSlot
    | ReflagSlot
    | ReadStatistics
    | SaveLoad
)


# --- JSON ----------------------------------------------------------------------------------------


def step_json(step: Step) -> dict[str, Any]:
    """The step with its kind, as JSON values."""
    result: dict[str, Any] = {"step": step.kind} | encode(step)
    return result


def slot_flags(value: object, path: str) -> SlotFlags:
    """LOG_DIRTY_PAGES (1) and READONLY (2)."""
    return SlotFlags(unsigned(2)(value, path))


_U32, _U64 = unsigned(32), unsigned(64)
_VCPU = unsigned(8, MAX_VCPUS - 1)
_SLOT = unsigned(16)
MEMORY_INDEX: Final = unsigned(8)
BYTES: Final = octets(1, MAX_BYTES)
REGISTERS: Final = record(Registers, dict.fromkeys((*GENERAL, "rip", "rflags"), _U64))
SLOT_PLAN: Final[Decoder[SlotPlan]] = record(
    SlotPlan,
    {"slot": _SLOT, "gpa": _U64, "memory": MEMORY_INDEX, "offset": _U64, "size": _U64, "flags": slot_flags},
)
_MEMBERS: Final[dict[Any, dict[str, Decoder[Any]]]] = {
    Run: {"vcpu": _VCPU, "exits": unsigned(16), "fill": optional(unsigned(8))},
    SingleStep: {"vcpu": _VCPU, "instructions": unsigned(16), "fill": optional(unsigned(8))},
    Answer: {"vcpu": _VCPU, "data": octets(0, 1 << 16)},
    SetRegisters: {"vcpu": _VCPU, "registers": REGISTERS},
    SetControls: {"vcpu": _VCPU} | dict.fromkeys(("cr0", "cr3", "cr4", "efer"), optional(_U64)),
    Access: {"snippet": choice(*SNIPPETS), "cpl": unsigned(2), "vcpu": _VCPU}
    | dict.fromkeys(("address", "value", "count", "second"), _U64),
    Translate: {"linear": _U64, "vcpu": _VCPU},
    Logging: {"slot": _SLOT, "on": boolean},
    Collect: {"slot": _SLOT},
    Clear: {"slot": _SLOT, "first_page": _U64, "pages": _U32, "marks": optional(BYTES)},
    Harvest: {},
    HostWrite: {"memory": MEMORY_INDEX, "offset": _U64, "data": BYTES},
    AddSlot: {"plan": SLOT_PLAN},
    MoveSlot: {"slot": _SLOT, "gpa": _U64},
    DeleteSlot: {"slot": _SLOT},
    ReflagSlot: {"slot": _SLOT, "flags": slot_flags},
    ReadStatistics: {},
    SaveLoad: {"fresh": boolean},
}
KINDS: Final = tuple(kind.kind for kind in _MEMBERS)
"""The names of all kinds of steps."""
STEP: Final[Decoder[Step]] = tagged(
    "step", {kind.kind: record(kind, members) for kind, members in _MEMBERS.items()}
)
STEPS: Final = sequence(STEP, 10_000)


_HEXADECIMAL: Final = frozenset(
    {"gpa", "offset", "address", "value", "second", "linear", "cr0", "cr3", "cr4", "efer"}
)


def describe(step: Step) -> str:
    """The step in a line, for people: its kind and its members."""
    if isinstance(step, Access):
        return _describe_access(step)
    parts = []
    for field in fields(step):
        value = getattr(step, field.name)
        if isinstance(value, bytes):
            value = value.hex() if len(value) <= 16 else f"{len(value)} bytes"
        elif isinstance(value, Registers):
            value = f"rip={value.rip:#x}"
        elif field.name in _HEXADECIMAL and value is not None:
            value = f"{value:#x}"
        parts.append(f"{field.name}={value}")
    return " ".join([step.kind, *parts])


def _describe_access(step: Access) -> str:
    snippet = SNIPPETS[step.snippet]
    text = f"access {step.snippet} at {step.address:#x}"
    text += f", second address {step.second:#x}" if snippet.reads_second else ""
    text += f", value {step.value:#x}" if step.value else ""
    text += f", count {step.count:#x}" if step.count else ""
    return f"{text}, CPL {step.cpl}" + (f", vCPU {step.vcpu}" if step.vcpu else "")
