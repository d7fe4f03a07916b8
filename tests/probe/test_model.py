"""The probes on the reference model: a host that behaves as its profile says is found to be that one.

What a probe finds must be what the profile has; what no probe can show there is left to the known hosts, as
on a real machine.
"""

from __future__ import annotations

import pytest

from pykvm.model.system import ModelSystem
from pykvm.probe import Detection, Evidence, How, detect
from pykvm.probe.detect import OF_THE_HOST
from pykvm.profiles import ERAS, KINDS, Paging, Profile, profile

MODULES = {"pvm": "kvm_pvm", "amd": "kvm_amd", "intel": "kvm_intel"}
DIRTY_LOG_RING, MULTI_ADDRESS_SPACE = 192, 118
HOSTS = [(kind, era) for kind in KINDS for era in ERAS]


def evidence(known: Profile) -> Evidence:
    """What such a host has in sysfs."""
    vendor = MODULES[known.name.split("-")[0]]
    paging = {Paging.NPT: {"npt": "Y"}, Paging.EPT: {"ept": "Y"}}.get(known.paging, {})
    return Evidence(parameters={"kvm": {"eager_page_split": "Y", "nx_huge_pages": "N"}, vendor: paging})


def detected(known: Profile) -> Detection:
    capabilities = {
        DIRTY_LOG_RING: 1 << 20,
        MULTI_ADDRESS_SPACE: known.address_spaces if known.address_spaces > 1 else 0,
    }
    with ModelSystem(profile=known) as system:
        return detect(system, evidence(known), lambda number: capabilities.get(number, 0))


@pytest.mark.parametrize(("kind", "era"), HOSTS)
def test_a_modelled_host_is_found_to_be_itself(kind: str, era: str) -> None:
    known = profile(kind, era)
    detection = detected(known)
    wrong = {
        name: (finding.value, finding.evidence)
        for name, finding in detection.findings.items()
        if finding.how is not How.ASSUMED
        and name not in OF_THE_HOST
        and finding.value != getattr(known, name)
    }
    assert wrong == {}
    assert detection.profile.name == kind
    assert era in (detection.profile.era, *detection.ties)


def test_a_host_of_its_own_is_told_from_the_known_ones() -> None:
    """Single behaviours that were changed are found one by one."""
    odd = profile("amd-shadow", "6.12", mmio_caching=False, zaps_unsync_children=False, address_spaces=1)
    detection = detected(odd)
    assert detection.profile.name == "amd-shadow"
    assert detection.differences == {
        "mmio_caching": (False, True),
        "zaps_unsync_children": (False, True),
        "address_spaces": (1, 2),
    }
