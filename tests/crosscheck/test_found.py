"""What random scenarios taught: each that once differed shows on the model what the real KVM showed then, and
the KVM of a host like that still does."""

from __future__ import annotations

import pytest

from pykvm.cli.mmu import host_profile
from pykvm.crosscheck.compare import Agreement
from pykvm.crosscheck.mmu_mass import MmuCheck
from pykvm.crosscheck.run import COUNTERS, run
from pykvm.kvm import KvmSystem
from pykvm.model.system import ModelSystem
from pykvm.profiles import profile
from tests.crosscheck.recorded import NAMES, load, shown

pytestmark = pytest.mark.interruptible


def test_there_are_some() -> None:
    assert len(NAMES) > 10


@pytest.mark.parametrize("name", NAMES)
def test_the_model_shows_what_the_real_kvm_showed(name: str) -> None:
    found = load(name)
    with ModelSystem(profile=profile(*found.host)) as model:
        assert shown(run(found.scenario, model, watch=COUNTERS)) == found.steps, found.why


@pytest.mark.parametrize("name", NAMES)
def test_a_host_like_that_still_shows_it(name: str, system: KvmSystem) -> None:
    found, here = load(name), host_profile(system)
    if (here.name, here.era) != found.host:
        pytest.skip(f"recorded on {' '.join(found.host)}, this host is {here.name} {here.era}")
    assert shown(run(found.scenario, system, watch=COUNTERS)) == found.steps, found.why


@pytest.mark.parametrize("name", NAMES)
def test_model_and_host_agree_to_the_last_byte(name: str, system: KvmSystem) -> None:
    found, here = load(name), host_profile(system)
    if (here.name, here.era) != found.host:
        pytest.skip(f"recorded on {' '.join(found.host)}, this host is {here.name} {here.era}")
    with ModelSystem(profile=here, gathers=False) as model, MmuCheck(model, system) as check:
        assert isinstance(check.check(found.scenario), Agreement)
