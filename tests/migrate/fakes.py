"""A machine without KVM: a thread that writes memory, keeps books about it there, and checks them.

Page 0 is the ledger: for each data page the value that was written to it last.  Every step reads a data
page, compares it with the ledger and writes both; so a page of either kind that went back in time, or was
lost, shows at the next visit.  All state that matters is in the memory and in one register.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pykvm.errors import SlotOverlapError, UsageError
from pykvm.machine import DirtyPages, Machine, Registers, SlotFlags, SpecialRegisters, Vcpu
from pykvm.machine.state import DebugRegisters, MachineState, VcpuEvents, VcpuState
from pykvm.memory import PAGE_SIZE, GuestMemory
from tests.patience import patient

STATE = VcpuState(
    cpuid=(),
    registers=Registers(),
    special=SpecialRegisters(),
    xsave=bytes(4096),
    xcrs=(),
    msrs=(),
    events=VcpuEvents(),
    mp_state=0,
    debug=DebugRegisters(),
)


@dataclass
class FakeSlot:
    id: int
    gpa: int
    size: int
    memory: GuestMemory
    memory_offset: int
    flags: SlotFlags
    alive: bool = True

    def set_flags(self, flags: SlotFlags) -> None:
        self.flags = flags


@dataclass
class FakeVcpu:
    id: int
    state: VcpuState = STATE
    running: bool = False

    def save_state(self) -> VcpuState:
        return self.state

    def load_state(self, state: VcpuState) -> None:
        self.state = state


class FakeMachine:
    """Slots, vCPUs and a set of dirty pages per slot while it logs."""

    backend = "fake"
    ring_entries = 0

    def __init__(self) -> None:
        self.slots: dict[int, FakeSlot] = {}
        self.vcpus: list[FakeVcpu] = []
        self.lock = threading.Lock()
        self.dirty: set[tuple[int, int]] = set()
        self.logging = False
        self.closed = False

    def create_slot(
        self,
        memory: GuestMemory,
        gpa: int,
        *,
        size: int | None = None,
        memory_offset: int = 0,
        slot_id: int | None = None,
        flags: SlotFlags = SlotFlags.NONE,
    ) -> FakeSlot:
        size = memory.size - memory_offset if size is None else size
        for other in self.slots.values():
            if gpa < other.gpa + other.size and other.gpa < gpa + size:
                raise SlotOverlapError(17, "create_slot")
        slot_id = len(self.slots) if slot_id is None else slot_id
        self.slots[slot_id] = FakeSlot(slot_id, gpa, size, memory, memory_offset, flags)
        return self.slots[slot_id]

    def create_vcpu(self, vcpu_id: int | None = None) -> FakeVcpu:
        self.vcpus.append(FakeVcpu(len(self.vcpus) if vcpu_id is None else vcpu_id))
        return self.vcpus[-1]

    def save_state(self) -> MachineState:
        return MachineState()

    def load_state(self, state: MachineState) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeSystem:
    """Remembers the machines it made."""

    backend = "fake"

    def __init__(self) -> None:
        self.machines: list[FakeMachine] = []

    def create_machine(self) -> FakeMachine:
        self.machines.append(FakeMachine())
        return self.machines[-1]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class FakeConfig:
    pages: int = 64
    hot: int = 16
    seed: int = 1


@dataclass(frozen=True)
class FakeCorruption:
    gpa: int
    expected: int
    found: int
    page: int
    cause: str = "another value"


@dataclass
class FakeReport:
    checks: int = 0
    corruptions: list[FakeCorruption] = field(default_factory=list)

    @property
    def corruption_count(self) -> int:
        return len(self.corruptions)


class FakeRunner:
    """One thread that steps the guest; pause, resume and stop as GuestRunner does them."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.on_ring_full: Callable[[Vcpu], None] | None = None
        self.error: BaseException | None = None
        self.finished = False
        self.started = False
        self.runs = 0
        self._step = step
        self._changed = threading.Condition()
        self._hold = False
        self._parked = False
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, daemon=True)

    @property
    def running(self) -> bool:
        return self.started and not self._hold and not self._stopped

    @property
    def paused(self) -> bool:
        return self._hold and self._parked

    def start(self) -> None:
        self.started = True
        self._thread.start()

    def _loop(self) -> None:
        while True:
            with self._changed:
                if self._hold or self._stopped:
                    self._parked = True
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._stopped or not self._hold)
                if self._stopped:
                    return
                self._parked = False
            for _ in range(20):
                self._step()
            self.runs += 1
            time.sleep(0.0005)

    def pause(self, timeout: float = 10.0) -> None:
        with self._changed:
            self._hold = True
            assert self._changed.wait_for(lambda: self._parked or self._stopped, timeout)
            if self.error is not None:
                raise self.error

    def resume(self) -> None:
        with self._changed:
            self._hold = False
            self._changed.notify_all()

    def stop(self, timeout: float = 10.0) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self.started:
            self._thread.join(timeout)
            assert not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> int | None:
        time.sleep(timeout or 0)
        return None


class FakeGuest:
    """The guest itself; ``hot`` pages get most of the writes.  The counter lives in the vCPU's RAX."""

    def __init__(self, machine: FakeMachine, memory: GuestMemory, config: FakeConfig) -> None:
        self.machine: Any = machine
        self.memory = memory
        self.config = config
        self.runner = FakeRunner(self._step)
        self._view = memory.view().view("<u8")
        self._random = random.Random(config.seed)
        self._found = FakeReport()

    @classmethod
    def create(cls, system: FakeSystem, config: FakeConfig, *, size: int | None = None) -> FakeGuest:
        machine = system.create_machine()
        memory = GuestMemory(size or config.pages * PAGE_SIZE)
        machine.create_slot(memory, 0)
        machine.create_vcpu()
        return cls(machine, memory, config)

    @classmethod
    def adopt(cls, machine: Machine, memory: GuestMemory, description: Mapping[str, Any]) -> FakeGuest:
        if set(description) != {"pages", "hot", "seed"} or any(
            type(n) is not int for n in description.values()
        ):
            raise UsageError("odd description")
        config = FakeConfig(**description)
        if not 2 <= config.hot <= config.pages <= memory.size // PAGE_SIZE:
            raise UsageError("numbers that do not fit each other")
        return cls(machine, memory, config)  # type: ignore[arg-type]

    def _step(self) -> None:
        config = self.config
        hot = self._random.random() < 0.9
        page = self._random.randrange(1, config.hot if hot else config.pages)
        with self.machine.lock:
            vcpu = self.machine.vcpus[0]
            count = (vcpu.state.registers.rax + 1) % (1 << 50)
            vcpu.state = replace(vcpu.state, registers=replace(vcpu.state.registers, rax=count))
            at = page * PAGE_SIZE // 8
            expected, found = int(self._view[page]), int(self._view[at])
            self._found.checks += 1
            if expected != found:
                self._found.corruptions.append(
                    FakeCorruption(page * PAGE_SIZE, expected, found, page * PAGE_SIZE)
                )
            self._view[at] = self._view[page] = count * 1000 + page
            if self.machine.logging:
                self.machine.dirty |= {(0, 0), (0, page)}

    @property
    def count(self) -> int:
        """Steps made, here and before."""
        return int(self.machine.vcpus[0].state.registers.rax)

    def report(self) -> FakeReport:
        return FakeReport(self._found.checks, list(self._found.corruptions))

    def close(self) -> None:
        self.runner.stop()
        self.machine.close()
        self.memory.close()


class FakeTracker:
    """Collects what a FakeMachine logged, and ``always`` besides; ``error`` is raised after the first."""

    name = "fake"

    def __init__(
        self, *, error: BaseException | None = None, always: frozenset[tuple[int, int]] = frozenset()
    ) -> None:
        self.machine: FakeMachine | None = None
        self.error = error
        self.always = always
        self.collections = 0

    def prepare(self, machine: Machine) -> None:
        pass

    def on_ring_full(self, vcpu: Vcpu) -> None:
        pass

    def arm(self, machine: Any) -> None:
        assert self.machine is None, "armed twice"
        with machine.lock:
            machine.dirty.clear()
            machine.logging = True
        self.machine = machine

    def collect(self, *, final: bool = False) -> DirtyPages:
        assert self.machine is not None
        self.collections += 1
        if self.error is not None and self.collections > 1:
            raise self.error
        with self.machine.lock:
            pages, self.machine.dirty = self.machine.dirty, set()
        return DirtyPages.of(pages | self.always)

    def rearm(self, pages: DirtyPages) -> None:
        pass

    def disarm(self) -> None:
        if self.machine is not None:
            self.machine.logging = False
        self.machine = None


@contextlib.contextmanager
def running_guest(config: FakeConfig | None = None, *, size: int | None = None) -> Iterator[FakeGuest]:
    """A guest that runs and has written something already."""
    guest = FakeGuest.create(FakeSystem(), config or FakeConfig(), size=size)
    try:
        guest.runner.start()
        wait_for(lambda: guest.count > 200)
        yield guest
    finally:
        guest.close()


def wait_for(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Poll until the condition holds; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + patient(timeout)
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


def assert_goes_on(guest: Any, progress: Callable[[], int]) -> None:
    """The guest runs, and found nothing corrupt."""
    before = progress()
    wait_for(lambda: progress() > before + 20)
    assert guest.report().corruption_count == 0
