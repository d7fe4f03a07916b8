"""The rows of docs/reference/hosts.md B to F, on a real KVM and on the model; see tests/mmu_rig.py."""

from __future__ import annotations

from tests.mmu_rig import host, native, nested, shadow

__all__ = ["host", "native", "nested", "shadow"]
