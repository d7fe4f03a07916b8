"""``pykvm dirty`` and ``pykvm info`` on real KVM."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from pykvm.cli.host import Host, read_host
from pykvm.cli.info import IMPORTANT, mmu_facts
from pykvm.cli.modes import measure_mode
from pykvm.guest.boot import BootMode
from pykvm.kvm import KvmSystem
from tests.cli.runner import command_line, environment, invoke
from tests.patience import patient

Capture = pytest.CaptureFixture[str]
WATCH = ("--memory", "8M", "--seconds", "300ms", "--interval", "100ms")


@pytest.mark.kvm
@pytest.mark.parametrize("tracker", ["bitmap", "manual", "ring"])
def test_dirty_sees_the_whole_of_a_sequential_guest(capfd: Capture, tracker: str) -> None:
    result = invoke(capfd, "dirty", "sequential", *WATCH, "--tracker", tracker, "--json")
    assert result.status == 0, result.err
    document = result.document
    # All but the 2 MiB of tables at most: the guest writes every page of its region again and again.
    assert 1536 <= document["pages_dirtied"] <= document["pages_total"] == 2048
    assert sum(item["new_pages"] for item in document["intervals"]) == document["pages_dirtied"]
    assert document["guest_visits"] >= document["pages_dirtied"] - 64
    assert document["guest_corruptions"] == 0
    assert document["seconds"] >= 0.3


@pytest.mark.kvm
def test_an_idle_guest_writes_less_than_a_busy_one(capfd: Capture) -> None:
    idle = invoke(capfd, "dirty", "idle", *WATCH, "--json").document
    busy = invoke(capfd, "dirty", "random", *WATCH, "--json").document
    assert 0 < idle["guest_visits"] < busy["guest_visits"]


@pytest.mark.kvm
def test_touch_bounds_what_is_written(capfd: Capture) -> None:
    document = invoke(capfd, "dirty", "random", *WATCH, "--touch", "1M", "--json").document
    assert document["pages_dirtied"] <= 256 + 64


@pytest.mark.kvm
def test_on_a_terminal_it_draws(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            command_line("dirty", "hotspot", *WATCH),
            stdout=slave,
            stderr=slave,
            env=environment() | {"TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(slave)
        seen = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # EIO: the last user of the other side is gone
                break
            if not part:
                break
            seen += part
        assert process.wait(timeout=patient(20)) == 0
    finally:
        os.close(master)
    assert "▉".encode() in seen
    assert b"\x1b[" in seen
    assert b"0 corruptions" in seen


@pytest.mark.kvm
def test_info_tells_emulated_from_native_modes(system: KvmSystem) -> None:
    """KVM's statistic and the clock agree: an emulated instruction costs hundreds of native ones."""
    user, kernel = (measure_mode(system, BootMode.LONG, cpl) for cpl in (3, 0))
    assert {user.execution, kernel.execution} <= {"native", "emulated"}
    assert min(user.exit_seconds, kernel.exit_seconds) > 0
    costs = sorted([user.instruction_seconds, kernel.instruction_seconds])
    assert (costs[1] > 50 * costs[0]) == (user.execution != kernel.execution)


@pytest.mark.kvm
def test_info_lists_what_the_kernel_offers(capfd: Capture, system: KvmSystem) -> None:
    result = invoke(capfd, "info", "--json")
    assert result.status == 0, result.err
    document = result.document
    for capability in IMPORTANT:
        assert document["capabilities"].get(capability.name, 0) == system.check_extension(capability)
    assert document["kernel"] == os.uname().release
    assert {item["mode"] for item in document["modes"]} == {mode.value for mode in BootMode}
    for item in document["modes"]:
        assert (item["execution"] == "unavailable") == bool(item["reason"])


@pytest.mark.kvm
def test_info_for_people_names_what_is_missing(capfd: Capture) -> None:
    document = invoke(capfd, "info", "--json").document
    text = invoke(capfd, "info", "--all").out
    for item in document["missing"]:
        assert item["remedy"] in text
    assert "IRQCHIP" in text


def fake_host(root: Path, flags: str, parameters: dict[str, dict[str, str]]) -> Host:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(f"model name\t: Some CPU\nflags\t\t: fpu {flags}\n")
    for module, values in parameters.items():
        folder = root / "sys/module" / module / "parameters"
        folder.mkdir(parents=True)
        for name, value in values.items():
            (folder / name).write_text(f"{value}\n")
    return read_host(root)


@pytest.mark.parametrize(
    ("flags", "parameters", "kind", "tdp_mmu"),
    [
        ("vmx", {"kvm": {"tdp_mmu": "Y"}, "kvm_intel": {"ept": "Y"}}, "ept", True),
        ("svm", {"kvm": {"tdp_mmu": "N"}, "kvm_amd": {"npt": "1"}}, "npt", False),
        ("svm", {"kvm": {}, "kvm_amd": {"npt": "0"}}, "shadow", None),
        ("", {"kvm": {"tdp_mmu": "N"}, "kvm_other": {}}, "unknown", False),
    ],
)
def test_the_mmus_kind_comes_from_the_modules_parameters(
    tmp_path: Path, flags: str, parameters: dict[str, dict[str, str]], kind: str, tdp_mmu: bool | None
) -> None:
    host = fake_host(tmp_path, flags, parameters)
    facts = mmu_facts(host, [])
    assert (facts["kind"], facts["tdp_mmu"]) == (kind, tdp_mmu)
    assert host.virtualization_flag == flags
    assert host.processor == "Some CPU"
