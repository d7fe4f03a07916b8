"""What a machine can do beyond the Protocols, found out by trying (hosts.md C.4)."""

from __future__ import annotations

from contextlib import suppress
from typing import Final, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from pykvm.crosscheck.rig import Rig
from pykvm.crosscheck.scenario import CodeGuest, Contents, Mapping, Scenario, TablePlan, VcpuPlan
from pykvm.crosscheck.steps import SlotPlan
from pykvm.errors import PykvmError
from pykvm.guest.launch import PAGING
from pykvm.guest.modes import MODES
from pykvm.machine import DebugStop, Registers, System
from pykvm.x86.bits import Rflags

_CODE: Final = 0x1000
_HANDLERS: Final = 0x2000
_TABLES: Final = 0x10000
_MEMORY: Final = 1 << 20
_NOPS: Final = 4


@runtime_checkable
class Debuggable(Protocol):
    """A vCPU that can be told to stop after each instruction."""

    def set_guest_debug(self, *, single_step: bool = False) -> None: ...
    def clear_guest_debug(self) -> None: ...


_known: WeakKeyDictionary[System, dict[tuple[str, int], bool]] = WeakKeyDictionary()


def can_single_step(system: System, mode: str, cpl: int) -> bool:
    """Whether single step works in ``mode`` (a key of MODES) at ``cpl``: some nops are stepped through.

    Hosts that run user code natively and interpret supervisor code (kvm_pvm) can at CPL 0 only.
    """
    known = _known.setdefault(system, {})
    if (mode, cpl) not in known:
        known[mode, cpl] = _probe(system, mode, cpl)
    return known[mode, cpl]


def _probe(system: System, mode: str, cpl: int) -> bool:
    flags = Rflags.FIXED | (Rflags.IOPL3 if cpl else 0)
    guest = CodeGuest(
        memories=(_MEMORY,),
        slots=(SlotPlan(0, 0, 0, 0, _MEMORY),),
        # nop, …; out 0x80, al; hlt: an end also where nothing stops the guest
        contents=(Contents(0, _CODE, b"\x90" * _NOPS + b"\xe6\x80\xf4"),),
        vcpus=(VcpuPlan(mode, cpl, Registers(rip=_CODE, rsp=_CODE, rflags=flags)),),
        tables=TablePlan(_TABLES, 32, handlers=_HANDLERS),
        mappings=(Mapping(0, 0, _MEMORY),) if MODES[mode] in PAGING else (),
    )
    with Rig(Scenario("single step", guest, ()), system) as rig:
        vcpu = rig.machine.vcpus[0]
        if not isinstance(vcpu, Debuggable):
            return False
        with suppress(PykvmError):
            vcpu.set_guest_debug(single_step=True)
            for number in range(1, _NOPS):
                reason = vcpu.run()
                if not isinstance(reason, DebugStop) or reason.pc != _CODE + number:
                    return False
            return True
    return False
