"""A world of flow.py on a real KVM."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pykvm.kvm import KvmSystem, KvmVcpu
from pykvm.machine.exits import Exit
from pykvm.memory import GuestMemory
from pykvm.x86.registers import SpecialRegisters
from tests.model.chip import SIZE
from tests.model.flow import World
from tests.patience import patient

_SECONDS = patient(2)


def _for_this_processor(special: SpecialRegisters) -> SpecialRegisters:
    """The same state, in words that the emulator of a lab understands.

    QEMU's TCG wants the hidden part of TR available, not busy: through a busy one it takes no stack for inner
    levels ("fatal: invalid tss type" ends the emulator) and no I/O bitmap.  Processors and KVM on AMD make no
    difference, and KVM_GET_SREGS shows busy in any case (svm_get_segment).
    """
    if os.environ.get("PYKVM_LAB_EMULATOR") != "qemu-tcg" or special.tr.type != 0xB:
        return special
    return replace(special, tr=replace(special.tr, type=9))


@contextmanager
def ended_on_kvm(system: KvmSystem, world: World) -> Iterator[tuple[Exit, KvmVcpu, GuestMemory]]:
    """Run the world to its first exit (Kicked when it takes too long): that, its vCPU and its memory."""
    with system.create_machine() as vm, GuestMemory(SIZE) as memory:
        memory.write(0, bytes(world.memory))
        vm.create_slot(memory, 0)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(vm.supported_cpuid)
        world.special.apic_base = vcpu.get_special_registers().apic_base
        vcpu.set_special_registers(_for_this_processor(world.special))
        vcpu.set_registers(world.registers)
        timer = threading.Timer(_SECONDS, vcpu.kick)
        timer.start()
        try:
            exit_ = vcpu.run()
        finally:
            timer.cancel()
        yield exit_, vcpu, memory
