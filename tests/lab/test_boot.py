"""Real labs: QEMU with a Debian kernel.  Needs the network once; run with ``scripts/test -m lab``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.lab.cache import Cache
from tests.cli.runner import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

KERNELS = ("6.1", "7.2")


def lab(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pykvm", "lab", *arguments]


def run(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        lab("run", *arguments), capture_output=True, text=True, timeout=600, check=False, cwd=ROOT, **options
    )  # type: ignore[call-overload]


def emulators(cache: Path) -> list[int]:
    """Processes of QEMU that belong to a run of this cache."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"qemu-system-x86_64" in line and str(cache / "runs").encode() in line:
            found.append(int(entry.name))
    return found


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache for this test's runs and layers, with the kernels and tools of the user's."""
    subprocess.run(
        lab("prepare", "--kernel", "6.1"), check=True, timeout=600, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    own = tmp_path / "cache"
    own.mkdir()
    for part in ("kernels", "tools"):
        (own / part).symlink_to(Cache().root / part)
    monkeypatch.setenv("PYKVM_LAB_CACHE", str(own))
    yield own
    assert emulators(own) == []


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("kind", "npt"), [("amd-npt", "Y"), ("amd-shadow", "N")])
def test_a_lab_is_the_kernel_and_the_kind_that_was_asked_for(kernel: str, kind: str, npt: str) -> None:
    done = run(
        "--kernel", kernel, "--kvm", kind, "--", "cat", "/sys/module/kvm_amd/parameters/npt", "/proc/version"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] in (npt, {"Y": "1", "N": "0"}[npt])
    assert lines[1].startswith(f"Linux version {kernel}.")


def test_a_migration_with_proof_in_a_lab() -> None:
    command = "pykvm migrate --backend kvm --workload hotspot --memory 8M --tracker ring --json"
    done = run("--kernel", "6.1", "--timeout", "8m", "--", *command.split())
    assert done.returncode == 0, done.stderr
    assert '"verified": true' in done.stdout


def test_the_proof_fails_in_a_lab_when_a_page_is_lost() -> None:
    command = "pykvm migrate --backend kvm --workload hotspot --memory 8M --sabotage lost-page"
    done = run("--kernel", "6.1", "--timeout", "8m", "--", *command.split())
    assert done.returncode == 10, done.stderr


def test_files_go_in_and_come_back(own_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(os.environ['PYKVM_LAB_OUT'], 'answer').write_text(os.environ['PYKVM_LAB'])\n"
        "print('to stderr', file=sys.stderr)\nsys.exit(41)\n"
    )
    out = tmp_path / "out"
    done = run(
        "--kernel", "6.1", "--put", str(tmp_path / "script.py"), "--out", str(out),
        "--", "python", "script.py",
    )  # fmt: skip
    assert done.returncode == 41
    assert (out / "answer").read_text() == "amd-npt"
    assert "to stderr" in done.stderr
    assert "QEMU" in done.stderr.splitlines()[-1], "the last line says what it ran on"


def test_a_panic_and_a_time_out_have_their_statuses(own_cache: Path) -> None:
    died = run("--kernel", "6.1", "--", "sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60")
    assert died.returncode == 125
    assert "sysrq triggered crash" in died.stderr
    late = run("--kernel", "6.1", "--timeout", "1s", "--", "sleep", "60")
    assert late.returncode == 123
    assert emulators(own_cache) == []


def test_two_labs_at_once_and_ctrl_c(own_cache: Path) -> None:
    """The second goes on and ends well while the first is interrupted."""
    first = subprocess.Popen(
        lab("run", "--kernel", "6.1", "--", "sh", "-c", "echo up; sleep 600"),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip
    second = subprocess.Popen(
        lab("run", "--kernel", "6.1", "--", "sh", "-c", "echo up; sleep 15; echo well"),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip
    with first, second:
        assert first.stdout is not None
        assert second.stdout is not None
        assert first.stdout.readline() == "up\n"
        assert second.stdout.readline() == "up\n"
        assert len(emulators(own_cache)) == 2
        os.kill(first.pid, signal.SIGINT)
        assert first.wait(timeout=30) == 130
        deadline = time.monotonic() + 10
        while len(emulators(own_cache)) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(emulators(own_cache)) == 1
        assert second.stdout.read() == "well\n"
        assert second.wait(timeout=60) == 0
    assert [path for path in (own_cache / "runs").iterdir() if path.name[0] != "."] == []


def test_a_killed_lab_takes_its_emulator_along(own_cache: Path) -> None:
    with subprocess.Popen(
        lab("run", "--kernel", "6.1", "--", "sh", "-c", "echo up; sleep 600"),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert emulators(own_cache)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    deadline = time.monotonic() + 10
    while emulators(own_cache) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert emulators(own_cache) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_normal_user_needs_nothing_else(own_cache: Path, tmp_path: Path) -> None:
    """As the user nobody, with a cache of its own."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for part in ("kernels", "tools"):
        source = (own_cache / part).resolve()
        (own_cache / part).unlink()
        subprocess.run(["cp", "-a", source, own_cache / part], check=True, timeout=120)
    subprocess.run(["chown", "-R", "65534:65534", own_cache], check=True, timeout=60)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    probe = [*nobody, sys.executable, "-c", "import os, pykvm, sys; open(os.path.realpath(sys.executable))"]
    if subprocess.run(probe, capture_output=True, timeout=60, check=False).returncode != 0:
        pytest.skip("this checkout or its interpreter lies where other users cannot read it")
    done = subprocess.run(
        [*nobody, *lab("run", "--kernel", "6.1", "--", "id", "-u")],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=600, check=False, cwd="/",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
