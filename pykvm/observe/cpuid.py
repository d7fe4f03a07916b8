"""The host processor's CPUID leaves, as user code sees them."""

from __future__ import annotations

from typing import Final

from pykvm.observe.arena import CODE
from pykvm.observe.host_cpu import HostCase, HostCpu
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import Registers

_CPUID: Final = b"\x0f\xa2"
_SUBLEAVES: Final = {7: 3, 0xD: 3}
"""How many subleaves to read of leaves that have some."""
_INDEXED: Final = 1
_MOST: Final = 0x40


def host_cpuid(cpu: HostCpu) -> tuple[CpuidEntry, ...]:
    """The basic and the extended leaves."""
    entries = []
    for first in (0, 0x80000000):
        last = _leaf(cpu, first, 0, 0).eax
        for leaf in range(first, min(last, first + _MOST) + 1):
            count = _SUBLEAVES.get(leaf, 0)
            entries += [_leaf(cpu, leaf, index, _INDEXED) for index in range(count)] or [
                _leaf(cpu, leaf, 0, 0)
            ]
    return tuple(entries)


def _leaf(cpu: HostCpu, leaf: int, index: int, flags: int) -> CpuidEntry:
    done = cpu.execute(HostCase(_CPUID, Registers(rax=leaf, rcx=index, rip=CODE))).registers
    return CpuidEntry(leaf, index, flags, done.rax, done.rbx, done.rcx, done.rdx)
