"""How a host runs guest code in each processor mode: measured with a guest of four instructions.

The guest counts CX or ECX down and then writes to a port for ever.  KVM's statistic ``insn_emulation``
tells whether the loop ran on the processor or in the kernel's instruction emulator.
"""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import dataclass
from typing import Any

from pykvm.errors import KvmError
from pykvm.guest.boot import Arena, BootMode, SystemTables, boot_state
from pykvm.guest.launch import PAGING
from pykvm.guest.pagetables import PageTables
from pykvm.machine import Exit, IoOut, Kicked, Machine, Shutdown, System, Vcpu
from pykvm.memory import GuestMemory

# One encoding for all modes (operand sizes follow the mode):
#   again: dec ecx ; jnz again ; port: out 0x80, al ; jmp port
_CODE = bytes.fromhex("ffc9 75fc e680 ebfc")
_PORT = 0x80
_ENTRY = 0x8000
_STACK = 0x7000
_TABLES = 0x10000
_MEMORY = 1 << 20

_FEW = 1_000  # rounds that cost milliseconds even if each instruction is emulated
_MANY = 60_000  # fits CX; tens of microseconds on a processor
_EXITS = 50
_REPEATS = 3
_TIME_LIMIT = 2.0


MODES = (
    (BootMode.LONG, 3),
    (BootMode.LONG, 0),
    (BootMode.LA57, 3),
    (BootMode.LA57, 0),
    (BootMode.PAE, 3),
    (BootMode.PAE, 0),
    (BootMode.PAGED32, 3),
    (BootMode.PAGED32, 0),
    (BootMode.PROTECTED32, 3),
    (BootMode.PROTECTED32, 0),
    (BootMode.PROTECTED16, 0),
    (BootMode.REAL, 0),
)


@dataclass(frozen=True, slots=True)
class ModeResult:
    """``execution`` is ``native``, ``emulated`` or ``unavailable`` (then ``reason`` says why).

    The costs are the least of a few runs, in seconds; an exit is KVM_RUN, the exit and the Python call.
    ``shadow_pages`` is KVM's mmu_cache_miss: page-table pages that it made for a guest in this mode.
    """

    mode: BootMode
    cpl: int
    execution: str
    instruction_seconds: float = 0.0
    exit_seconds: float = 0.0
    shadow_pages: int = 0
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        available = self.execution != "unavailable"
        return {
            "mode": self.mode.value,
            "cpl": self.cpl,
            "execution": self.execution,
            "nanoseconds_per_instruction": self.instruction_seconds * 1e9 if available else None,
            "microseconds_per_exit": self.exit_seconds * 1e6 if available else None,
            "reason": self.reason,
        }


class _StoppedError(Exception):
    """The guest did something else than writing to the port."""


def _run(vcpu: Vcpu) -> float:
    """Run to the next exit, which must be the port write; its seconds."""
    watchdog = threading.Timer(_TIME_LIMIT, vcpu.kick)
    watchdog.start()
    try:
        begin = time.perf_counter()
        reason: Exit = vcpu.run()
        seconds = time.perf_counter() - begin
    finally:
        watchdog.cancel()
        watchdog.join()
    if isinstance(reason, Kicked):
        raise _StoppedError(f"the guest did not come back within {_TIME_LIMIT:g} s")
    if isinstance(reason, Shutdown):
        raise _StoppedError("the guest stopped with a triple fault")
    if not isinstance(reason, IoOut) or reason.port != _PORT:
        raise _StoppedError(f"the guest stopped with {type(reason).__name__}")
    return seconds


def _count_down(vcpu: Vcpu, rounds: int) -> float:
    """Seconds for ``rounds`` turns of the loop and one exit, the least of a few runs."""
    best = float("inf")
    for _ in range(_REPEATS):
        registers = vcpu.get_registers()
        registers.rip, registers.rcx = _ENTRY, rounds
        if vcpu.get_special_registers().cs.base:  # real mode: RIP counts from CS
            registers.rip = _ENTRY - vcpu.get_special_registers().cs.base
        vcpu.set_registers(registers)
        best = min(best, _run(vcpu))
    return best


def _boot(machine: Machine, mode: BootMode, cpl: int) -> Vcpu:
    memory = GuestMemory(_MEMORY)
    machine.create_slot(memory, 0)
    memory.write(_ENTRY, _CODE)
    arena = Arena(_TABLES, _MEMORY)
    vcpu = machine.create_vcpu()
    cr3 = 0
    if mode in PAGING:
        paging = PageTables(PAGING[mode], memory, arena.take)
        paging.map(0, 0, _MEMORY)
        cr3 = paging.cr3
        vcpu.set_cpuid(machine.supported_cpuid)
    tables = None
    if mode is not BootMode.REAL:
        wide = mode in (BootMode.LONG, BootMode.LA57)
        tables = SystemTables.build(memory, arena.take, wide=wide, stacks=[_STACK])
    boot_state(mode, entry=_ENTRY, stack=_STACK, cpl=cpl, cr3=cr3, tables=tables).apply(vcpu)
    return vcpu


def measure_mode(system: System, mode: BootMode, cpl: int) -> ModeResult:
    """Run the guest in one mode.  A host that cannot gives ``unavailable``; nothing is raised for that."""
    try:
        with system.create_machine() as machine:
            vcpu = _boot(machine, mode, cpl)
            _count_down(vcpu, 1)
            exit_seconds = min(_run(vcpu) for _ in range(_EXITS))
            before = vcpu.statistics()
            seconds = _count_down(vcpu, _FEW)
            emulated = vcpu.statistics().value("insn_emulation") - before.value("insn_emulation")
            rounds = _FEW
            native = emulated < _FEW
            if native:
                rounds = _MANY
                seconds = _count_down(vcpu, rounds)
            return ModeResult(
                mode,
                cpl,
                "native" if native else "emulated",
                max(0.0, seconds - exit_seconds) / (2 * rounds),
                exit_seconds,
                machine.statistics().value("mmu_cache_miss"),
            )
    except KvmError as error:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        return ModeResult(mode, cpl, "unavailable", reason=f"{error.operation} failed with {name}")
    except _StoppedError as error:
        return ModeResult(mode, cpl, "unavailable", reason=str(error))


def measure_modes(system: System) -> list[ModeResult]:
    """All modes, the most useful first; about a second where everything is emulated."""
    return [measure_mode(system, mode, cpl) for mode, cpl in MODES]
