"""A vCPU of the model: running it, kicking it, answering its exits.

The processor executes; what KVM adds around it is here: one thread at a time, kicks, ports that nobody
listens to, the soft limit of the dirty ring, windows for interrupts, and completion of pending I/O first.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, Self

from pykvm.errors import BusyError, ClosedError, GuestTimeoutError, UsageError
from pykvm.machine.exits import (
    DebugStop,
    DirtyRingFull,
    Exit,
    Halted,
    InterruptWindow,
    IoIn,
    IoOut,
    Kicked,
    MmioRead,
    Shutdown,
)
from pykvm.machine.statistics import Statistics
from pykvm.model.cpu.processor import Processor
from pykvm.model.rings import DirtyRing
from pykvm.model.statistics import COUNTED_EXITS, vcpu_statistics
from pykvm.model.vcpu_bus import VcpuBus
from pykvm.model.vcpu_debug import VcpuDebug
from pykvm.model.vcpu_snapshot import VcpuSnapshot
from pykvm.x86.bits import Rflags

if TYPE_CHECKING:
    from types import TracebackType

    from pykvm.model.machine import ModelMachine

_POLL_SECONDS: Final = 20e-6
_NOT_ANSWERED_SOON: Final = (Kicked, Halted, Shutdown, DebugStop)


class ModelVcpu(VcpuSnapshot, VcpuDebug):
    """A vCPU of a model machine; see pykvm.machine.Vcpu."""

    def __init__(self, machine: ModelMachine, vcpu_id: int, ring: DirtyRing | None) -> None:
        self.vm = machine
        self.id = vcpu_id
        self.ring = ring
        self.cpu = self._make_processor()
        self.entries = 0
        """How often ``run`` was called."""
        self.swallowed = 0
        """Port accesses that were answered without the host, since nobody listens there."""
        self._schedule = machine.schedule
        self._owner = threading.RLock()
        self._closed = False
        self._running = False
        self._kicked = False
        self._ports: frozenset[int] | None = None
        self._question: IoIn | MmioRead | None = None
        self._window_wanted = False
        self._counts: Counter[str] = Counter()
        super().__init__()

    def _make_processor(self) -> Processor:
        bus = VcpuBus(self.vm, self.ring)
        bus.cpu = cpu = Processor(bus, (), translate=self.vm.translate)
        return cpu

    @property
    def name(self) -> str:
        return f"vCPU {self.id}"

    @property
    def closed(self) -> bool:
        return self._closed

    @contextlib.contextmanager
    def use(self, operation: str) -> Iterator[Processor]:
        """The processor for this thread alone.  Raises ClosedError, BusyError."""
        if self._closed:
            raise self._closed_error()
        if not self._owner.acquire(blocking=False):
            raise BusyError(f"{self.name} is in use by another thread; kick it and wait before {operation}.")
        try:
            yield self.cpu
        finally:
            self._owner.release()

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"{self.name} is closed; create a new one.")

    # --- running -----------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._running

    def run(self) -> Exit:
        """Run until an exit that somebody must see; see pykvm.machine.Vcpu.run.

        Raises ClosedError, BusyError, and UnsupportedInstruction, having changed nothing since the
        instruction before.  A signal handler that raises in this thread may do so amid an instruction, after
        which the vCPU is of no use.
        """
        with self.use("KVM_RUN"):
            self.entries += 1
            self._running = True
            exit: Exit = Kicked()
            try:
                exit = self._run()
            finally:
                self._running = False
                self._schedule.leave(self.id, back_soon=not isinstance(exit, _NOT_ANSWERED_SOON))
            self._count(exit)
            return exit

    def _run(self) -> Exit:
        cpu = self.cpu
        if self._question is not None:
            self.reply(bytes(self._length(self._question)))  # as KVM: what nobody answered reads as it may
        self.forget_memory()
        while True:
            before, limit = cpu.instructions, 0
            try:
                limit = self._schedule.begin(self.id, self._must_stop)
                if limit == 0 and not cpu.replies and not cpu.exits:
                    self._kicked = False
                    return Kicked()
                exit = self._slice(limit)
            finally:
                # Also after Ctrl-C, wherever it struck: others must be able to close the machine.
                self._schedule.end(self.id, cpu.instructions - before, limit)
            if exit is not None and not self._swallow(exit):
                return exit

    def forget_memory(self) -> None:
        """Memory may be another, or changed by the host: nothing that the processor knows of it holds."""
        self.cpu.flush_tlb()
        self.cpu.flush_writable()

    def _must_stop(self) -> bool:
        return self._kicked or self._closed

    def _slice(self, limit: int) -> Exit | None:
        """Some instructions of the guest; what the last one was for comes first."""
        cpu = self.cpu
        if limit == 0:
            with self._schedule.visit():
                return self._complete()
        if cpu.replies or cpu.exits:
            answered = bool(cpu.replies)
            exit = self._complete()
            if exit is None and answered and self.debugging:
                exit = self.answered_step()
            if exit is not None:
                return exit
        if self.ring is not None and self.ring.full:
            return DirtyRingFull()
        if self._window_wanted or self.debugging:
            return self._step_watched(limit)
        return self._seen(cpu.run(limit))

    def _complete(self) -> Exit | None:
        """Finish the instruction of the last exit; another exit where it needs one."""
        cpu = self.cpu
        if cpu.exits or cpu.replies:
            return self._seen(cpu.run(1))
        return None

    def _step_watched(self, limit: int) -> Exit | None:
        """Instruction by instruction, since something is awaited between two of them."""
        for _ in range(limit):
            if self.ring is not None and self.ring.full:
                return DirtyRingFull()
            if self._window_wanted and self.ready_for_interrupt():
                return InterruptWindow()
            exit = self.debug_step() if self.debugging else self.cpu.run(1)
            exit = self._seen(exit)
            if exit is not None or self._must_stop():
                return exit
        return None

    def _seen(self, exit: Exit | None) -> Exit | None:
        """What the processor came out with.  That the ring is full is told by the ring, not by the marker
        that ended the run (see VcpuBus)."""
        cpu = self.cpu
        while isinstance(exit, DirtyRingFull):
            exit = cpu.exits.pop(0) if cpu.exits else None
        if cpu.exits:
            cpu.exits[:] = [each for each in cpu.exits if not isinstance(each, DirtyRingFull)]
        if isinstance(exit, IoIn | MmioRead):
            self._question = exit
        return exit

    def ready_for_interrupt(self) -> bool:
        """Whether the guest would take an external interrupt now."""
        cpu = self.cpu
        return bool(cpu.rflags & Rflags.IF) and not cpu.shadow and cpu.injected_interrupt is None

    def _swallow(self, exit: Exit) -> bool:
        """Answer a port that nobody listens to: writes are lost, reads give ones."""
        if self._ports is None or not isinstance(exit, IoOut | IoIn):
            return False
        if not self._ports.isdisjoint(range(exit.port, exit.port + exit.size)):
            return False
        self.swallowed += 1
        self._counts["io_exits"] += 1
        if isinstance(exit, IoIn):
            self.reply(b"\xff" * self._length(exit))
        return True

    def _count(self, exit: Exit) -> None:
        self._counts["exits"] += 1
        for kind, name in COUNTED_EXITS.items():
            self._counts[name] += isinstance(exit, kind)

    @staticmethod
    def _length(question: IoIn | MmioRead) -> int:
        return question.size * (question.repeat if isinstance(question, IoIn) else 1)

    def reply(self, data: bytes) -> None:
        """Answer the IoIn or MmioRead just returned.  Raises UsageError where there is none, or for a
        length other than the exit's."""
        if self._closed:
            raise self._closed_error()
        if self._question is None:
            raise UsageError(f"{self.name} has no IoIn or MmioRead to answer.")
        length = self._length(self._question)
        if len(data) != length:
            raise UsageError(f"The answer must have {length} bytes, not {len(data)}.")
        self.cpu.replies.append(bytes(data))
        self._question = None

    def complete_io(self) -> Exit | None:
        """Complete the instruction of the last IoOut, IoIn, MmioWrite or MmioRead without going on.

        None, or another exit that the same instruction needs: handle it, then ask again.  Raises UsageError
        while an IoIn or MmioRead waits for its answer.
        """
        with self.use("KVM_RUN"), self._schedule.visit():
            if self._question is not None:
                raise UsageError(f"{self.name} waits for the answer to its last exit; call reply first.")
            return self._complete()

    def abandon_io(self) -> None:
        """The host moved the vCPU elsewhere: answers for the old place are void."""
        self.cpu.replies.clear()
        self._question = None

    def kick(self, wait: float | None = None) -> None:
        """Make the current or else the next run return Kicked; see pykvm.machine.Vcpu.kick."""
        if self._closed:
            raise self._closed_error()
        if wait is None:
            self._kicked = True
            self._schedule.wake()
            return
        if not self._running:
            return
        self._kicked = True
        self._schedule.wake()
        deadline = time.monotonic() + wait
        while self._kicked and self._running:
            if time.monotonic() > deadline:
                raise GuestTimeoutError(
                    f"{self.name} did not leave the guest within {wait} s; allow it more time."
                )
            time.sleep(_POLL_SECONDS)

    def listen(self, ports: Iterable[int] | None) -> None:
        """Which ports make ``run`` return; None means all.  Raises UsageError beyond 0xffff."""
        wanted = None if ports is None else frozenset(ports)
        for port in wanted or ():
            if not 0 <= port <= 0xFFFF:
                raise UsageError(f"I/O port {port:#x} is not in 0 to 0xffff.")
        self._ports = wanted

    def request_interrupt_window(self, wanted: bool = True) -> None:
        """Make ``run`` return InterruptWindow as soon as the guest can take an interrupt."""
        if self._closed:
            raise self._closed_error()
        self._window_wanted = wanted

    def statistics(self) -> Statistics:
        """KVM's statistics by their names; also while it runs.  What only KVM's own MMU has stays 0."""
        return vcpu_statistics(self.id, {**self._counts, "insn_emulation": self.cpu.instructions})

    # --- lifetime ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the vCPU; a thread inside ``run`` is kicked out and its next call raises ClosedError.

        Its dirty ring stays with the machine: what it holds was written and is still to be collected.
        """
        self._closed = True
        self._schedule.wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name}{' (closed)' if self._closed else ''}>"
