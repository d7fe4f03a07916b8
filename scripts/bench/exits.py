"""Exit round trips: the loop in C, and what a handler in Python adds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from time import perf_counter_ns
from typing import Any

from guest_code import CODE, QUIET_PORT, STOP_PORT, port_writes
from measure import Effort, Row, Sample, paired, quartiles, quiet, ratio_row, timed
from yardstick import checked

from pykvm.abi import lib
from pykvm.guest.boot import real_mode
from pykvm.guest.devices import Device, DeviceBus
from pykvm.kvm import KvmSystem, KvmVcpu
from pykvm.machine import Vcpu
from pykvm.memory import GuestMemory

EXITS = 200
"""Per block: short enough that most blocks run without another process in between."""
IOCTLS = 2000
SEED = 1


class Stopped(Exception):
    """The guest reached STOP_PORT."""


class Quiet(Device):
    """A handler that has nothing to do."""

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        pass


class Stop(Device):
    """Ends the loop."""

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        raise Stopped


def run_with_handler(vcpu: KvmVcpu, bus: DeviceBus) -> None:
    """What a VMM in Python does: run, dispatch, run again."""
    run, handle = vcpu.run, bus.handle
    try:
        while True:
            handle(vcpu, run())
    except Stopped:
        pass


def measure(yardstick: Any, effort: Effort) -> Iterator[Row]:
    with KvmSystem() as system, system.create_machine() as vm, GuestMemory(1 << 20) as memory:
        memory.write(CODE, port_writes(random.Random(SEED).randbytes(EXITS)))
        vm.create_slot(memory, 0)
        vcpu = vm.create_vcpu()
        real_mode(CODE).apply(vcpu)
        run_page = yardstick.yardstick_map(vcpu.fileno(), system.vcpu_mmap_size, 0)
        bus = DeviceBus()
        bus.attach_ports(Quiet(), QUIET_PORT)
        bus.attach_ports(Stop(), STOP_PORT)

        def plain() -> float:
            return checked(yardstick.yardstick_exits(vcpu.fileno(), run_page, STOP_PORT))

        def library_loop() -> float:
            vcpu.listen([STOP_PORT])
            return timed(vcpu.run)

        def handler_loop() -> float:
            vcpu.listen(bus.ports)
            return timed(lambda: run_with_handler(vcpu, bus))

        try:
            with quiet():
                pairs = paired(effort.rounds(400, 100), library_loop, plain, warm_up=3)
                yield ratio_row(
                    "exits", "exit round trip, C loop", pairs, count=EXITS + 1, per="exit", target=1.05
                )
                yield _handler_row(effort.rounds(400, 100), library_loop, handler_loop, system)
        finally:
            yardstick.yardstick_unmap(run_page, system.vcpu_mmap_size)


def _handler_row(rounds: int, library_loop: Sample, handler_loop: Sample, system: KvmSystem) -> Row:
    """(Python loop - C loop) per exit, in empty ioctls made through the binding."""
    handle = system._handle  # the C handle itself: the cheapest call that Python can make

    def empty_ioctls() -> float:
        call, request = lib.pykvm_ioctl_int, lib.KVM_GET_API_VERSION
        start = perf_counter_ns()
        for _ in range(IOCTLS):
            call(handle, request, 0)
        return (perf_counter_ns() - start) / IOCTLS

    added, ioctls = [], []
    for loop, bare in paired(rounds, handler_loop, library_loop, warm_up=3):
        added.append((loop - bare) / (EXITS + 1))
        ioctls.append(empty_ioctls())
    ioctl = statistics.median(ioctls)
    low, middle, high = quartiles([value / ioctl for value in added])
    return Row(
        item="exits",
        name="a Python handler adds",
        value=middle,
        low=low,
        high=high,
        ours=statistics.median(added),
        yardstick=ioctl,
        rounds=rounds,
        per="exit",
        unit="empty ioctls",
        target=3.0,
    )


__all__ = ["measure"]
