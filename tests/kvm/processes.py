"""Code that runs in a process of its own, so that a crash there is a failure and not the end."""

from __future__ import annotations

import subprocess
import sys

from tests.patience import patient


def in_a_process(code: str, *arguments: str, timeout: float = 100) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=patient(timeout),
        check=False,
    )
    assert result.returncode == 0, f"status {result.returncode}\n{result.stdout}\n{result.stderr}"
