"""Migrations of real guests run on KVM and on the model."""

from __future__ import annotations

from tests.backends import system

__all__ = ["system"]
