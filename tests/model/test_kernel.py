"""The multiboot kernel that brings tables, handlers and a user of its own, from 32 bits to long mode."""

from __future__ import annotations

import pytest

from pykvm.errors import EmulationError
from pykvm.guest import catalog
from pykvm.guest.devices import DeviceBus
from pykvm.guest.images import load_image
from pykvm.guest.launch import launch
from pykvm.guest.pc_devices import COM_PORTS, DebugExit, Serial16550
from pykvm.kvm import KvmSystem
from pykvm.machine import System
from pykvm.model import paging
from pykvm.model.cpu import decode
from pykvm.model.cpu.semantics import TABLE
from pykvm.model.system import ModelSystem
from tests.patience import patient

LINES = [
    "protected mode: exceptions, user",
    "32-bit paging: exceptions, pages on demand, user",
    "PAE paging: exceptions, pages on demand, user",
    "long mode: exceptions, pages on demand, user",
]
PASSED, FAILED = 1, 3
PAGES, DEMAND, POOL = 64, 0x40000000, 0x200000  # guests/kernel.S


def run(system: System) -> tuple[int | None, list[str], bytes]:
    """Exit status, what it printed, and the pages that it mapped on demand."""
    serial, bus = Serial16550(), DeviceBus()
    bus.attach_ports(serial, COM_PORTS[1], 8)
    bus.attach_ports(DebugExit(), DebugExit.PORT)
    with launch(system, load_image(catalog.load("kernel").image), bus, memory=8 << 20) as guest:
        guest.runner.start()
        status = guest.runner.wait(patient(30))
        pool = guest.memory.read(POOL, PAGES << 12)
    return status, serial.output.decode().splitlines(), pool


@pytest.mark.parametrize("translate", [True, False], ids=["translated", "interpreted"])
def test_the_model_runs_it(translate: bool) -> None:
    status, lines, pool = run(ModelSystem(translate=translate))
    assert (status, lines) == (PASSED, LINES)
    for number in range(PAGES):
        page = DEMAND + (number << 12)
        assert pool[number << 12 :][:4] == page.to_bytes(4, "little")


@pytest.mark.kvm
def test_kvm_runs_it() -> None:
    with KvmSystem() as system:
        try:
            status, lines, _ = run(system)
        except EmulationError as error:
            pytest.skip(f"this KVM emulates CPL 0 and cannot go on: {error}")
    assert (status, lines) == (PASSED, LINES)


def test_it_fails_without_system_calls_that_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """LEA is what the system call computes its result with."""
    monkeypatch.setattr(decode, "decoder", decode.Decoder)  # those that are shared know instructions already
    monkeypatch.setitem(TABLE, "lea", TABLE["nop"])
    assert run(ModelSystem(translate=False))[:2] == (FAILED, [])


def test_it_fails_where_page_faults_tell_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "_WRITE", 0)
    assert run(ModelSystem(translate=False))[:2] == (FAILED, LINES[:1])
