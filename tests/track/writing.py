"""A long-mode guest of a few instructions, on a machine that tracks writes, and a node that notes them.

Frames from 0 on are code, tables and stack, mapped one to one like the data pages from DATA on.  All entries
have A and D set, so no walk changes a table unless a test clears the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from pykvm.backends import open_system
from pykvm.guest.boot import Arena, BootMode, SystemTables, boot_state
from pykvm.guest.pagetables import USER, PageTables, PagingMode
from pykvm.machine import Exit, IoOut, Kicked, Machine, Slot, SlotFlags, System, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.model.system import ModelSystem
from pykvm.profiles.known import DEVELOPMENT_HOST, profile
from pykvm.track.write_track import WriteTracker

CODE, STACKS, ARENA = 0x1000, 0x8000, 0x10000
DATA = 0x200
PAGES = 0x240
PORT = 0x10
DONE = bytes([0xE6, PORT])
"""out PORT, al"""


class Write(NamedTuple):
    """A call of ``track_write``."""

    gpa: int
    new: bytes


class Removal(NamedTuple):
    """A call of ``track_remove_region``."""

    gfn: int
    pages: int


class Recorder:
    """A node that keeps what it is told, and the memory that it found then."""

    def __init__(self, then: Callable[[int, bytes], object] = lambda gpa, new: None) -> None:
        self.calls: list[Write | Removal] = []
        self._then = then

    @property
    def writes(self) -> list[Write]:
        return [call for call in self.calls if isinstance(call, Write)]

    def track_write(self, gpa: int, new: bytes) -> None:
        self.calls.append(Write(gpa, new))
        self._then(gpa, new)

    def track_remove_region(self, gfn: int, pages: int) -> None:
        self.calls.append(Removal(gfn, pages))


class Writing:
    """The guest; ``tracker.machine`` is the machine that it runs on."""

    def __init__(
        self,
        machine: Machine,
        *,
        cpl: int = 3,
        vcpus: int = 1,
        flags: SlotFlags = SlotFlags.NONE,
        prepare: Callable[[Machine], Any] = lambda machine: None,
    ) -> None:
        self.tracker = WriteTracker(machine)
        self.machine = self.tracker.machine
        prepare(self.machine)
        self.memory = GuestMemory(PAGES * PAGE_SIZE)
        self.memory.view()[::PAGE_SIZE] = 0
        self.slot: Slot = self.machine.create_slot(self.memory, 0, flags=flags)
        arena = Arena(ARENA, DATA * PAGE_SIZE)
        stacks = [STACKS + number * PAGE_SIZE for number in range(vcpus)]
        tables = SystemTables.build(self.memory, arena.take, wide=True, stacks=stacks)
        self.page_tables = PageTables(PagingMode.LONG4, self.memory, arena.take)
        self.page_tables.map(0, 0, PAGES * PAGE_SIZE, flags=USER)
        self.vcpus: list[Vcpu] = []
        for number in range(vcpus):
            vcpu = self.machine.create_vcpu()
            vcpu.set_cpuid(self.machine.supported_cpuid)
            boot_state(
                BootMode.LONG,
                entry=CODE,
                stack=stacks[number],
                cpl=cpl,
                cr3=self.page_tables.cr3,
                tables=tables,
                vcpu=number,
            ).apply(vcpu)
            self.vcpus.append(vcpu)
        self._flags = self.vcpus[0].get_registers().rflags
        self.recorder = Recorder()
        self.tracker.register(self.recorder)

    def load(self, code: bytes, number: int = 0, **registers: int) -> Vcpu:
        """Have the vCPU begin with ``code`` next, which lies at most 256 bytes long at its own place."""
        at = CODE + number * 256
        assert len(code) <= 256
        self.memory.write(at, code)
        state = self.vcpus[number].get_registers()
        state.rip, state.rflags = at, self._flags
        for name, value in registers.items():
            setattr(state, name, value)
        self.vcpus[number].set_registers(state)
        return self.vcpus[number]

    def finish(self, vcpu: Vcpu) -> Exit:
        """Run on past kicks, which the tracker may need."""
        exit = vcpu.run()
        while isinstance(exit, Kicked):
            exit = vcpu.run()
        return exit

    def run(self, code: bytes, number: int = 0, **registers: int) -> None:
        """Run ``code`` and DONE to the end."""
        exit = self.finish(self.load(code + DONE, number, **registers))
        assert isinstance(exit, IoOut), exit
        assert exit.port == PORT, exit

    def writes(self) -> list[Write]:
        """What was noted since the last call."""
        found = self.recorder.writes
        self.recorder.calls.clear()
        return found

    def close(self) -> None:
        self.machine.close()
        self.memory.close()

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


BACKENDS = ("kvm", "model", "page-track")
"""Real KVM and the model, both with read-only slots, and the model of a KVM host, which tracks pages."""


@contextmanager
def open_backend(name: str) -> Iterator[System]:
    """One of BACKENDS."""
    if name == "page-track":
        with ModelSystem(profile=profile(*DEVELOPMENT_HOST)) as system:
            yield system
    else:
        with open_system(name) as system:
            yield system


@pytest.fixture(params=[pytest.param("kvm", marks=pytest.mark.kvm), *BACKENDS[1:]])
def tracking_system(request: pytest.FixtureRequest) -> Iterator[System]:
    """Each of BACKENDS."""
    with open_backend(request.param) as system:
        yield system


def word(value: int, size: int = 8) -> bytes:
    return (value & (1 << size * 8) - 1).to_bytes(size, "little")
