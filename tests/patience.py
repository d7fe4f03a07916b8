"""How long to wait for what should come at once: longer where an emulator runs the host.

A bound of this kind ends a hang; no test may pass because of it.  ``PYKVM_TEST_PATIENCE`` is the factor, by
default that of the lab's emulator (``PYKVM_LAB_EMULATOR``), and 1 on other machines.
"""

from __future__ import annotations

import os

_EMULATORS = {"qemu-tcg": 6.0, "bochs": 20.0}
PATIENCE = float(
    os.environ.get("PYKVM_TEST_PATIENCE") or _EMULATORS.get(os.environ.get("PYKVM_LAB_EMULATOR", ""), 1.0)
)


def patient(seconds: float) -> float:
    """``seconds`` of an ordinary machine, in those of this one."""
    return seconds * PATIENCE
