"""Guest writes that the VMM need not be woken for: ioeventfd and coalesced zones (api.rst 4.59, 4.116)."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import KvmError
from pykvm.kvm.capabilities import Capability, Extensions
from pykvm.kvm.fields import fill

if TYPE_CHECKING:
    from pykvm.abi.library import CData
    from pykvm.kvm.vm import KvmVm

_PAGE = 4096


@dataclass(frozen=True, slots=True)
class CoalescedWrite:
    """A deferred write: to a guest-physical address or, with ``is_port``, to an I/O port."""

    address: int
    data: bytes
    is_port: bool


class VmIoEvents(Extensions):
    """What a VM absorbs without an exit."""

    def assign_ioeventfd(
        self, eventfd: int, address: int, length: int, *, match: int | None = None, port: bool = False
    ) -> None:
        """KVM_IOEVENTFD (api.rst 4.59, KVM_CAP_IOEVENTFD): writes there signal the eventfd and do not exit.

        ``length``: 1, 2, 4 or 8 bytes, or 0 for any (KVM_CAP_IOEVENTFD_ANY_LENGTH); ``match``: only that
        value; ``port``: an I/O port instead of a guest-physical address.  Raises KvmError: EEXIST when it
        collides with another, EINVAL for a bad length or no eventfd.
        """
        self._ioeventfd(eventfd, address, length, match, port, 0)

    def remove_ioeventfd(
        self, eventfd: int, address: int, length: int, *, match: int | None = None, port: bool = False
    ) -> None:
        """KVM_IOEVENTFD (api.rst 4.59) to undo an assignment.  Raises KvmError (ENOENT) for none such."""
        self._ioeventfd(eventfd, address, length, match, port, lib.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _ioeventfd(
        self, eventfd: int, address: int, length: int, match: int | None, port: bool, flags: int
    ) -> None:
        if length == 0:
            self.require(Capability.IOEVENTFD_ANY_LENGTH, "An ioeventfd of any length")
        if match is not None:
            flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        if port:
            flags |= lib.KVM_IOEVENTFD_FLAG_PIO
        request = ffi.new("struct kvm_ioeventfd *")
        fill(request, fd=eventfd, addr=address, len=length, datamatch=match or 0, flags=flags)
        refusals: Refusals = {
            errno.EEXIST: (KvmError, "another ioeventfd covers this address, length and value."),
            errno.ENOENT: (KvmError, "there is no ioeventfd with exactly these arguments."),
            errno.EBADF: (KvmError, f"descriptor {eventfd} is not open; make one with os.eventfd(0)."),
            errno.EINVAL: (
                KvmError,
                "it takes an eventfd, a length of 0, 1, 2, 4 or 8, no match with length 0, and a range that "
                "does not wrap around.",
            ),
        }
        # SAFETY: KVM takes a reference of its own to the eventfd; closing ours later is fine.
        self.ioctl(lib.KVM_IOEVENTFD, request, "KVM_IOEVENTFD", refusals)

    def register_coalesced(self, address: int, size: int, *, port: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO (api.rst 4.116): writes wholly inside the zone are queued, not exited.

        ``size`` in bytes; ``port``: I/O ports (KVM_CAP_COALESCED_PIO).  Reads still exit, and a write exits
        when the queue of 169 is full: call ``drain_coalesced`` of any vCPU before handling an exit.
        Raises CapabilityError.
        """
        self._zone(lib.KVM_REGISTER_COALESCED_MMIO, "KVM_REGISTER_COALESCED_MMIO", address, size, port)

    def unregister_coalesced(self, address: int, size: int, *, port: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO (api.rst 4.116): removes the zones that lie inside this range."""
        self._zone(lib.KVM_UNREGISTER_COALESCED_MMIO, "KVM_UNREGISTER_COALESCED_MMIO", address, size, port)

    def _zone(self, request: int, operation: str, address: int, size: int, port: bool) -> None:
        self.require(Capability.COALESCED_PIO if port else Capability.COALESCED_MMIO, operation)
        zone = ffi.new("struct kvm_coalesced_mmio_zone *")
        fill(zone, addr=address, size=size, pio=int(port))
        self.ioctl(request, zone, operation)


class VcpuCoalesced(Managed):
    """Access to the VM's queue of coalesced writes through a vCPU's mapping."""

    if TYPE_CHECKING:
        vm: KvmVm
        _page: CData | None

    _queue_lock = threading.Lock()  # one for all VMs: taken for microseconds

    def drain_coalesced(self) -> list[CoalescedWrite]:
        """Take the queued writes, oldest first (api.rst section 5, KVM_CAP_COALESCED_MMIO).

        There is one queue a VM: whichever vCPU is asked, the writes of all are in it, in their order.  May
        be called from any thread while vCPUs run.  Raises CapabilityError, ClosedError.
        """
        page_number = self.vm.require(Capability.COALESCED_MMIO, "drain_coalesced")
        page = self._page
        if page is None:
            raise self._closed_error()
        # SAFETY: the kernel's page lies inside the vCPU's mapping (KVM_CAP_COALESCED_MMIO tells which), and
        # ``page`` keeps that mapped.  KVM fills an entry before it moves ``last``; x86 keeps that order.
        ring = ffi.cast("struct pykvm_coalesced_ring *", ffi.cast("char *", page) + page_number * _PAGE)
        capacity = (_PAGE - ffi.sizeof("struct pykvm_coalesced_ring")) // ffi.sizeof(
            "struct kvm_coalesced_mmio"
        )
        writes = []
        with self._queue_lock:
            first, last = ring.first % capacity, ring.last % capacity
            while first != last:
                entry = ring.entries[first]
                data = bytes(ffi.buffer(entry.data))[: entry.len]
                writes.append(CoalescedWrite(entry.phys_addr, data, bool(entry.pio)))
                first = (first + 1) % capacity
            ring.first = first
        return writes
