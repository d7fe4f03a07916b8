"""What the commands about KVM's MMU share: the model that is like a host, and what it tells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.snippets import SNIPPETS
from pykvm.crosscheck.story import Event
from pykvm.errors import PykvmError, UsageError
from pykvm.kvm import KvmSystem
from pykvm.machine import Machine, System
from pykvm.model.cpu.features import Features
from pykvm.model.mmu.journal import Journal
from pykvm.model.mmu.vm import Mmu
from pykvm.model.paging import Access, Control, walk
from pykvm.model.system import ModelSystem
from pykvm.probe import detect, read_evidence
from pykvm.profiles import DEVELOPMENT_HOST, Profile, profile
from pykvm.x86.bits import Cr0, Efer

_INDENT: Final = "  "
_NUMBER: Final = re.compile(r"0x[0-9a-f]+")
_MOST_REPEATS: Final = 8
"""How often the same may happen before it is told in short."""


class MmuListener:
    """Tells what the guest's tables say before an access, and what the model's MMU did."""

    def __init__(self) -> None:
        self._journal = Journal()

    def before(self, machine: Machine, step: plan.Step) -> Sequence[str]:
        """The walks of an Access, in words; nothing for other steps."""
        if isinstance(step, plan.Translate):
            return _walk(machine, step.vcpu, step.linear, Access.READ)
        if not isinstance(step, plan.Access):
            return ()
        lines: list[str] = []
        snippet = SNIPPETS[step.snippet]
        user = Access.USER if step.cpl else Access.READ
        kind = Access.WRITE if snippet.writes else Access.FETCH if step.snippet == "fetch" else Access.READ
        if snippet.size:
            lines += _walk(machine, step.vcpu, step.address, kind | user)
        if snippet.reads_second:
            lines += _walk(machine, step.vcpu, step.second, Access.READ | user)
        return lines

    def after(self, machine: Machine) -> Sequence[Event]:
        """What the journal got since the last call."""
        mmu = getattr(machine, "mmu", None)
        if isinstance(mmu, Mmu):
            mmu.journal = self._journal
        return self._journal.take()


def _walk(machine: Machine, vcpu: int, linear: int, access: Access) -> Sequence[str]:
    """The guest's tables as they are in memory now: what KVM's own walk would find."""
    special = machine.vcpus[vcpu].get_special_registers()
    if not (special.cr0 & Cr0.PG and special.efer & Efer.LMA):
        return ()
    features = Features.of(machine.supported_cpuid)
    control = Control(
        cr0=special.cr0,
        cr3=special.cr3,
        cr4=special.cr4,
        efer=special.efer,
        physical_bits=features.physical_bits,
        pages_1g=features.pages_1g,
        pse36=features.pse36,
        amd=features.amd,
    )
    return str(walk(lambda gpa, size: _read(machine, gpa, size), control, linear, access)).splitlines()


def _read(machine: Machine, gpa: int, size: int) -> int | None:
    for slot in machine.slots.values():
        if slot.gpa <= gpa < slot.gpa + slot.size:
            with suppress(PykvmError):
                return int.from_bytes(slot.memory.read(slot.memory_offset + gpa - slot.gpa, size), "little")
    return None


def host_profile(kvm: KvmSystem) -> Profile:
    """The profile of the host behind ``kvm``, found by probing: that takes a second."""
    return detect(kvm, read_evidence(), kvm.check_extension).profile


def open_model(kvm: System | None, kind: str | None = None, era: str | None = None) -> ModelSystem:
    """The model of a host: of the named ``kind``, else of the one behind ``kvm``, else of the first known.

    Raises UsageError for an era without a kind.
    """
    if kind is None and era is not None:
        raise UsageError("An era is of a kind of host: give --profile, too.")
    if kind is not None:
        known = profile(kind, era or "6.12")
    elif isinstance(kvm, KvmSystem):
        known = host_profile(kvm)
    else:
        known = profile(*DEVELOPMENT_HOST)
    model = ModelSystem(profile=known, gathers=False)
    model.description = f"{known.name}, era {known.era}"
    return model


def indented(lines: Sequence[str], by: int = 1) -> Iterator[str]:
    """The lines, moved to the right."""
    return (_INDENT * by + line for line in lines)


def folded(events: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of all events; of one or two that repeat with other numbers only the first and how often."""
    alike = [_NUMBER.sub("", "\n".join(event)) for event in events]
    at = 0
    while at < len(events):
        for period in (1, 2):
            end = at + period
            while end < len(events) and alike[end] == alike[end - period]:
                end += 1
            repeats = (end - at) // period
            if repeats > _MOST_REPEATS:
                break
        else:
            period = repeats = 1
        for event in events[at : at + period]:
            yield from event
        if repeats > 1:
            yield f"{_INDENT}and so {repeats - 1} more times"
        at += period * repeats
