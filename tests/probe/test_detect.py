"""The profile of the live host, and how each behaviour of it was found."""

from __future__ import annotations

import pytest

from pykvm.errors import HostError
from pykvm.kvm import KvmSystem
from pykvm.probe import Detection, Evidence, Finding, How, detect, read_evidence
from pykvm.probe.detect import BEHAVIOURS, OF_THE_HOST
from pykvm.profiles import DEVELOPMENT_HOST, ERAS, KINDS, Paging, profile

EVIDENCE = read_evidence()
on_development_host = pytest.mark.skipif(
    "kvm_pvm" not in EVIDENCE.parameters, reason="this host's KVM is not kvm_pvm"
)


@pytest.fixture(scope="module")
def detection() -> Detection:
    """One detection for all tests: each probe takes a VM."""
    with KvmSystem() as system:
        return detect(system, EVIDENCE, system.check_extension)


@pytest.mark.kvm
@on_development_host
@pytest.mark.parametrize("behaviour", [name for name in BEHAVIOURS if name not in OF_THE_HOST])
def test_the_development_host_is_the_known_one(detection: Detection, behaviour: str) -> None:
    """Field by field what hosts.md measured there, and kvm-mmu.md 14.1."""
    assert getattr(detection.profile, behaviour) == getattr(profile(*DEVELOPMENT_HOST), behaviour)


@pytest.mark.kvm
@on_development_host
def test_most_of_it_was_shown(detection: Detection) -> None:
    """The kind is shown by guests; no era fits as well."""
    assert (detection.profile.name, detection.profile.era) == DEVELOPMENT_HOST
    assert detection.ties == ()
    assert detection.differences == {}
    shown = {name for name, finding in detection.findings.items() if finding.how is How.PROBE}
    assert shown >= {
        "paging", "emulates_all_but_user", "mmio_caching", "reads_io_bitmap", "lazy_cr3_sync",
        "exit_per_emulated_user_failure",
        "zaps_unsync_children", "sync_rebuilds_all", "invlpg_refetches", "smep_in_role",
        "flushes_on_ad_clear", "dummy_root", "flushes_first_root", "retries_always", "pml",
    }  # fmt: skip


@pytest.mark.kvm
def test_every_behaviour_is_accounted_for(detection: Detection) -> None:
    """On any host: a value for each, and evidence or a reason."""
    assert tuple(detection.findings) == BEHAVIOURS
    for name, finding in detection.findings.items():
        assert finding.behaviour == name
        assert finding.value == getattr(detection.profile, name)
        assert finding.evidence
        assert not finding.evidence.endswith(".")


@pytest.mark.kvm
def test_a_probed_host_is_a_known_one(detection: Detection) -> None:
    """The table of known hosts covers every kind and era that was ever measured, labs included."""
    assert detection.profile.name in KINDS
    assert detection.differences == {}


@pytest.mark.kvm
def test_nothing_but_guests_is_needed(detection: Detection) -> None:
    """A host that says nothing of itself (no parameters, symbols, flags) is known by its guests alone, except
    whose processor it is."""
    with KvmSystem() as system:
        alone = detect(system, Evidence(), system.check_extension)
    if detection.profile.tdp:
        pytest.skip("NPT and EPT are told apart by the processor's name")
    assert (alone.profile.name, alone.profile.era) == (detection.profile.name, detection.profile.era)
    assert alone.profile.emulation_batch == detection.profile.emulation_batch
    named = {"nx_huge_pages", "eager_page_split", "external_write_tracking"}
    for name in named:
        assert alone.findings[name].how is How.ASSUMED
    assert all(
        finding.how is How.ASSUMED or finding.value == detection.findings[name].value
        for name, finding in alone.findings.items()
    )


@pytest.mark.kvm
def test_detection_is_quick(detection: Detection) -> None:
    """Each probe is one VM and a few instructions: no behaviour was given up for a time-out."""
    assert not [finding for finding in detection.findings.values() if "did not end" in finding.evidence]


# --- from findings to a known host -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("era", ERAS)
def test_known_hosts_are_told_apart(kind: str, era: str) -> None:
    """Each pair of eras of a kind differs in something that a probe of that kind can show."""
    showable = {
        "retries_always", "has_shadow_pages_statistic", "emulates_avx", "reset_interruptible",
        *(("flushes_on_ad_clear", "smep_in_role", "sync_rebuilds_all") if not profile(kind).tdp else ()),
        *(("tdp_recovers_in_place", "masked_split_misses_last") if profile(kind).tdp_mmu else ()),
        *(("pml_newest_first",) if profile(kind).pml else ()),
    }  # fmt: skip
    same = [
        other
        for other in ERAS
        if other != era
        and all(getattr(profile(kind, era), name) == getattr(profile(kind, other), name) for name in showable)
    ]
    assert same == []


def finding(name: str, value: object) -> Finding:
    return Finding(name, value, How.PROBE, "told by the test")


@pytest.mark.parametrize("kind", KINDS)
def test_differences_name_what_was_found_and_what_is_known(kind: str) -> None:
    known = profile(kind, "7.2")
    changed = profile(kind, "7.2", smep_in_role=False, physical_bits=52)
    findings = {name: finding(name, getattr(changed, name)) for name in BEHAVIOURS}
    detection = Detection(changed, findings, ())
    assert detection.known == known
    assert detection.differences == {"smep_in_role": (False, True)}
    assert Detection(known, findings, ()).differences == {}


def test_two_dimensional_kinds_differ_by_what_walks_and_logs() -> None:
    """kvm-mmu.md 13.4 and 11.3."""
    kinds = {kind: profile(kind) for kind in KINDS}
    assert {kind for kind, each in kinds.items() if each.walks_write_tables} == {
        "amd-npt", "amd-npt-oldmmu", "intel-ept", "intel-ept-nopml",
    }  # fmt: skip
    assert {kind for kind, each in kinds.items() if each.reserved_ring_entries == 576} == {"intel-ept"}
    assert {each.paging for each in kinds.values()} == set(Paging)


@pytest.mark.kvm
def test_a_host_whose_guests_show_nothing_is_assumed() -> None:
    """Probes that fail leave a reason each, and a known host; nothing is raised."""

    class Broken:
        """Makes one VM, to show that it can, and then no more."""

        backend, description = "kvm", "broken"

        def __init__(self) -> None:
            self.system = KvmSystem()
            self.made = 0

        def create_machine(self) -> object:
            self.made += 1
            if self.made > 1:
                raise HostError("The host has no more VMs to give.")
            return self.system.create_machine()

    broken = Broken()
    with broken.system:
        detection = detect(broken, Evidence(), lambda number: 0)  # type: ignore[arg-type]
    assert detection.profile.name in KINDS
    probed = {name for name, each in detection.findings.items() if each.how is How.PROBE}
    assert probed == set()
    assert "no more VMs" in detection.findings["paging"].evidence
