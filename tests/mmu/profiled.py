"""Run the tests of KVM's interface (tests/kvm) on the model with the MMU of known hosts.

The tests are those that tests/model has already on the plain reference machine; here the same calls go
through the slots, logs and rings of KVM's own MMU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pytest

from pykvm.model.system import ModelSystem
from pykvm.profiles import profile
from tests.backends import borrow

PROFILES = ("amd-shadow 6.1", "amd-npt 6.12", "intel-ept-nopml 7.2")
"""Beside the one of tests/model/test_profiled_*.  Without PML: its rings are larger than those that the tests
ask for (tests/rings.py)."""


@pytest.fixture(params=[f"model {name}" for name in PROFILES], name="system")
def _profiled(request: pytest.FixtureRequest) -> Iterator[ModelSystem]:
    kind, era = request.param.split()[1:]
    with ModelSystem(profile=profile(kind, era)) as opened:
        yield opened


def borrow_profiled(namespace: dict[str, Any], module: str, *, without: Collection[str] = ()) -> None:
    """As ``borrow``, on each of PROFILES; ``module`` is one of tests/model."""
    borrow(namespace, module, without=without)
    namespace["system"] = _profiled
