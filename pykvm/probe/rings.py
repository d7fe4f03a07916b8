"""Behaviours of dirty rings: whether a signal ends a reset, and in which order the processor's log comes."""

from __future__ import annotations

import mmap
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np

from pykvm.kvm import KvmVm
from pykvm.memory import PAGE_SIZE
from pykvm.probe.bench import LOG, Answer, Bench, Needs, Probe
from pykvm.probe.finding import How
from pykvm.probe.guest import DATA, ProbeError

_RING: Final = 1024
_LARGEST, _VCPUS = 65536, 4
_RING_AT: Final = 64 * PAGE_SIZE
"""Offset of a ring in its vCPU's mapping (KVM_DIRTY_LOG_PAGE_OFFSET)."""
_RESET: Final = 2
_SHARES: Final = (0.5, 0.3, 0.7)
"""When a signal comes, as a share of the time that a reset takes undisturbed."""
_STEPS: Final = b"\x48\x89\x07\x48\x81\xc7\x00\x10\x00\x00" * 3
"""mov [rdi], rax; add rdi, 4096: three times"""


def _pml_newest_first(bench: Bench) -> Answer:
    with bench.guest(flags=LOG, ring=_RING) as guest:
        guest.do(_STEPS, rdi=DATA * PAGE_SIZE)
        guest.pushed()
        guest.do(_STEPS, rdi=DATA * PAGE_SIZE)
        order = [page - DATA for page in guest.pushed() if DATA <= page < DATA + 3]
    if order not in ([0, 1, 2], [2, 1, 0]):
        raise ProbeError(f"three pages written in order came as {order}")
    return order[0] == 2, How.PROBE, f"pages written in the order 0, 1, 2 are pushed as {order}"


@contextmanager
def _alarm() -> Iterator[None]:
    """SIGALRM does nothing.  Raises ProbeError where it is in use, or cannot be had."""
    if threading.current_thread() is not threading.main_thread() or any(signal.getitimer(signal.ITIMER_REAL)):
        raise ProbeError("no signal is free for it here")
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _reset_interruptible(bench: Bench) -> Answer:
    """Rings that are harvested wholly, of a VM without memory: KVM goes through all of their entries."""
    with bench.system.create_machine() as vm:
        if not isinstance(vm, KvmVm):
            raise ProbeError("this machine is no real KVM")
        vm.enable_dirty_ring(_LARGEST)
        flags = []
        for _ in range(_VCPUS):
            # SAFETY: the array keeps its mapping, and the kernel has the ring until both are gone.
            ring = mmap.mmap(vm.create_vcpu().fileno(), _LARGEST * 16, flags=mmap.MAP_SHARED, offset=_RING_AT)
            flags.append(np.frombuffer(ring, dtype=np.uint32)[::4])
        counts = []
        seconds = 0.0
        with _alarm():
            for share in (0.0, *_SHARES):
                for each in flags:
                    each[:] = _RESET
                signal.setitimer(signal.ITIMER_REAL, seconds * share)
                begin = time.perf_counter()
                counts.append(vm.reset_dirty_rings())
                seconds = seconds or time.perf_counter() - begin
    entries, fewest = counts[0], min(counts)
    return (
        fewest < entries,
        How.PROBE,
        f"a reset goes through {fewest} of {entries} entries when a signal comes",
    )


RING_PROBES: Final = (
    Probe("pml_newest_first", Needs.PML, _pml_newest_first),
    Probe("reset_interruptible", Needs.ANY, _reset_interruptible),
)
