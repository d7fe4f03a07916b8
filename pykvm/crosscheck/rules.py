"""What may legitimately differ between the architecture and a real KVM, each with its reason.

A machine of the reference model does what the architecture says and marks exactly the pages written.  A KVM
may deviate where the table below says so, and nowhere else.  ``docs/reference/hosts.md`` has the evidence.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Final, NamedTuple

from pykvm.crosscheck.scenario import Surplus
from pykvm.crosscheck.trace import VcpuView
from pykvm.x86.bits import Rflags
from pykvm.x86.registers import SEGMENTS, DescriptorTable, Segment

READ_OF_DIRTY_ENTRY: Final = (
    "hosts.md B.0: a read through a page-table entry whose D is set makes a writable mapping, and that marks "
    "the page"
)
NEW_MAPPINGS: Final = (
    "hosts.md B.0 and D.1: a slot that goes or moves takes all mappings along, and a page that is read again "
    "through an entry whose D is set is marked"
)
CROSSING_STORE: Final = (
    "hosts.md E: a store that crosses into a page where it faults marks the first page, although nothing was "
    "written"
)
WORKLOAD_ENTRIES: Final = (
    "hosts.md B.0 and B.4: a workload's large pages have D set, so that pages which are only read may be "
    "marked"
)


class Rule(NamedTuple):
    """One thing that is not compared: which registers, and why."""

    what: str
    why: str


IGNORED: Final = (
    Rule(
        "RFLAGS.IF and IOPL at CPL 3",
        "hosts.md B.10: kvm_pvm runs user code with IF 1 and IOPL 0 and gives both back so",
    ),
    Rule(
        "an unusable segment but for its selector",
        "SDM vol. 3, 24.4.1: attributes, base and limit of a null selector's hidden part are undefined",
    ),
    Rule(
        "the accessed bit of a segment's type and the granularity bit",
        "SDM vol. 3, 24.4.1: SVM and VMX give hidden parts back in forms of their own; limits are in bytes",
    ),
    Rule("APIC base and CR8", "the model has no local APIC"),
)
"""For the documentation and for people; ``comparable`` applies them."""


def comparable(view: VcpuView) -> dict[str, int]:
    """A vCPU's registers by name, without what IGNORED lists."""
    registers, special = view.registers, view.special
    values = {field.name: int(getattr(registers, field.name)) for field in fields(registers)}
    if special.ss.dpl == 3:
        values["rflags"] &= ~(Rflags.IF | Rflags.IOPL3)
    for name in SEGMENTS:
        values |= _segment(name, getattr(special, name))
    for name in ("gdt", "idt"):
        table: DescriptorTable = getattr(special, name)
        values |= {f"{name}.base": table.base, f"{name}.limit": table.limit}
    return values | {name: getattr(special, name) for name in ("cr0", "cr2", "cr3", "cr4", "efer")}


def _segment(name: str, segment: Segment) -> dict[str, int]:
    if segment.unusable:
        return {f"{name}.selector": segment.selector}
    kept = ("base", "limit", "selector", "dpl", "db", "s", "l", "avl", "present")
    return {f"{name}.{field}": int(getattr(segment, field)) for field in kept} | {
        f"{name}.type": segment.type & ~1 if segment.s else segment.type
    }


def excusing(surplus: tuple[Surplus, ...], slot: int, page: int, step: int) -> Surplus | None:
    """What allows a page (counted within the slot) to be reported in ``step`` though nobody wrote it."""
    for item in surplus:
        if item.slot == slot and item.since <= step and item.first <= page < item.first + item.pages:
            return item
    return None
