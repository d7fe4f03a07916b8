"""Running a guest: a thread per vCPU, with pause, resume and stop that no wake-up can get lost from."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pykvm.errors import (
    BusyError,
    ClosedError,
    EmulationError,
    GuestError,
    GuestTimeoutError,
    PykvmError,
    RingOverflowError,
    UsageError,
)
from pykvm.guest.devices import DeviceBus, GuestFinished
from pykvm.machine import (
    DirtyRingFull,
    Exit,
    FailEntry,
    Halted,
    InternalError,
    InterruptWindow,
    Kicked,
    Machine,
    MemoryFault,
    Shutdown,
    SystemEvent,
    Vcpu,
)

_SHUTDOWN_EVENT, _RESET_EVENT = 1, 2  # KVM_SYSTEM_EVENT_SHUTDOWN, _RESET (api.rst 5)


class GuestRunner:
    """Runs all vCPUs of ``machine``, each on a thread of its own, and answers their exits with ``bus``.

    ``trace`` sees every exit before it is handled, on the vCPU's thread.  The run ends when a device raises
    GuestFinished or somebody calls ``finish``, when all vCPUs have halted for good (status 0), when a vCPU
    or a device fails, or with ``stop``.  Leaving the context manager stops.
    """

    def __init__(
        self, machine: Machine, bus: DeviceBus, *, trace: Callable[[Vcpu, Exit], None] | None = None
    ) -> None:
        self.machine = machine
        self.bus = bus
        self.trace = trace
        self.on_ring_full: Callable[[Vcpu], None] | None = None
        self._changed = threading.Condition()
        self._threads: dict[int, threading.Thread] = {}  # by vCPU id
        self._parked: set[int] = set()
        self._halted: set[int] = set()
        self._hold = False  # vCPU threads must not run the guest: paused, finished or stopped
        self._paused = False
        self._stopped = False
        self._status: int | None = None
        self._error: BaseException | None = None

    # --- what others may ask ---------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Started, and neither paused nor over."""
        return bool(self._threads) and not self._hold

    @property
    def paused(self) -> bool:
        """Every vCPU thread is outside the guest and stays there until ``resume``."""
        with self._changed:
            return self._paused and self._all_outside()

    @property
    def finished(self) -> bool:
        """The guest ended by itself; ``wait`` returns its status at once."""
        return self._status is not None

    @property
    def status(self) -> int | None:
        """The guest's exit status, once there is one."""
        return self._status

    @property
    def error(self) -> BaseException | None:
        """What a vCPU thread failed with, if one did."""
        return self._error

    # --- control ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Run the guest.  A runner starts once; UsageError otherwise, and without vCPUs."""
        with self._changed:
            if self._threads or self._stopped:
                raise UsageError("This runner was started before; make a new one.")
            vcpus = list(self.machine.vcpus)
            if not vcpus:
                raise UsageError("The machine has no vCPU to run; create one first.")
            for vcpu in vcpus:
                vcpu.listen(None if self.trace is not None or self.bus.trace else self.bus.ports)
            try:
                for vcpu in vcpus:
                    thread = threading.Thread(
                        target=self._thread, args=(vcpu,), name=f"vcpu-{vcpu.id}", daemon=True
                    )
                    thread.start()
                    self._threads[vcpu.id] = thread
            except BaseException:  # the host has no thread left: those that run must not go on alone
                self._stopped = True
                self._end()
                raise

    def pause(self, timeout: float = 10.0) -> None:
        """Stop all vCPUs between two instructions; returns when every thread is outside the guest.

        Idempotent.  If the guest has finished there is nothing left to pause, and it stays so.  Raises what
        the guest failed with, and GuestTimeoutError (having resumed) if a vCPU does not come out in time.
        """
        self._not_from_a_vcpu("pause")
        with self._changed:
            self._started()
            self._paused = self._hold = True
            self._kick_all()
            late = not self._changed.wait_for(self._all_outside, timeout)
            self._raise_error()
            if late:
                stuck = sorted(set(self._threads) - self._parked)
                self._resume()
                raise GuestTimeoutError(
                    f"vCPU {', '.join(map(str, stuck))} did not stop within {timeout:g} s; it runs on."
                )

    def resume(self) -> None:
        """Run on after ``pause``; without effect on a guest that runs or is over.  Raises its failure."""
        with self._changed:
            self._started()
            self._raise_error()
            self._resume()

    def finish(self, status: int) -> None:
        """End the run with the guest's exit status; the first call counts.  From any thread."""
        with self._changed:
            if self._status is None and self._error is None:
                self._status = status
            self._end()

    def stop(self, timeout: float = 10.0) -> None:
        """End all threads and wait for them; the guest stays as it is.  Idempotent; never raises its failure.

        Raises GuestTimeoutError if a thread is stuck in a device or callback for longer than ``timeout``.
        """
        self._not_from_a_vcpu("stop")
        with self._changed:
            self._stopped = True
            self._end()
        deadline = time.monotonic() + timeout
        for number, thread in self._threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise GuestTimeoutError(f"The thread of vCPU {number} did not end within {timeout:g} s.")

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the guest's end: its exit status, or None on time-out or when it was stopped instead.

        Raises what a vCPU thread failed with.  ``timeout`` in seconds, None for ever.
        """
        self._not_from_a_vcpu("wait")
        with self._changed:
            self._started()
            self._changed.wait_for(self._over, timeout)
            self._raise_error()
            return self._status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- with the lock held ------------------------------------------------------------------------

    def _over(self) -> bool:
        return self._status is not None or self._error is not None or self._stopped

    def _all_outside(self) -> bool:
        return self._parked >= self._threads.keys()

    def _started(self) -> None:
        if not self._threads:
            raise UsageError("The guest was not started; call start first.")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _kick_all(self) -> None:
        for vcpu in self.machine.vcpus:
            if vcpu.id in self._threads and vcpu.id not in self._parked:
                with contextlib.suppress(ClosedError):  # closed: its thread comes out by itself
                    vcpu.kick()

    def _resume(self) -> None:
        self._paused = False
        self._hold = self._over()
        self._changed.notify_all()

    def _end(self) -> None:
        self._hold = True
        self._changed.notify_all()
        self._kick_all()

    def _not_from_a_vcpu(self, what: str) -> None:
        if threading.current_thread() in self._threads.values():
            raise UsageError(
                f"{what} would wait for the vCPU thread that calls it; raise GuestFinished instead."
            )

    # --- on a vCPU's thread ------------------------------------------------------------------------

    def _thread(self, vcpu: Vcpu) -> None:
        try:
            while self._admitted(vcpu):
                self._run(vcpu)
        except GuestFinished as end:
            self.finish(end.status)
        except BaseException as error:
            self._fail(error)
        finally:
            with self._changed:
                self._parked.add(vcpu.id)
                self._changed.notify_all()

    def _admitted(self, vcpu: Vcpu) -> bool:
        """Wait while the guest is paused or this vCPU has halted; False when the run is over."""
        with self._changed:
            if not self._hold and vcpu.id not in self._halted:
                return True
            self._parked.add(vcpu.id)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._over() or not (self._hold or vcpu.id in self._halted))
            if self._over():
                return False
            self._parked.discard(vcpu.id)
            return True

    def _run(self, vcpu: Vcpu) -> None:
        # Only a kick ends this loop on behalf of pause, finish and stop, which all kick: the run that reports
        # it has completed the last access, so a string or wide one is never left half done.
        trace, handle, run = self.trace, self.bus.handle, vcpu.run
        while True:
            exit = run()
            if trace is not None:
                trace(vcpu, exit)
            if not handle(vcpu, exit) and not self._goes_on(vcpu, exit):
                return

    def _goes_on(self, vcpu: Vcpu, exit: Exit) -> bool:
        """What to do about an exit that no device answers; False to look whether this vCPU may run on."""
        match exit:
            case Kicked():
                return False
            case InterruptWindow():
                return True
            case DirtyRingFull():
                self._ring_full(vcpu)
                return True
            case Halted():
                with self._changed:
                    self._halted.add(vcpu.id)
                    if self._halted >= self._threads.keys():
                        raise GuestFinished(0)
                return False
            case SystemEvent(type=event) if event in {_SHUTDOWN_EVENT, _RESET_EVENT}:
                raise GuestFinished(0)
            case Shutdown():
                raise GuestError(f"vCPU {vcpu.id} stopped with a triple fault{_where(vcpu)}.")
            case InternalError() | FailEntry():
                raise EmulationError(f"vCPU {vcpu.id} cannot go on{_where(vcpu)}: {exit}.")
            case MemoryFault(gpa=gpa, size=size):
                raise GuestError(
                    f"vCPU {vcpu.id} accessed [{gpa:#x}, {gpa + size:#x}), which the host cannot provide"
                    f"{_where(vcpu)}."
                )
        raise EmulationError(
            f"vCPU {vcpu.id} stopped{_where(vcpu)} with an exit that nobody handles: {exit}."
        )

    def _ring_full(self, vcpu: Vcpu) -> None:
        if self.on_ring_full is None:
            raise RingOverflowError(
                f"The dirty ring of vCPU {vcpu.id} is full and nobody collects it; "
                "attach a tracker to the runner."
            )
        self.on_ring_full(vcpu)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._status is None and self._error is None and not self._ended_by_closing(error):
                self._error = error
            self._end()

    def _ended_by_closing(self, error: BaseException) -> bool:
        """A machine that is closed after ``stop`` was asked for ends its vCPUs, too."""
        return self._stopped and isinstance(error, ClosedError)


def _where(vcpu: Vcpu) -> str:
    """`` at RIP …`` where the vCPU still tells; a failing one may not."""
    try:
        return f" at RIP {vcpu.get_registers().rip:#x}"
    except (PykvmError, BusyError):
        return ""
