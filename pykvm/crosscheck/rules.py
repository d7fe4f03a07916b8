"""What may legitimately differ between the architecture and a real KVM, each with its reason.

A machine of the reference model does what the architecture says and marks exactly the pages written.  A KVM
may deviate where the table below says so, and nowhere else.  ``docs/reference/hosts.md`` has the evidence.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Final, NamedTuple

from pykvm.crosscheck.scenario import Surplus
from pykvm.crosscheck.trace import VcpuView
from pykvm.machine import DebugStop, Exit, IoOut, MmioWrite, Registers
from pykvm.machine.emulation import QEMU_TCG, emulator
from pykvm.x86.bits import Cr0, Rflags
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

_LONGEST: Final = 15
"""Bytes of the longest instruction."""
_LONGEST_OUT: Final = 3
"""Bytes of an OUT with one prefix."""


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
        "RFLAGS.RF",
        "SDM vol. 3, 18.3.1.1: set in mid-REP; KVM's emulator also sets it while IN or a load waits",
    ),
    Rule(
        "RFLAGS.AF in a lab on QEMU's TCG",
        "SDM vol. 2, SAL and SHL: shifts leave it undefined; TCG clears it, AMD's processors set it",
    ),
    Rule(
        "RIP behind the last element of REP that left for the host, with the count at 0",
        "hosts.md C.3: KVM's emulator finds out at the next entry that the instruction is complete",
    ),
    Rule(
        "RIP at or behind an OUT that left for the host",
        "hosts.md C.3: AMD's fast path moves RIP at the next entry",
    ),
    Rule(
        "D while the read of a read-modify-write waits for the host (Run with fill does not stop there)",
        "KVM's emulator translates for reading first, a processor for writing at once",
    ),
    Rule(
        "the hidden part of a segment with a null selector",
        "SDM vol. 3, 3.4.2 and 24.4.1: nothing can be reached through it, and its contents are undefined",
    ),
    Rule(
        "the accessed bit of a segment's type and the granularity bit",
        "SDM vol. 3, 24.4.1: SVM and VMX give hidden parts back in forms of their own; limits are in bytes",
    ),
    Rule(
        "DR7 of a DebugStop",
        "KVM's emulator fills in DR6 and the address only (arch/x86/kvm/x86.c, kvm_vcpu_do_singlestep)",
    ),
    Rule("APIC base and CR8", "the model has no local APIC"),
)
"""For the documentation and for people; ``comparable`` applies them."""


def comparable(view: VcpuView) -> dict[str, int]:
    """A vCPU's registers by name, without what IGNORED lists."""
    registers, special = view.registers, view.special
    values = {field.name: int(getattr(registers, field.name)) for field in fields(registers)}
    values["rflags"] &= ~Rflags.RF
    if emulator() == QEMU_TCG:
        values["rflags"] &= ~Rflags.AF
    if special.ss.dpl == 3:
        values["rflags"] &= ~(Rflags.IF | Rflags.IOPL3)
    protected = bool(special.cr0 & Cr0.PE)
    for name in SEGMENTS:
        values |= _segment(name, getattr(special, name), protected=protected)
    for name in ("gdt", "idt"):
        table: DescriptorTable = getattr(special, name)
        values |= {f"{name}.base": table.base, f"{name}.limit": table.limit}
    return values | {name: getattr(special, name) for name in ("cr0", "cr2", "cr3", "cr4", "efer")}


def _segment(name: str, segment: Segment, *, protected: bool) -> dict[str, int]:
    if segment.unusable or (protected and not segment.selector & ~3):
        return {f"{name}.selector": segment.selector}
    kept = ("base", "limit", "selector", "dpl", "db", "s", "l", "avl", "present")
    return {f"{name}.{field}": int(getattr(segment, field)) for field in kept} | {
        f"{name}.type": segment.type & ~1 if segment.s else segment.type
    }


def same_exit(one: Exit | None, other: Exit | None) -> bool:
    """Whether two exits are the same as far as they are compared."""
    if isinstance(one, DebugStop) and isinstance(other, DebugStop):
        return one._replace(dr7=0) == other._replace(dr7=0)
    return one == other


def may_stand(exit: Exit | None, one: Registers, other: Registers) -> bool:
    """Whether the RIPs of a vCPU may differ, its last exit being ``exit``: at what left for the host, or
    behind it.
    """
    distance = abs(one.rip - other.rip)
    if isinstance(exit, IoOut) and 0 < distance <= _LONGEST_OUT:
        return True
    left_for_host = isinstance(exit, MmioWrite | IoOut)
    return left_for_host and not one.rcx & 0xFFFF and 0 < distance <= _LONGEST


def excusing(surplus: tuple[Surplus, ...], slot: int, page: int, step: int) -> Surplus | None:
    """What allows a page (counted within the slot) to be reported in ``step`` though nobody wrote it."""
    for item in surplus:
        if item.slot == slot and item.since <= step and item.first <= page < item.first + item.pages:
            return item
    return None
