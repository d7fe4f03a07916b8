"""The C of pykvm/abi/hot, compiled and run under the sanitizers.

A C compiler is part of what pykvm is built with, so that a missing one is a failure, not a skip.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DRIVER = HERE / "driver.c"
HOT = HERE.parent.parent / "pykvm" / "abi" / "hot"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
COMMON = ["-std=gnu11", "-g", "-O1", "-fno-strict-aliasing", "-pthread", *WARNINGS]
SANITIZERS = {
    "address and undefined behaviour": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
    "none, optimised as in the package": ["-O2"],
}


def compiler() -> list[str]:
    """What the binding is compiled with: $CC, or Python's own choice."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]


@pytest.mark.parametrize("name", SANITIZERS)
def test_the_c_code_is_clean(tmp_path: Path, name: str) -> None:
    program = tmp_path / "driver"
    command = [*compiler(), *COMMON, *SANITIZERS[name], str(DRIVER), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert built.returncode == 0, f"{shlex.join(command)}\n{built.stderr}"
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run(
        [str(program)], capture_output=True, text=True, timeout=100, check=False, env=environment
    )
    assert (run.returncode, run.stdout) == (0, "all fine\n"), run.stderr


def test_the_driver_covers_every_file() -> None:
    """A new file in pykvm/abi/hot must get its tests in driver.c."""
    text = DRIVER.read_text()
    for path in HOT.glob("*.c"):
        assert f'hot/{path.name}"' in text, f"{path.name} is not tested under the sanitizers"
