"""Guests outside 4-level long mode move, too, with proof: digests, and the guest's own checks.

The guest goes round its pages for ever: each must hold the number of the last pass, and gets this one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from pykvm.errors import VerificationError
from pykvm.guest.devices import Device, DeviceBus
from pykvm.guest.runner import GuestRunner
from pykvm.machine import Machine, System, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.migrate import Policy, pair, send
from pykvm.track import TRACKERS, Tracker, make_tracker
from tests.migrate.fakes import wait_for
from tests.migrate.sides import Destination
from tests.paged import CODE, MEMORY, PAGED, READ_ONLY, WIDE, Layout, build, processor, why_not

PASS_PORT, WRONG_PORT = 0x10, 0x11
PAGES = READ_ONLY
"""All data pages that may be written."""


def program(layout: Layout) -> bytes:
    """The loop; EBX is the number of the pass."""
    wide = layout.mode in WIDE
    window = layout.linear(0).to_bytes(8 if wide else 4, "little")
    step = (b"\x48" if wide else b"") + b"\x81\xc7" + PAGE_SIZE.to_bytes(4, "little")
    head = b"\xff\xc3"  # top: inc ebx
    head += (b"\x48" if wide else b"") + b"\xbf" + window  # mov rdi, window
    head += b"\xb9" + PAGES.to_bytes(4, "little")  # mov ecx, pages
    check = b"\x8b\x07\xff\xc0\x39\xd8"  # again: mov eax, [rdi]; inc eax; cmp eax, ebx
    write = b"\x89\x1f" + step + b"\xff\xc9"  # mov [rdi], ebx; add rdi, 4096; dec ecx
    tell = b"\x89\xd8\xe7" + bytes([PASS_PORT])  # mov eax, ebx; out PASS_PORT, eax
    loop = check + b"\x75" + bytes([len(write) + 2 + len(tell) + 5]) + write  # jne wrong
    loop += b"\x75" + bytes([256 - len(loop) - 2])  # jnz again
    code = head + loop + tell
    code += b"\xe9" + (-len(code) - 5).to_bytes(4, "little", signed=True)  # jmp top
    code += b"\x89\xf8\xe7" + bytes([WRONG_PORT])  # wrong: mov eax, edi; out WRONG_PORT, eax
    return code + b"\xe9" + (-len(code) - 5).to_bytes(4, "little", signed=True)


class Wrong(NamedTuple):
    """A page that held something else: the lower half of its linear address."""

    gpa: int
    expected: int = 0
    found: int = 0
    page: int = 0
    cause: str = "not the number of the last pass"


class Findings(NamedTuple):
    checks: int
    corruption_count: int
    corruptions: tuple[Wrong, ...]


class Book(Device):
    """Counts what the guest tells."""

    def __init__(self) -> None:
        self.passes = 0
        self.wrong: list[Wrong] = []

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        if port == PASS_PORT:
            self.passes += 1
        else:
            self.wrong.append(Wrong(value))


class CheckingGuest:
    """The machine with the guest in it; satisfies pykvm.migrate.guest.Guest."""

    def __init__(self, machine: Machine, memory: GuestMemory, layout: Layout) -> None:
        self.machine, self.memory, self.config = machine, memory, layout
        self._book = Book()
        bus = DeviceBus()
        bus.attach_ports(self._book, PASS_PORT, 2)
        self.runner = GuestRunner(machine, bus)

    @classmethod
    def create(cls, system: System, layout: Layout, tracker: Tracker) -> CheckingGuest:
        machine, memory = system.create_machine(), GuestMemory(MEMORY)
        try:
            tracker.prepare(machine)
            machine.create_slot(memory, 0)
            state, _ = build(memory, layout)
            memory.write(CODE, program(layout))
            vcpu = machine.create_vcpu()
            vcpu.set_cpuid(processor(machine))
            state.apply(vcpu)
            return cls(machine, memory, layout)
        except BaseException:
            machine.close()
            memory.close()
            raise

    @classmethod
    def adopt(cls, machine: Machine, memory: GuestMemory, description: Mapping[str, Any]) -> CheckingGuest:
        return cls(machine, memory, Layout(**description))

    def report(self) -> Findings:
        wrong = tuple(self._book.wrong)
        return Findings(self._book.passes * PAGES, len(wrong), wrong)

    def close(self) -> None:
        self.runner.stop()
        self.machine.close()
        self.memory.close()


@contextmanager
def running(system: System, layout: Layout, tracker: Tracker) -> Iterator[CheckingGuest]:
    """A guest that has gone round at least twice, or a skip that says what the host lacks."""
    reason = why_not(system, layout)
    if reason is not None:
        pytest.skip(reason)
    guest = CheckingGuest.create(system, layout, tracker)
    try:
        guest.runner.start()
        wait_for(lambda: guest.report().checks > 2 * PAGES, 30)
        yield guest
    finally:
        guest.close()


def destination(system: System, channel: Any) -> Destination:
    seconds = 0.2 if system.backend == "kvm" else 1
    return Destination(channel, system, adopt=CheckingGuest.adopt, check_seconds=seconds)


SMALL = [layout for layout in PAGED if layout.page_size == PAGE_SIZE]
MOVES = [(layout, name) for layout in SMALL for name in TRACKERS]
MOVES += [(layout, "bitmap") for layout in PAGED if layout not in SMALL]


@pytest.mark.parametrize(("layout", "name"), MOVES, ids=str)
def test_a_guest_of_every_paging_mode_moves_with_proof(system: System, layout: Layout, name: str) -> None:
    tracker = make_tracker(name)
    with running(system, layout, tracker) as guest:
        here, there = pair()
        other = destination(system, there)
        result = send(guest, tracker, here, Policy(downtime_limit=0, max_rounds=3))
        received = other.join()
        assert received is not None
        with received:
            stopped = guest.report()
            before = received.guest.report().checks
            wait_for(lambda: received.guest.report().checks > before, 10)
            assert received.guest.report().corruption_count == 0
            assert guest.report() == stopped
    assert result.verified
    assert result.digest_source == result.digest_destination
    assert result.guest.checks > 0
    result.guest.require_intact()


@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_a_page_that_is_lost_on_the_way_is_named(system: System, layout: Layout) -> None:
    tracker = make_tracker("bitmap")
    with running(system, layout, tracker) as guest:
        here, there = pair()
        other = destination(system, there)
        with pytest.raises(VerificationError, match=r"^1 of \d+ pages differ at the destination: gfn 0x"):
            send(guest, tracker, here, sabotage="lost-page")
        assert other.join() is None
        before = guest.report().checks
        wait_for(lambda: guest.report().checks > before, 10)
        assert guest.report().corruption_count == 0
