"""Ownership of a kernel file descriptor: one base class for every kind of fd.

SAFETY: the descriptor lives in a C struct (hot/handle.c) that counts the calls inside the kernel.  Closing
marks it, and whoever leaves last closes the fd, so no thread can ever reach a descriptor number that the
kernel has given to somebody else.  The struct itself is kept alive by the Python object, and every method
that passes it to C holds a reference to that object for the length of the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pykvm.abi import ffi, lib
from pykvm.errors import BusyError, ClosedError, KvmError, from_errno

if TYPE_CHECKING:
    from pykvm.abi.library import CData

Refusals = Mapping[int, tuple[type[KvmError], str]]

_CLOSED = lib.PYKVM_ECLOSED
_BUSY = lib.PYKVM_EBUSY


class Managed:
    """Something that owns a file descriptor; a context manager; safe to close twice and from any thread."""

    def __init__(self, handle: CData) -> None:
        self._handle = handle

    @staticmethod
    def new_handle(fd: int, exclusive: bool = False) -> CData:
        """A handle that takes over ``fd``."""
        handle = ffi.new("struct pykvm_handle *")
        lib.pykvm_handle_init(handle, fd, int(exclusive))
        return handle

    @property
    def closed(self) -> bool:
        return bool(self._handle.closed)

    @property
    def name(self) -> str:
        """How messages call this object."""
        return type(self).__name__

    def fileno(self) -> int:
        """The descriptor, for poll and friends.  Raises ClosedError."""
        if self._handle.closed:
            raise self._closed_error()
        return int(self._handle.fd)

    def ioctl(
        self, request: int, argument: CData | None, operation: str, refusals: Refusals | None = None
    ) -> int:
        """Issue an ioctl with a pointer (or none); returns its non-negative result.

        ``operation`` is the ioctl's name; ``refusals`` maps its documented errnos to exceptions.
        """
        # SAFETY: ``argument`` is owned by the caller's frame until the call returns; KVM keeps no pointer.
        result = lib.pykvm_ioctl(self._handle, request, ffi.NULL if argument is None else argument)
        if result < 0:
            raise self._error(result, operation, refusals)
        return result

    def ioctl_int(self, request: int, argument: int, operation: str, refusals: Refusals | None = None) -> int:
        """Issue an ioctl whose argument is a plain number."""
        result = lib.pykvm_ioctl_int(self._handle, request, argument)
        if result < 0:
            raise self._error(result, operation, refusals)
        return result

    def _error(self, result: int, operation: str, refusals: Refusals | None = None) -> Exception:
        if result == _CLOSED:
            return self._closed_error()
        if result == _BUSY:
            return BusyError(f"{self.name} is in use by another thread; kick it and wait before {operation}.")
        return from_errno(-result, operation, refusals)

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"{self.name} is closed; create a new one.")

    def close(self) -> None:
        lib.pykvm_handle_close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None:
            lib.pykvm_handle_close(handle)

    def __repr__(self) -> str:
        return f"<{self.name}{' (closed)' if self.closed else ''}>"
