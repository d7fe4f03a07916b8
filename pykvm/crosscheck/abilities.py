"""What a machine can do beyond the Protocols, found out by trying (hosts.md C.4)."""

from __future__ import annotations

from contextlib import suppress
from typing import Final, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from pykvm.crosscheck.rig import Rig
from pykvm.crosscheck.scenario import CodeGuest, Contents, Mapping, Scenario, TablePlan, VcpuPlan
from pykvm.crosscheck.steps import SlotPlan
from pykvm.errors import PykvmError
from pykvm.guest.boot import BootMode
from pykvm.guest.launch import PAGING
from pykvm.guest.modes import MODES
from pykvm.machine import DebugStop, Registers, SlotFlags, System
from pykvm.memory import PAGE_SIZE
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


_Mode = tuple[str, int]
_steps: WeakKeyDictionary[System, dict[_Mode, bool]] = WeakKeyDictionary()
_reads: WeakKeyDictionary[System, dict[_Mode, bool]] = WeakKeyDictionary()


def can_single_step(system: System, mode: str, cpl: int) -> bool:
    """Whether single step works in ``mode`` (a key of MODES) at ``cpl``: some nops are stepped through.

    Hosts that run user code natively and interpret supervisor code (kvm_pvm) can at CPL 0 only.
    """
    known = _steps.setdefault(system, {})
    if (mode, cpl) not in known:
        known[mode, cpl] = _probe_steps(system, mode, cpl)
    return known[mode, cpl]


def marks_reads(system: System, mode: str, cpl: int) -> bool:
    """Whether the log also names pages that were only read or executed, or walked through as tables.

    With two-dimensional paging every fault maps a page writable, and that marks it; shadow paging does the
    same for guests without paging (hosts.md B.9, C.1).  The model never does.
    """
    known = _reads.setdefault(system, {})
    if (mode, cpl) not in known:
        known[mode, cpl] = system.backend != "model" and _probe_reads(system, mode, cpl)
    return known[mode, cpl]


def _guest(mode: str, cpl: int, code: bytes) -> CodeGuest:
    flags = Rflags.FIXED | (Rflags.IOPL3 if cpl else 0)
    return CodeGuest(
        memories=(_MEMORY,),
        slots=(SlotPlan(0, 0, 0, 0, _MEMORY, SlotFlags.LOG_DIRTY_PAGES),),
        contents=(Contents(0, _CODE, code + b"\xe6\x80\xf4"),),  # out 0x80, al; hlt
        vcpus=(VcpuPlan(mode, cpl, Registers(rip=_CODE, rsp=_CODE, rflags=flags)),),
        tables=TablePlan(_TABLES, 32, handlers=_HANDLERS),
        mappings=(Mapping(0, 0, _MEMORY, flags=0x27),) if MODES[mode] in PAGING else (),
    )


def _probe_steps(system: System, mode: str, cpl: int) -> bool:
    guest = _guest(mode, cpl, b"\x90" * _NOPS)
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


def _probe_reads(system: System, mode: str, cpl: int) -> bool:
    # mov al, [si], where RSI is 0: page 0 is read and the page of the code executed.
    code = b"\x8a\x04" if MODES[mode] in {BootMode.REAL, BootMode.PROTECTED16} else b"\x8a\x06"
    with Rig(Scenario("reads", _guest(mode, cpl, code), ()), system) as rig:
        with suppress(PykvmError):
            rig.machine.vcpus[0].run()
            marked = rig.machine.get_dirty_log(rig.slots[0]).tolist()
            return 0 in marked or _CODE // PAGE_SIZE in marked
    return False
