"""CPUID as KVM answers it from the configured leaves (SDM vol. 2, CPUID)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.instruction import RAX, RBX, RCX, RDX
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.xstate import compacted_size, standard_size
from pykvm.x86.bits import Cr4
from pykvm.x86.cpuid import CpuidEntry, find

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

_APIC: Final = 1 << 9
_OSXSAVE: Final = 1 << 27
_OSPKE: Final = 1 << 4
_APIC_ENABLE: Final = 1 << 11
_SUBLEAF_IN_CL: Final = frozenset({0xB, 0x1F})
_HYPERVISOR: Final = range(0x40000000, 0x50000000)
_M32: Final = 0xFFFFFFFF


def current(cpu: Processor, leaf: CpuidEntry) -> CpuidEntry:
    """The leaf with the bits that follow control registers and XCR0."""
    if leaf.function == 1:
        ecx = leaf.ecx & ~_OSXSAVE | (_OSXSAVE if cpu.cr4 & Cr4.OSXSAVE else 0)
        edx = leaf.edx & ~_APIC | (_APIC if cpu.apic_base & _APIC_ENABLE else 0)
        return replace(leaf, ecx=ecx, edx=edx)
    if leaf.function == 7 and leaf.index == 0:
        return replace(leaf, ecx=leaf.ecx & ~_OSPKE | (_OSPKE if cpu.cr4 & Cr4.PKE else 0))
    if leaf.function == 0xD and leaf.index == 0:
        return replace(leaf, ebx=standard_size(cpu, cpu.xcr0))
    if leaf.function == 0xD and leaf.index == 1 and leaf.eax & 0xA:
        return replace(leaf, ebx=compacted_size(cpu, cpu.xcr0 | cpu.xss))
    return leaf


def _beyond(cpu: Processor, function: int) -> int | None:
    """The leaf that answers for ``function`` above the range of its class: Intel's highest basic one.

    None where the function is in range, or the vendor answers with zeros.
    """
    basic = find(cpu.cpuid, 0)
    if basic is None or cpu.features.amd:
        return None
    base = function & 0xFFFFFF00 if function in _HYPERVISOR else function & 0x80000000
    first = find(cpu.cpuid, base)
    return basic.eax if first is None or function > first.eax else None


def lookup(cpu: Processor, function: int, index: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX and EDX of a leaf."""
    leaf = find(cpu.cpuid, function, index)
    if leaf is None:
        substitute = _beyond(cpu, function)
        leaf = None if substitute is None else find(cpu.cpuid, substitute, index)
    if leaf is not None:
        leaf = current(cpu, leaf)
        return leaf.eax, leaf.ebx, leaf.ecx, leaf.edx
    if function in _SUBLEAF_IN_CL:
        # Beyond the last level of the topology ECX repeats CL, and EDX is the x2APIC id all the same.
        level = find(cpu.cpuid, function, 1)
        if level is not None:
            return 0, 0, index & 0xFF, level.edx
    return 0, 0, 0, 0


@semantics("cpuid")
def cpuid(cpu: Processor, insn: Instruction) -> None:
    answer = lookup(cpu, cpu.regs[RAX] & _M32, cpu.regs[RCX] & _M32)
    cpu.regs[RAX], cpu.regs[RBX], cpu.regs[RCX], cpu.regs[RDX] = answer
