"""A VM's whole life: memory, slot, vCPU, one exit, and all of it taken down again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guest_code import CODE, port_writes
from measure import Effort, Row, paired, quiet, ratio_row, timed
from yardstick import checked

from pykvm.kvm import KvmSystem
from pykvm.machine import Registers
from pykvm.memory import GuestMemory

SIZE = 64 << 20
GUEST = port_writes(b"x")


def live_once(system: KvmSystem) -> None:
    """What yardstick_lifecycle does, through the public API."""
    with system.create_machine() as vm, GuestMemory(SIZE) as memory:
        memory.write(CODE, GUEST)
        vm.create_slot(memory, 0)
        vcpu = vm.create_vcpu()
        special = vcpu.get_special_registers()
        special.cs.base = special.cs.selector = 0
        vcpu.set_special_registers(special)
        vcpu.set_registers(Registers(rip=CODE))
        vcpu.run()


def measure(yardstick: Any, effort: Effort) -> Iterator[Row]:
    with KvmSystem() as system, quiet():

        def library() -> float:
            return timed(lambda: live_once(system))

        def plain() -> float:
            return checked(yardstick.yardstick_lifecycle(system.fileno(), SIZE, GUEST, len(GUEST)))

        pairs = paired(effort.rounds(300, 80), library, plain, warm_up=5)
        yield ratio_row("lifecycle", "create + run + destroy a VM", pairs, per="VM", target=1.3)


__all__ = ["measure"]
