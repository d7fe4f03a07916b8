"""Why a vCPU came back from running: one small immutable type per reason.

They are named tuples, since one is made for every exit of a guest and a guest may exit 100,000 times a
second.  ``match`` works on them.  Sources: api.rst section 5 ("The kvm_run structure").
"""

from __future__ import annotations

from typing import NamedTuple


class IoOut(NamedTuple):
    """OUT or OUTS: ``repeat`` items of ``size`` bytes (1, 2, 4) were written to ``port``."""

    port: int
    size: int
    data: bytes
    repeat: int = 1

    @property
    def value(self) -> int:
        """The data as a little-endian integer."""
        return int.from_bytes(self.data, "little")


class IoIn(NamedTuple):
    """IN or INS wants ``repeat`` items of ``size`` bytes from ``port``; answer with ``Vcpu.reply``."""

    port: int
    size: int
    repeat: int = 1


class MmioWrite(NamedTuple):
    """A store of 1 to 8 bytes to a guest-physical address without (writable) memory."""

    gpa: int
    data: bytes


class MmioRead(NamedTuple):
    """A load of ``size`` (1 to 8) bytes from an address without memory; answer with ``Vcpu.reply``."""

    gpa: int
    size: int


class Halted(NamedTuple):
    """HLT with no in-kernel interrupt controller."""


class Shutdown(NamedTuple):
    """Triple fault, or the host gave up on the vCPU's state."""


class FailEntry(NamedTuple):
    """The hardware refused to enter the guest; ``reason`` is its own code, ``cpu`` the host's CPU number."""

    reason: int
    cpu: int


class InternalError(NamedTuple):
    """KVM could not go on (KVM_EXIT_INTERNAL_ERROR).

    ``suberror``: 1 emulation, 2 simultaneous exceptions, 3 delivery of an event, 4 unexpected exit.
    ``instruction`` holds up to 15 fetched bytes at RIP where KVM tells them, else it is empty.
    """

    suberror: int
    data: tuple[int, ...]
    instruction: bytes = b""
    disassembly: str = ""

    def __str__(self) -> str:
        name = {
            1: "emulation failed",
            2: "simultaneous exceptions",
            3: "event delivery",
            4: "unexpected exit",
        }
        text = f"KVM internal error {self.suberror} ({name.get(self.suberror, 'unknown')})"
        if self.instruction:
            text += f" at bytes {self.instruction.hex(' ')}"
        if self.disassembly:
            text += f": {self.disassembly}"
        return text


class DebugStop(NamedTuple):
    """Single step or breakpoint (KVM_SET_GUEST_DEBUG): exception vector, linear RIP, DR6 and DR7."""

    exception: int
    pc: int
    dr6: int
    dr7: int


class Kicked(NamedTuple):
    """``Vcpu.kick`` ended the run; nothing happened in the guest and the next run goes on."""


class DirtyRingFull(NamedTuple):
    """The vCPU's dirty ring passed its soft limit; collect, then run again."""


class MemoryFault(NamedTuple):
    """KVM_EXIT_MEMORY_FAULT (needs KVM_CAP_MEMORY_FAULT_INFO): the access to [gpa, gpa+size) failed."""

    flags: int
    gpa: int
    size: int


class SystemEvent(NamedTuple):
    """The guest asked for shutdown (1), reset (2), reported a crash (3) …; ``data`` as KVM gives it."""

    type: int
    data: tuple[int, ...]


class InterruptWindow(NamedTuple):
    """The guest can take an interrupt now (asked for with ``request_interrupt_window``)."""


class UnknownExit(NamedTuple):
    """An exit reason that has no type here; ``payload`` is the union of kvm_run, 256 bytes."""

    reason: int
    payload: bytes


Exit = (
    IoOut
    | IoIn
    | MmioWrite
    | MmioRead
    | Halted
    | Shutdown
    | FailEntry
    | InternalError
    | DebugStop
    | Kicked
    | DirtyRingFull
    | MemoryFault
    | SystemEvent
    | InterruptWindow
    | UnknownExit
)
