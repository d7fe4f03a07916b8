"""The machines that the cross-check holds against each other: ``system`` is the real KVM, ``model`` ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm.model.system import ModelSystem


@pytest.fixture
def model() -> Iterator[ModelSystem]:
    """The reference machine."""
    with ModelSystem() as opened:
        yield opened
