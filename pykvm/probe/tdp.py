"""Behaviours under two-dimensional paging: what is marked again, and what becomes of large pages."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import struct
from types import TracebackType
from typing import Final, Self

from pykvm.kvm import KvmVm
from pykvm.memory import PAGE_SIZE
from pykvm.probe.bench import LOG, Answer, Bench, Needs, Probe, counts_of_a_new_slot
from pykvm.probe.finding import How
from pykvm.probe.guest import DATA, Moved, ProbeError, ProbeGuest
from pykvm.profiles import WriteTrackAllocation

_PRE_FAULT: Final = 0xC040AED5
"""KVM_PRE_FAULT_MEMORY (api.rst 4.143)."""
_CLEAR_DIRTY_LOG: Final = 0xC018AEC0
_CAP_PRE_FAULT: Final = 236
_RING: Final = 1024
_LARGE: Final = 2 << 20
_LARGE_GFN: Final = 0x4_0000
"""Where a large page lies: at 1 GiB."""
_LARGE_SLOT: Final = 9


def _pre_fault(guest: ProbeGuest, gfn: int) -> None:
    fileno = getattr(guest.vcpu, "fileno", None)
    if fileno is None:
        raise ProbeError("this machine is no real KVM")
    try:
        fcntl.ioctl(fileno(), _PRE_FAULT, struct.pack("<8Q", gfn * PAGE_SIZE, PAGE_SIZE, *[0] * 6))
    except OSError as error:
        raise ProbeError(f"KVM_PRE_FAULT_MEMORY failed: {error.strerror}") from None


def _tdp_spurious_marks(bench: Bench) -> Answer:
    if not bench.capability(_CAP_PRE_FAULT):
        raise ProbeError("needs KVM_PRE_FAULT_MEMORY, or two vCPUs at the same page at the same time")
    with bench.guest(flags=LOG, ring=_RING) as guest:
        guest.do(b"")
        guest.pushed()
        _pre_fault(guest, DATA)
        first = guest.pushed().count(DATA)
        # Reset, so protected: once more makes it writable, and the last one finds it as it wants it.
        _pre_fault(guest, DATA)
        _pre_fault(guest, DATA)
        both = guest.pushed().count(DATA)
    if not first:
        raise ProbeError("a page that is faulted in ahead of time is not marked")
    return both > 1, How.PROBE, f"faulting a page in twice marks it {both} times"


class _LargePage:
    """A guest with a second slot, of one large page of the host that KVM maps as such."""

    def __init__(self, bench: Bench, *, initially_set: bool = False) -> None:
        self.guest = bench.guest()
        vm = self.guest.vm
        if not isinstance(vm, KvmVm):
            self.guest.close()
            raise ProbeError("this machine is no real KVM")
        self._vm = vm
        self._area = mmap.mmap(-1, 2 * _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # SAFETY: the object keeps the area mapped; it goes after the VM.
        self._first = ctypes.c_char.from_buffer(self._area)
        address = ctypes.addressof(self._first)
        start = -address % _LARGE
        self._host = address + start
        if initially_set:
            vm.enable_manual_protect(initially_set=True)
        self._area.madvise(mmap.MADV_HUGEPAGE, start, _LARGE)
        for page in range(start, start + _LARGE, PAGE_SIZE):
            self._area[page] = 1
        self.log(on=False)
        self.window = self.guest.window(0, _LARGE_GFN)
        self.guest.store(self.window)
        if not self.large:
            self.close()
            raise ProbeError("the host has no large page to give")

    @property
    def large(self) -> int:
        """Large pages that KVM maps."""
        return self.guest.counters()["pages_2m"]

    def log(self, *, on: bool) -> None:
        """Create the slot, or change whether it logs."""
        self._vm.set_user_memory_region(_LARGE_SLOT, int(on), _LARGE_GFN * PAGE_SIZE, _LARGE, self._host)

    def clear_first(self) -> None:
        """KVM_CLEAR_DIRTY_LOG (api.rst 4.117) of the first page alone."""
        # SAFETY: the kernel reads one word from ``bits`` during the call.
        bits = ctypes.c_uint64(1)
        request = struct.pack("<IIQQ", _LARGE_SLOT, 64, 0, ctypes.addressof(bits))
        try:
            fcntl.ioctl(self._vm.fileno(), _CLEAR_DIRTY_LOG, request)
        except OSError as error:
            raise ProbeError(f"KVM_CLEAR_DIRTY_LOG failed: {error.strerror}") from None

    def close(self) -> None:
        """The VM first, then its memory."""
        self.guest.close()
        del self._first
        self._area.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tdp_recovers_in_place(bench: Bench) -> Answer:
    with _LargePage(bench) as page:
        page.log(on=True)
        page.guest.store(page.window)
        if page.large:
            raise ProbeError("logging did not split the large page")
        page.log(on=False)
        large = page.large
    return large > 0, How.PROBE, f"{large} large pages right after logging ended"


def _masked_split_misses_last(bench: Bench) -> Answer:
    with _LargePage(bench, initially_set=True) as page:
        page.log(on=True)
        page.clear_first()
        large = page.large
    if not bench.value("eager_page_split"):
        raise ProbeError("large pages are not split eagerly here")
    return large > 0, How.PROBE, f"{large} large pages left after a CLEAR of the first page of one"


def _tdp_splits_in_place(bench: Bench) -> Answer:
    if not bench.value("masked_split_misses_last"):
        raise ProbeError("a large page is always split before it is written here")
    with _LargePage(bench, initially_set=True) as page:
        page.log(on=True)
        page.clear_first()
        with Moved(page.guest) as moved:
            page.guest.store(page.window)
    small = moved["pages_4k"]
    return small > 1, How.PROBE, f"a write below a large page makes {small} small ones"


def _write_track_allocation(bench: Bench) -> Answer:
    if not counts_of_a_new_slot(bench):
        raise ProbeError("a slot has no counts at first; who makes them be allocated does not show")
    return WriteTrackAllocation.ALWAYS, How.BUILD, "a slot has write-track counts from the start"


TDP_PROBES: Final = (
    Probe("tdp_spurious_marks", Needs.TDP_MMU, _tdp_spurious_marks),
    Probe("tdp_recovers_in_place", Needs.TDP_MMU, _tdp_recovers_in_place),
    Probe("masked_split_misses_last", Needs.TDP_MMU, _masked_split_misses_last),
    Probe("tdp_splits_in_place", Needs.TDP_MMU, _tdp_splits_in_place),
    Probe("write_track_allocation", Needs.TDP, _write_track_allocation),
)
