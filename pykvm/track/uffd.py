"""A userfaultfd that write-protects guest memory (ioctl_userfaultfd(2), admin-guide/mm/userfaultfd.rst).

Protection belongs to the page tables of the mapping, so it sees whoever writes through them: the processor
of a host thread, KVM on behalf of a vCPU, a system call that copies there.
"""

from __future__ import annotations

import errno
import os

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed
from pykvm.errors import HostError, KvmError

_NEEDED = lib.UFFD_FEATURE_PAGEFAULT_FLAG_WP | lib.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
"""Guest memory is a memfd, so shmem or hugetlbfs.  Its pages that were never touched are protected by markers
in the page tables, without UFFD_FEATURE_WP_UNPOPULATED, which is about anonymous memory."""


def _open(*, answers: bool) -> int:
    """A descriptor; ``answers``: for somebody who answers faults, also those within system calls.

    That needs a privilege, and is what a vCPU's faults are: KVM writes for its guest within KVM_RUN.  With
    UFFD_USER_MODE_ONLY it would fail with EFAULT.  Faults that the kernel resolves by itself, as it does in
    asynchronous mode, never ask, so there everybody may have the descriptor.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (0 if answers else lib.UFFD_USER_MODE_ONLY)
    fd: int = lib.pykvm_userfaultfd(flags)
    if fd >= 0:
        return fd
    if fd == -errno.EPERM and answers:
        raise HostError(
            "userfaultfd is not permitted to answer for KVM here; run with CAP_SYS_PTRACE, set the sysctl "
            "vm.unprivileged_userfaultfd to 1, or allow access to /dev/userfaultfd."
        )
    if fd in (-errno.EPERM, -errno.ENOSYS):
        raise HostError(
            "This kernel is built without userfaultfd, or a filter of system calls forbids it; "
            "use the bitmap tracker."
        )
    raise HostError(f"Cannot open a userfaultfd: {os.strerror(-fd)}.")


def _features(fd: Managed, wanted: int) -> int:
    """UFFDIO_API: what the kernel offers.  It answers once per descriptor."""
    api = ffi.new("struct uffdio_api *")
    api.api = lib.UFFD_API
    api.features = wanted
    fd.ioctl(lib.UFFDIO_API, api, "UFFDIO_API")
    return int(api.features)


class Userfaultfd(Managed):
    """A descriptor for write-protection; ``asynchronous`` lets the kernel lift it by itself (linux 6.7).

    Raises HostError where kernel or permission lacks what that needs.  Closing it ends all protection.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        offered = self.offered()
        wanted = _NEEDED | (lib.UFFD_FEATURE_WP_ASYNC if asynchronous else 0)
        if _NEEDED & ~offered:
            raise HostError(
                "This kernel cannot write-protect shared memory by userfaultfd (linux 5.19); use the bitmap "
                "tracker."
            )
        if wanted & ~offered:
            raise HostError(
                "This kernel has no asynchronous userfaultfd write-protection (linux 6.7); use the tracker "
                "'userfaultfd', which can do without, or 'bitmap'."
            )
        super().__init__(self.new_handle(_open(answers=not asynchronous)))
        _features(self, wanted)

    @staticmethod
    def offered() -> int:
        """The UFFD_FEATURE_ bits of this kernel.  Raises HostError where there is no userfaultfd."""
        with Managed(Managed.new_handle(_open(answers=False))) as asking:
            return _features(asking, 0)

    @classmethod
    def has_asynchronous(cls) -> bool:
        """Whether the kernel lifts protection by itself.  Raises HostError where there is no userfaultfd."""
        return bool(cls.offered() & lib.UFFD_FEATURE_WP_ASYNC)

    def register(self, start: int, length: int) -> None:
        """UFFDIO_REGISTER for write-protection; host address and bytes, multiples of the page size.

        Raises HostError where somebody else's userfaultfd has the memory.
        """
        argument = ffi.new("struct uffdio_register *")
        argument.range.start = start
        argument.range.len = length
        argument.mode = lib.UFFDIO_REGISTER_MODE_WP
        try:
            self.ioctl(lib.UFFDIO_REGISTER, argument, "UFFDIO_REGISTER")
        except KvmError as error:
            if error.errno != errno.EBUSY:
                raise HostError(f"The guest's memory cannot be write-protected: {error}") from error
            raise HostError(
                "Another userfaultfd tracks this guest's memory already; disarm that tracker first."
            ) from error

    def unregister(self, start: int, length: int) -> None:
        """UFFDIO_UNREGISTER: the range is protected no more."""
        argument = ffi.new("struct uffdio_range *")
        argument.start = start
        argument.len = length
        self.ioctl(lib.UFFDIO_UNREGISTER, argument, "UFFDIO_UNREGISTER")

    def protect(self, start: int, length: int) -> None:
        """UFFDIO_WRITEPROTECT: the next write to each page of the range is noticed."""
        argument = ffi.new("struct uffdio_writeprotect *")
        argument.range.start = start
        argument.range.len = length
        argument.mode = lib.UFFDIO_WRITEPROTECT_MODE_WP
        while True:
            try:
                self.ioctl(lib.UFFDIO_WRITEPROTECT, argument, "UFFDIO_WRITEPROTECT")
                return
            except KvmError as error:
                if error.errno != errno.EAGAIN:  # the process's mappings are changing
                    raise
