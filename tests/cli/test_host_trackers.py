"""``--tracker userfaultfd`` and ``pagemap``, and ``--log`` with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.runner import invoke
from tests.host_trackers import WHY_NOT

Capture = pytest.CaptureFixture[str]
NAMES = {"userfaultfd": "userfaultfd-sync", "pagemap": "pagemap"}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    if WHY_NOT[NAMES[request.param]]:
        pytest.skip(WHY_NOT[NAMES[request.param]])
    return str(request.param)


@pytest.mark.kvm
def test_dirty_sees_the_whole_of_a_sequential_guest(capfd: Capture, name: str) -> None:
    watch = ("--memory", "8M", "--seconds", "300ms", "--interval", "100ms")
    result = invoke(capfd, "dirty", "sequential", *watch, "--tracker", name, "--json")
    assert result.status == 0, result.err
    assert 1536 <= result.document["pages_dirtied"] <= result.document["pages_total"] == 2048


@pytest.mark.kvm
def test_migrate_verifies(capfd: Capture, name: str) -> None:
    options = ("--memory", "8M", "--max-rounds", "3", "--tracker", name, "--json")
    result = invoke(capfd, "migrate", *options)
    assert result.status == 0, result.err
    assert result.document["verified"] is True
    assert result.document["tracker"] == name


@pytest.mark.parametrize("backend", ["model", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_log_tells_what_the_guest_wrote(capfd: Capture, tmp_path: Path, name: str, backend: str) -> None:
    image = tmp_path / "image.bin"
    # mov byte [0x5000], 1 ; mov byte [0x9fff], 1 ; cli ; hlt
    image.write_bytes(b"\xc6\x06\x00\x50\x01\xc6\x06\xff\x9f\x01\xfa\xf4")
    options = ("--mode", "real", "--timeout", "20s", "--log", name, "--json")
    result = invoke(capfd, "run", str(image), "--backend", backend, *options)
    assert result.status == 0, result.err
    runs = result.document["dirty"]["runs"]
    assert runs == [{"slot": 0, "first_gfn": 5, "pages": 1}, {"slot": 0, "first_gfn": 9, "pages": 1}]
