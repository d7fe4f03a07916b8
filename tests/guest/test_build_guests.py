"""scripts/build_guests.py: reproducible, lazy, and clear about what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "guests", tmp_path / "guests")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "build_guests.py", tmp_path / "scripts")
    return tmp_path


def build(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "scripts" / "build_guests.py")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={**os.environ, **environment},
    )


def images(root: Path) -> dict[str, bytes]:
    folder = root / "pykvm" / "guest" / "images"
    return {file.name: file.read_bytes() for file in folder.glob("*.bin")}


def test_build_is_reproducible_and_equals_the_packaged_images(copy):
    assert build(copy).returncode == 0
    first = images(copy)
    shutil.rmtree(copy / "pykvm")
    assert build(copy, TZ="Asia/Tokyo", LANG="C").returncode == 0
    assert images(copy) == first == images(ROOT)


def test_second_build_does_nothing_until_something_changes(copy):
    build(copy)
    image = copy / "pykvm" / "guest" / "images" / "idle.bin"
    before = image.stat().st_mtime_ns
    assert "up to date" in build(copy).stdout
    assert image.stat().st_mtime_ns == before
    source = copy / "guests" / "idle.S"
    source.write_text(source.read_text().replace("mostly pauses", "pauses a lot"))
    assert "Built" in build(copy).stdout
    assert b"pauses a lot" in image.read_bytes()
    image.write_bytes(b"damaged")
    assert "Built" in build(copy).stdout
    assert image.read_bytes() != b"damaged"


def test_removed_guests_disappear(copy):
    build(copy)
    (copy / "guests" / "idle.S").unlink()
    build(copy)
    assert "idle.bin" not in images(copy)


def test_missing_binutils_is_one_sentence_and_status_2(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    result = build(copy, PATH=str(tmp_path / "empty"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "apt-get install binutils" in result.stderr


def test_a_broken_source_is_named_and_leaves_the_images(copy):
    build(copy)
    before = images(copy)
    (copy / "guests" / "idle.S").write_text(".intel_syntax noprefix\nnonsense eax\n")
    result = build(copy)
    assert result.returncode == 2
    assert "idle.S:2" in result.stderr
    assert "Traceback" not in result.stderr
    assert images(copy) == before
