"""``--profile``: a guest on the model of a named host."""

from __future__ import annotations

import pytest

from pykvm.cli.host_profile import host_profile, open_machines
from pykvm.cli.session import Session
from pykvm.errors import UsageError
from pykvm.kvm import KvmSystem
from pykvm.probe import detect, read_evidence
from pykvm.profiles import DEVELOPMENT_HOST, profile
from tests.cli.runner import invoke

Capture = pytest.CaptureFixture[str]


def test_a_guest_runs_on_the_model_of_a_host(capfd: Capture) -> None:
    done = invoke(
        capfd,
        "dirty",
        "sequential",
        "--profile",
        "amd-npt@7.2",
        "--memory",
        "4M",
        "--seconds",
        "300ms",
        "--json",
    )
    assert done.status == 0, done.err
    assert done.document["guest_corruptions"] == 0
    assert done.document["pages_dirtied"] > 0


@pytest.mark.parametrize("name", ["pentium", "amd-npt@2.6", "@7.2"])
def test_a_host_that_is_not_known(capfd: Capture, name: str) -> None:
    done = invoke(capfd, "dirty", "sequential", "--profile", name)
    assert done.status == 2
    assert "--profile" in done.err


def test_a_real_kvm_has_a_profile_of_its_own() -> None:
    session = Session()
    session.backend = "kvm"
    with pytest.raises(UsageError, match="leave out --profile"):
        open_machines(session, profile(*DEVELOPMENT_HOST))


def test_without_a_profile_nothing_changes() -> None:
    session = Session()
    session.backend = "model"
    with open_machines(session, None) as system, system.create_machine() as machine:
        assert not hasattr(machine, "mmu")


def test_auto_is_this_host(system: KvmSystem) -> None:
    assert host_profile() == detect(system, read_evidence(), system.check_extension).profile
