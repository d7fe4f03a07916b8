"""A world of flow.py on a real KVM."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pykvm.kvm import KvmSystem, KvmVcpu
from pykvm.machine.exits import Exit
from pykvm.memory import GuestMemory
from tests.model.chip import SIZE
from tests.model.flow import World
from tests.patience import patient

_SECONDS = patient(2)


@contextmanager
def ended_on_kvm(system: KvmSystem, world: World) -> Iterator[tuple[Exit, KvmVcpu, GuestMemory]]:
    """Run the world to its first exit (Kicked when it takes too long): that, its vCPU and its memory."""
    with system.create_machine() as vm, GuestMemory(SIZE) as memory:
        memory.write(0, bytes(world.memory))
        vm.create_slot(memory, 0)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(vm.supported_cpuid)
        world.special.apic_base = vcpu.get_special_registers().apic_base
        vcpu.set_special_registers(world.special)
        vcpu.set_registers(world.registers)
        timer = threading.Timer(_SECONDS, vcpu.kick)
        timer.start()
        try:
            exit_ = vcpu.run()
        finally:
            timer.cancel()
        yield exit_, vcpu, memory
