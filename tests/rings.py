"""The dirty rings that tests ask for: small ones, so that they fill up."""

from __future__ import annotations

from pykvm.errors import PykvmError, RingSizeError
from pykvm.kvm import KvmSystem


def _least_ring() -> int:
    try:
        with KvmSystem() as system:
            for entries in (256, 512):
                with system.create_machine() as machine:
                    try:
                        machine.enable_dirty_ring(entries)
                    except RingSizeError:
                        continue
                    return entries
    except PykvmError:
        return 256  # no KVM, or one without rings: the tests say so themselves
    return 1024


LEAST_RING = _least_ring()
"""Entries of the smallest ring that this host takes: 256, or 1024 where KVM keeps 512 more in reserve for
what the processor logs (PML)."""
