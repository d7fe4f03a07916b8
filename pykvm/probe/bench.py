"""What a probe is, and what it gets to work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from pykvm.errors import PykvmError
from pykvm.kvm import KvmVm
from pykvm.machine import SlotFlags, System
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.probe.evidence import Evidence, vmalloc_areas
from pykvm.probe.finding import Finding, How
from pykvm.probe.guest import ProbeError, ProbeGuest
from pykvm.profiles import Paging

_ODD_PAGES: Final = 0x4_A123
"""Of a slot whose counts, 2 bytes a page, are an area of a size that nobody else has."""

Answer = tuple[Any, How, str]
"""Value, how it was found, evidence."""


class Needs(Enum):
    """On which hosts a probe shows anything; the value says why others cannot show it."""

    ANY = ""
    SHADOW = "nothing is shadowed under two-dimensional paging unless the guest nests"
    TDP = "there is no two-dimensional paging"
    TDP_MMU = "there is no TDP MMU"
    EPT = "the processor's tables are no EPT"
    PML = "the processor does not log"
    EMULATED = "the host emulates nothing that a processor runs"


@dataclass(frozen=True)
class Probe:
    """How to find a behaviour; ``run`` raises ProbeError or PykvmError where it does not work."""

    behaviour: str
    needs: Needs
    run: Callable[[Bench], Answer]


class Bench:
    """The host under test.  ``capability`` is KVM_CHECK_EXTENSION; ``found`` what earlier probes found."""

    def __init__(self, system: System, evidence: Evidence, capability: Callable[[int], int]) -> None:
        self.system = system
        self.evidence = evidence
        self.capability = capability
        self.found: dict[str, Finding] = {}
        self.why_not: dict[str, str] = {}
        """For behaviours that were looked for in vain: the reason."""
        self.first_load: Mapping[str, int] = {}
        """How far the counters moved when a fresh VM's first instruction loaded from memory."""

    def guest(self, *, flags: SlotFlags = SlotFlags.NONE, ring: int = 0) -> ProbeGuest:
        """A fresh guest."""
        return ProbeGuest(self.system, flags=flags, ring=ring)

    def value(self, behaviour: str) -> Any:
        """What was found of an earlier behaviour; None if nothing was."""
        finding = self.found.get(behaviour)
        return None if finding is None else finding.value

    def take(self, probe: Probe) -> None:
        """Run a probe and note what it found, or why it found nothing."""
        if not self._applies(probe.needs):
            self.why_not[probe.behaviour] = probe.needs.value
            return
        try:
            value, how, evidence = probe.run(self)
        except (ProbeError, PykvmError) as error:
            self.why_not[probe.behaviour] = f"not shown: {error}"
        else:
            self.found[probe.behaviour] = Finding(probe.behaviour, value, how, evidence)

    def _applies(self, needs: Needs) -> bool:
        paging = self.value("paging")
        match needs:
            case Needs.SHADOW:
                return paging is Paging.SHADOW
            case Needs.TDP:
                return paging in (Paging.NPT, Paging.EPT)
            case Needs.TDP_MMU:
                return bool(self.value("tdp_mmu"))
            case Needs.EPT:
                return paging is Paging.EPT
            case Needs.PML:
                return bool(self.value("pml"))
            case Needs.EMULATED:
                return bool(self.value("emulates_all_but_user"))
        return True


def from_switch(bench: Bench, *names: str) -> Answer:
    """A behaviour that a module's switch decides.  Raises ProbeError where the host has none of that name."""
    found = bench.evidence.switch(*names)
    if found is None:
        raise ProbeError(f"no module has the parameter {' or '.join(names)}")
    return found[1], How.PARAMETER, f"{found[0]}={'Y' if found[1] else 'N'}"


def counts_of_a_new_slot(bench: Bench) -> bool:
    """Whether a slot of a VM without a guest has write-track counts.  Raises ProbeError if that is hidden."""
    size = -(-2 * _ODD_PAGES // PAGE_SIZE) * PAGE_SIZE + PAGE_SIZE
    with bench.system.create_machine() as vm, GuestMemory(_ODD_PAGES * PAGE_SIZE) as memory:
        if not isinstance(vm, KvmVm):
            raise ProbeError("this machine is no real KVM")
        before = vmalloc_areas("kvm_page_track")
        vm.create_slot(memory, 0)
        after = vmalloc_areas("kvm_page_track")
    if before is None or after is None:
        raise ProbeError("the kernel's allocations (/proc/vmallocinfo) are root's to read")
    return after.get(size, 0) > before.get(size, 0)


LOG: Final = SlotFlags.LOG_DIRTY_PAGES
