"""From a live host to its profile: every probe, then the known host that is nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from pykvm.machine import System
from pykvm.probe.bench import Bench
from pykvm.probe.evidence import Evidence
from pykvm.probe.finding import Finding, How
from pykvm.probe.rings import RING_PROBES
from pykvm.probe.running import KIND_PROBES, OTHER_PROBES
from pykvm.probe.shadow import SHADOW_PROBES
from pykvm.probe.tdp import TDP_PROBES
from pykvm.profiles import ERAS, Paging, Profile, profile

OF_THE_HOST: Final = frozenset(
    {"physical_bits", "pages_1g", "external_write_tracking", "execution", "tdp_root_level"}
)
"""What differs from processor to processor, and from one build of a kernel to another: a host may differ in
these and still be equal to the known one."""

BEHAVIOURS: Final = tuple(each.name for each in fields(Profile) if each.name not in ("name", "era"))
"""All behaviours of a profile, in its order."""

_HIDDEN: Final[Mapping[str, str]] = {
    "resets_at_shutdown": "goes with the vendor",
    "refuses_missing_table_slot": "shows only with page tables in one of KVM's own slots",
    "counts_emulate_before_retry": "shows only if an event is injected while a table is written",
    "separate_read_access": "an encoding: it shows after 2^17 changes of slots only",
    "marks_without_vcpu": "no VM ioctl of x86 writes to guest memory that is logged",
    "ring_full_by_request": "both ways end KVM_RUN at the same point",
    "track_query_both_spaces": "needs a guest in system-management mode that edits its tables",
    "own_track_node": "shows only to an external user of write tracking",
    "refuses_move_when_tracked": "shows only with an external user of write tracking",
}
"""Why a behaviour without a probe, or whose probe does not apply, is not found."""


@dataclass(frozen=True)
class Detection:
    """What was found.  ``profile`` has the name of the nearest known kind and era, and all findings."""

    profile: Profile
    findings: Mapping[str, Finding]
    """Every behaviour, in the profile's order."""
    ties: tuple[str, ...]
    """Eras that are as near as the one of the profile."""

    @property
    def known(self) -> Profile:
        """The nearest known host."""
        return profile(self.profile.name, self.profile.era)

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Behaviours that differ from it: (found, known); without OF_THE_HOST."""
        known = self.known
        return {
            name: (getattr(self.profile, name), getattr(known, name))
            for name in BEHAVIOURS
            if name not in OF_THE_HOST and getattr(self.profile, name) != getattr(known, name)
        }


def _kind(bench: Bench) -> str:
    """The known kind of host by what was found of it."""
    paging = bench.value("paging")
    if paging is Paging.NPT:
        return "amd-npt" if bench.value("tdp_mmu") else "amd-npt-oldmmu"
    if paging is Paging.EPT:
        if bench.value("pml"):
            return "intel-ept"
        return "intel-ept-nopml" if bench.value("ept_ad") else "intel-ept-noad"
    if bench.value("emulates_all_but_user"):
        return "pvm-shadow"
    return "intel-shadow" if bench.evidence.vendor == "intel" else "amd-shadow"


def _distance(found: Mapping[str, Finding], known: Profile) -> int:
    return sum(
        finding.value != getattr(known, name) for name, finding in found.items() if name not in OF_THE_HOST
    )


def detect(system: System, evidence: Evidence, capability: Callable[[int], int]) -> Detection:
    """Probe a host.  ``capability`` is KVM_CHECK_EXTENSION of a number.  Takes about a tenth of a second.

    What cannot be found is taken from the nearest known host and says so; nothing is raised for that.
    Raises PykvmError where no VM can be made at all.
    """
    system.create_machine().close()
    bench = Bench(system, evidence, capability)
    for probe in (*KIND_PROBES, *OTHER_PROBES, *SHADOW_PROBES, *TDP_PROBES, *RING_PROBES):
        bench.take(probe)
    kind = _kind(bench)
    distances = {era: _distance(bench.found, profile(kind, era)) for era in ERAS}
    nearest = [era for era in ERAS if distances[era] == min(distances.values())]
    known = profile(kind, nearest[-1])
    found = {name: finding.value for name, finding in bench.found.items()}
    findings = {
        name: bench.found.get(name) or _assumed(name, known, bench.why_not.get(name)) for name in BEHAVIOURS
    }
    return Detection(replace(known, **found), findings, tuple(nearest[:-1]))


def _assumed(name: str, known: Profile, why: str | None) -> Finding:
    reason = why or _HIDDEN.get(name, "there is no probe for it")
    return Finding(name, getattr(known, name), How.ASSUMED, reason)
