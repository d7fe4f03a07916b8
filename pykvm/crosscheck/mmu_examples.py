"""Worked examples of what KVM's MMU does: small scenarios and what the reference sheet says they show.

They are those of docs/reference/kvm-mmu.md, sections 14.2 and 14.3; expected values come from there.
``pykvm explain NAME`` shows one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pykvm.crosscheck.mmu_example import Example
from pykvm.crosscheck.mmu_examples_emulated import emulated_examples
from pykvm.crosscheck.mmu_examples_native import native_examples

EXAMPLES: Final[Mapping[str, Example]] = {
    example.name: example for example in (*emulated_examples(), *native_examples())
}
"""By name."""
