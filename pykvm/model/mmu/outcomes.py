"""How an access of the guest ends when it does not simply reach memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pykvm.errors import PykvmError


class RetPf(Enum):
    """``RET_PF_*``: what became of a fault that KVM took (kvm-mmu.md 7.6)."""

    CONTINUE = "continue"
    RETRY = "retry"
    EMULATE = "emulate"
    WRITE_PROTECTED = "write-protected"
    INVALID = "invalid"
    FIXED = "fixed"
    SPURIOUS = "spurious"


@dataclass(slots=True)
class GuestPageFault(Exception):
    """KVM (or the processor) delivers #PF to the guest: error code and CR2.

    ``injected``: by KVM, which counts it as pf_guest; with nested paging the processor does it alone.
    """

    error: int
    address: int
    injected: bool = True


@dataclass(slots=True)
class EmulateInstruction(Exception):
    """The instruction must be carried out by KVM's emulator (12.3).

    ``gpa``: the faulting guest-physical address, or None for a fault in shadow paging.  ``address``: what
    ``kvm_mmu_page_fault`` was called with (linear with shadow paging, else guest-physical).
    ``allow_retry``: EMULTYPE_ALLOW_RETRY_PF.  ``write_pf_to_sp``: EMULTYPE_WRITE_PF_TO_SP.
    """

    address: int
    gpa: int | None = None
    allow_retry: bool = False
    write_pf_to_sp: bool = False


@dataclass(slots=True)
class TripleFault(Exception):
    """The vCPU shuts down: CR3 has no slot and the profile knows no dummy root."""


@dataclass(slots=True)
class Refault(Exception):
    """KVM took a fault and fixed it: the guest starts the instruction again."""


@dataclass(slots=True)
class LeaveGuest(Exception):
    """KVM_RUN returns before the instruction was executed: the dirty ring is full."""


class StuckGuestError(PykvmError):
    """An access of the guest faults for ever; a real KVM_RUN would never return."""
