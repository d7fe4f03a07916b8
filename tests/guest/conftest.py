"""A machine without a guest: vCPUs that return scripted exits, then stay inside until they are kicked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from pykvm.machine import Exit, Kicked, Registers
from tests.backends import system


class FakeVcpu:
    """Follows the contract of ``Vcpu.run`` and ``Vcpu.kick``: each kick ends exactly one run."""

    def __init__(self, vcpu_id: int = 0, script: Iterable[Exit | BaseException] = ()) -> None:
        self.id = vcpu_id
        self.running = False
        self.runs = 0
        self.listened: frozenset[int] | None = frozenset()
        self.replies: list[bytes] = []
        self._script = deque(script)
        self._kicked = False
        self._changed = threading.Condition()

    def run(self) -> Exit:
        with self._changed:
            self.runs += 1
            self.running = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._kicked or self._script)
                if self._kicked:
                    self._kicked = False
                    return Kicked()
                step = self._script.popleft()
            finally:
                self.running = False
        if isinstance(step, BaseException):
            raise step
        return step

    def feed(self, *steps: Exit | BaseException) -> None:
        with self._changed:
            self._script.extend(steps)
            self._changed.notify_all()

    def kick(self, wait: float | None = None) -> None:
        with self._changed:
            self._kicked = True
            self._changed.notify_all()

    def wait_inside(self, timeout: float = 5.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.running and not self._kicked, timeout)

    def reply(self, data: bytes) -> None:
        self.replies.append(data)

    def listen(self, ports: Iterable[int] | None) -> None:
        self.listened = None if ports is None else frozenset(ports)

    def get_registers(self) -> Registers:
        return Registers(rip=0x1234)


class FakeMachine:
    """Only what a runner asks of a machine."""

    backend = "fake"

    def __init__(self, *vcpus: FakeVcpu) -> None:
        self.vcpus: Sequence[Any] = vcpus


@pytest.fixture
def fake_vcpu() -> type[FakeVcpu]:
    return FakeVcpu


@pytest.fixture
def fake_machine() -> type[FakeMachine]:
    return FakeMachine


__all__ = ["FakeMachine", "FakeVcpu", "fake_machine", "fake_vcpu", "system"]
