"""Whether an emulator stands for the processor: its bugs must not be taken for KVM's or the model's."""

from __future__ import annotations

import os
from typing import Final

QEMU_TCG: Final = "qemu-tcg"
"""QEMU without acceleration: its translator TCG is the processor."""


def emulator() -> str:
    """The name of the emulator that this process's processor is, as a lab says it; empty on processors."""
    return os.environ.get("PYKVM_LAB_EMULATOR", "")
