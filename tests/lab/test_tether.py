"""A program that dies with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pykvm.lab import tether

PARENT = """
import os, subprocess, sys
from pykvm.lab.tether import tethered
child = subprocess.Popen(tethered(["sleep", "60"]), start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


def gone(process: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def command_of(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def test_it_dies_with_a_parent_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + 20
        while not command_of(child).startswith(b"sleep\0") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert command_of(child).startswith(b"sleep\0")
        os.kill(parent.pid, signal.SIGKILL)
    assert gone(child)


def test_it_does_not_start_for_a_parent_that_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, tether.__file__, "1", "echo", "started"],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.stdout == b""


def test_modules_of_the_folder_that_it_starts_in_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pykvm lab run`` works in a folder that has a signal.py or a pykvm of its own."""
    (tmp_path / "signal.py").write_text("raise SystemExit(9)")
    (tmp_path / "pykvm").mkdir()
    (tmp_path / "pykvm" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        tether.tethered(["echo", "started"]), cwd=tmp_path, capture_output=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"started\n")
