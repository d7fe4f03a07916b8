"""What kvm_amd does to a vCPU, beside running it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.state import State
from pykvm.x86.bits import Cr0
from pykvm.x86.cpuid import find

if TYPE_CHECKING:
    from pykvm.model.profiled.processor import HostProcessor

_KEPT_CR0: Final = int(Cr0.NW | Cr0.CD)
_INITIALISED: Final = (
    *("regs", "rip", "rflags", "segments", "tr", "ldt", "gdt", "idt"),
    *("cr2", "cr3", "cr4", "cr8", "efer", "pdptrs", "dr", "dr6", "dr7"),
)
_RDX: Final = 2
_BUSY_TSS16: Final = 3


def reset_after_shutdown(cpu: HostProcessor) -> None:
    """``shutdown_interception``: the VMCB is undefined after a triple fault, so the vCPU gets an INIT.

    INIT keeps CD and NW of CR0, MSRs, and the state of x87 and SSE (SDM vol. 3, table 10-1); RDX is CPUID
    leaf 1's EAX.
    """
    fresh = State(cpu.cpuid)
    for name in _INITIALISED:
        setattr(cpu, name, getattr(fresh, name))
    cpu.tr = replace(fresh.tr, type=_BUSY_TSS16)  # init_vmcb
    leaf = find(cpu.cpuid, 1)
    if leaf is not None:
        cpu.regs[_RDX] = leaf.eax
    cpu.cr0 = int(Cr0.ET) | cpu.cr0 & _KEPT_CR0
    cpu.update_mode()
    cpu.host_changed_control()
