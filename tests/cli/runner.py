"""Running the command line: in this process for speed, in another one where that matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pykvm.cli.main import run
from tests.patience import patient

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output as the one JSON object that it must be."""
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


def invoke(capfd: pytest.CaptureFixture[str], *arguments: str) -> Result:
    """Run in this process."""
    capfd.readouterr()
    status = run(list(arguments))
    output = capfd.readouterr()
    return Result(status, output.out, output.err)


def environment() -> dict[str, str]:
    """For a child that finds pykvm in this checkout, whether it is installed or not."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path}


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pykvm", *arguments]


def execute(*arguments: str, timeout: float = 60) -> Result:
    """Run as a process of its own."""
    done = subprocess.run(
        command_line(*arguments),
        capture_output=True,
        text=True,
        timeout=patient(timeout),
        env=environment(),
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)
