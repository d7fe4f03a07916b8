"""Everything that pykvm raises on purpose, and the one place where an errno becomes an exception.

Each class carries the exit status that the command line ends with, so that a script can tell a missing
device from a guest that lost memory without reading the message.  The statuses are documented in
``docs/exit-status.md``.  A message is one sentence (two at most): what is wrong, then what to do about it.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Mapping
from typing import ClassVar


class PykvmError(Exception):
    """Base of all deliberate errors; ``exit_status`` is what the command line returns."""

    exit_status: ClassVar[int] = 1


class UsageError(PykvmError, ValueError):
    """An argument is out of its range or does not fit another one; nothing was changed."""

    exit_status = 2


class ClosedError(PykvmError):
    """The object was closed; its kernel resources are gone and it cannot be used again."""


class BusyError(PykvmError):
    """Another thread is inside this vCPU right now; kick it and wait before touching its state."""


# --- the host ------------------------------------------------------------------------------------


class HostError(PykvmError):
    """The host lacks something that pykvm needs."""

    exit_status = 3


class DeviceMissingError(HostError):
    """/dev/kvm does not exist or is not a KVM device."""

    exit_status = 3


class DevicePermissionError(HostError):
    """/dev/kvm exists and this user may not open it."""

    exit_status = 4


class CapabilityError(HostError):
    """The kernel does not offer a KVM capability that the request needs."""

    exit_status = 5


# --- refusals of the kernel ----------------------------------------------------------------------


class KvmError(PykvmError, OSError):
    """An ioctl failed; ``errno`` and ``operation`` (the ioctl's name) say which and how.

    The subclasses below name the refusals that api.rst documents; a bare KvmError is one it does not.
    """

    exit_status = 6

    def __init__(self, number: int, operation: str, advice: str = "") -> None:
        name = _errno.errorcode.get(number, str(number))
        text = f"{operation} failed with {name} ({os.strerror(number)})"
        super().__init__(number, f"{text}: {advice}" if advice else f"{text}.")
        self.operation = operation

    def __str__(self) -> str:
        return str(self.strerror)


class SlotError(KvmError):
    """SET_USER_MEMORY_REGION was refused."""


class SlotOverlapError(SlotError):
    """The slot would overlap another one of the same address space (EEXIST)."""


class SlotAlignmentError(SlotError):
    """gpa, size or host address is not a multiple of 4096 bytes (EINVAL)."""


class SlotChangeError(SlotError):
    """Size, backing memory and READONLY of a live slot cannot change (EINVAL)."""


class SlotAbsentError(SlotError):
    """There is no such slot (ENOENT, or EINVAL on deletion)."""


class DirtyLogError(KvmError):
    """A dirty-log ioctl was refused."""


class LoggingDisabledError(DirtyLogError):
    """The slot is absent or KVM_MEM_LOG_DIRTY_PAGES is off for it (ENOENT)."""


class DirtyRingModeError(DirtyLogError):
    """The bitmap ioctls do not exist in ring mode, or the ring ones outside it (ENXIO / EINVAL)."""


class ClearRangeError(DirtyLogError):
    """KVM_CLEAR_DIRTY_LOG's range is misaligned or outside the slot (EINVAL)."""


class RingSizeError(DirtyLogError):
    """The dirty ring's size is not a power of two within the host's limits (EINVAL / E2BIG)."""


class RingOrderError(DirtyLogError):
    """The dirty ring must be enabled once, and before the first vCPU (EINVAL)."""


class RingOverflowError(PykvmError):
    """A dirty ring reached its hard limit: entries were, or may have been, overwritten.

    Pages are lost from the log and only a full copy is safe.  Happens on hosts that emulate guest code
    in batches and look at the soft limit only between batches.
    """

    exit_status = 9


class MsrError(KvmError):
    """KVM refused to read or write a model-specific register; ``index`` says which.

    The ioctl itself succeeds and tells how far it came; EINVAL stands for that.
    """

    def __init__(self, index: int, operation: str, advice: str) -> None:
        super().__init__(_errno.EINVAL, operation)
        self.strerror = f"{operation} stopped at MSR {index:#x}: {advice}"
        self.index = index


class PendingExitError(PykvmError):
    """Completing an instruction's I/O led to another exit, which must be answered first: ``exit``."""

    def __init__(self, message: str, exit: object) -> None:
        super().__init__(message)
        self.exit = exit


class EmulationError(PykvmError):
    """KVM stopped with KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY or an exit nobody handles."""

    exit_status = 7


class UnsupportedInstruction(EmulationError):
    """The reference machine has no semantics for an instruction; it is never skipped.

    ``address`` is linear, ``encoding`` the instruction's bytes, ``text`` its disassembly.
    """

    def __init__(self, address: int, encoding: bytes, text: str) -> None:
        super().__init__(
            f"The reference machine cannot execute '{text}' (bytes {encoding.hex(' ')}) at {address:#x}; "
            "run this guest on a real KVM."
        )
        self.address = address
        self.encoding = encoding
        self.text = text


# --- guests --------------------------------------------------------------------------------------


class ImageError(UsageError):
    """The file is not a guest image of the named format, or does not fit the memory."""


class GuestError(PykvmError):
    """The guest did something that its host cannot go on from (triple fault, unknown exit, bad report)."""

    exit_status = 7


class GuestCorruptionError(GuestError):
    """The guest found memory that differs from what it had written: its memory did not survive."""

    exit_status = 10


class GuestTimeoutError(GuestError):
    """The guest did not reach the awaited point in time."""

    exit_status = 124


# --- migration -----------------------------------------------------------------------------------


class MigrationError(PykvmError):
    """The migration failed before the switch-over; the source still owns the guest and it runs on."""

    exit_status = 8


class WireError(MigrationError):
    """The stream is not what the format allows: wrong magic, version, checksum, order, length or address."""


class ChannelError(MigrationError):
    """The connection broke, ended or stood still; ``transmitted`` says whether the frame left in part."""

    def __init__(self, text: str, *, transmitted: bool = False) -> None:
        super().__init__(text)
        self.transmitted = transmitted


class VerificationError(PykvmError):
    """The digests of the two sides differ: a page was lost on the way.

    ``pages``: numbers of the first such pages within the guest's memory.
    """

    exit_status = 10

    def __init__(self, text: str, *, pages: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.pages = pages


class HandoverUnknownError(PykvmError):
    """The connection broke after the hand-over was sent: the guest may run at the destination.

    The source keeps it paused, since two running copies would be worse than none.
    """

    exit_status = 11


class DestinationLostError(PykvmError):
    """The destination ran the guest and then fell silent: the guest is its own and runs here no more."""

    exit_status = 12


# --- cross-check ---------------------------------------------------------------------------------


class DisagreementError(PykvmError):
    """Two machines, or a machine and the processor, disagree about a case and no rule explains it."""

    exit_status = 13


# --- labs ----------------------------------------------------------------------------------------


class LabError(HostError):
    """A lab could not do its work; the command's own failures are its exit status, not this."""


class LabTimeoutError(LabError):
    """The command in the lab did not end within the time it was given."""

    exit_status = 123


class LabDiedError(LabError):
    """The lab ended, or never came up, before its command did: a panic, an emulator's bug, no memory.

    ``diagnosis`` names the cause if the console shows a known one, ``console`` is the kept console log.
    """

    exit_status = 125

    def __init__(self, message: str, diagnosis: str = "", console: str = "") -> None:
        super().__init__(message)
        self.diagnosis = diagnosis
        self.console = console


# --- errno ---------------------------------------------------------------------------------------

_GENERIC_ADVICE = {
    _errno.ENOMEM: "the kernel is out of memory; free some or ask for less.",
    _errno.EMFILE: "too many open files; raise the limit with 'ulimit -n'.",
    _errno.ENOTTY: "this kernel does not know the ioctl; a newer one is needed.",
    _errno.EIO: "a VM belongs to the process that created it; do not use it after a fork.",
    _errno.EFAULT: "KVM could not access the host memory behind the guest address or an argument.",
}


def from_errno(
    number: int,
    operation: str,
    table: Mapping[int, tuple[type[KvmError], str]] | None = None,
) -> KvmError:
    """The exception for ``operation`` having failed with ``number`` (a positive errno).

    ``table`` maps the errnos that the ioctl documents to (class, advice); anything else becomes a plain
    KvmError with general advice where there is some.
    """
    if table and number in table:
        cls, advice = table[number]
        return cls(number, operation, advice)
    return KvmError(number, operation, _GENERIC_ADVICE.get(number, ""))
