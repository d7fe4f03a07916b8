"""The bench runs, measures what it says, and prints what is documented.  No speed is judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench"), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
    )


def paths(value: Any, prefix: str = "") -> set[str]:
    """The keys of a document as the documentation writes them; details are each row's own."""
    if isinstance(value, dict) and not prefix.endswith(".details"):
        return {path for key, item in value.items() for path in paths(item, f"{prefix}.{key}".lstrip("."))}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {path for item in value for path in paths(item, f"{prefix}[]")}
    return {prefix}


def documented_keys() -> set[str]:
    section = (ROOT / "docs" / "benchmarks.md").read_text().split("## The keys of `--json`")[1]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


@pytest.mark.kvm
def test_json_has_the_documented_keys_and_sound_figures() -> None:
    result = bench("--quick", "--only", "lifecycle", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert paths(document) == documented_keys()
    assert document["quick"] is True
    (row,) = document["rows"]
    assert row["item"] == "lifecycle"
    assert 0 < row["low"] <= row["value"] <= row["high"]
    assert row["ours"] > 0
    assert row["yardstick"] > 0
    assert row["met"] is (row["value"] <= row["target"])
    assert row["name"] in result.stderr


def test_a_missing_compiler_is_one_clear_sentence() -> None:
    result = bench("--quick", "--only", "lifecycle", CC="no-such-compiler")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "error: The bench needs a C compiler; install one with" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_names_every_item() -> None:
    result = bench("--help")
    assert result.returncode == 0
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for item in ("exits", "rings", "dirtylog", "lifecycle", "migration", "sparse", "emulator"):
        assert re.search(rf"^  {item} ", result.stdout, re.MULTILINE)
        assert f"| `{item}` |" in text
