"""The same tests on real KVM and on the reference machine.

A folder's conftest.py takes ``system`` from here; a test that only KVM can pass, or that would take the model
too long, says ``@on_kvm``.  Tests of KVM itself are borrowed for the model by ``borrow``.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from typing import Any

import pytest

from pykvm.backends import open_system
from pykvm.machine import System
from pykvm.model.system import ModelSystem
from pykvm.profiles import DEVELOPMENT_HOST, profile


@pytest.fixture(params=["kvm", "model"])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    """/dev/kvm, then the model."""
    with open_system(request.param) as opened:
        yield opened


@pytest.fixture(params=["model"], name="system")
def _model(request: pytest.FixtureRequest) -> Iterator[ModelSystem]:
    with ModelSystem() as opened:
        yield opened


@pytest.fixture(params=["model"], name="system")
def _profiled(request: pytest.FixtureRequest) -> Iterator[ModelSystem]:
    with ModelSystem(profile=profile(*DEVELOPMENT_HOST)) as opened:
        yield opened


on_kvm = pytest.mark.parametrize("system", ["kvm"], indirect=True)
"""Not on the model."""


def borrow(
    namespace: dict[str, Any], module: str, *, without: Collection[str] = (), profiled: bool = False
) -> None:
    """Fill a test module with the tests and fixtures of ``module``, to run on the model.

    ``profiled``: with KVM's MMU of the host that was measured first.  ``without`` are the tests that need
    what only the kernel has.  A name there that does not exist is an error, so the list stays true.
    """
    source = vars(importlib.import_module(module))
    tests = [name for name in source if name.startswith("test_")]
    assert set(without) <= set(tests), f"{module} has no {sorted(set(without) - set(tests))}"
    fixtures = [name for name, value in source.items() if type(value).__name__ == "FixtureFunctionDefinition"]
    namespace |= {name: source[name] for name in [*fixtures, *tests] if name not in without}
    namespace["system"] = _profiled if profiled else _model
