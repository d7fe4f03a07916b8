"""Fixtures of the lab's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykvm.lab.cache import Cache
from tests.lab.fake_apt import FakeApt


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty one."""
    return Cache(tmp_path / "lab cache")


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    """apt as the tests let it be."""
    return FakeApt(tmp_path / "apt", monkeypatch)
