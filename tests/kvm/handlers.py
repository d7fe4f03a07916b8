"""Interrupt handlers for the tiny guest at CPL 0: handler v reports its own number and goes on spinning."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable

from pykvm.kvm import KvmVcpu
from pykvm.machine import Exit
from pykvm.memory import PAGE_SIZE
from pykvm.x86.registers import DescriptorTable
from tests.patience import patient

from .tiny import DATA, GDT, PORT, Tiny

IDT = DATA + 32
HANDLERS = IDT + 1
_CODE64 = 0x00AF9B000000FFFF
_DATA = 0x00CF93000000FFFF


def install(guest: Tiny, vectors: Iterable[int], vcpu: KvmVcpu | None = None) -> None:
    """Gates for ``vectors`` (SDM vol. 3, 6.14.1) to ``mov al, v; out 0x10, al; jmp $``."""
    guest.memory.write(GDT * PAGE_SIZE, struct.pack("<3Q", 0, _CODE64, _DATA))
    for number, vector in enumerate(vectors):
        handler = HANDLERS * PAGE_SIZE + 16 * number
        guest.memory.write(handler, bytes([0xB0, vector, 0xE6, PORT, 0xEB, 0xFE]))
        gate = struct.pack("<HHBBHII", handler & 0xFFFF, 8, 0, 0x8E, handler >> 16 & 0xFFFF, handler >> 32, 0)
        guest.memory.write(IDT * PAGE_SIZE + 16 * vector, gate)
    for each in guest.vcpus if vcpu is None else [vcpu]:
        special = each.get_special_registers()
        special.idt = DescriptorTable(IDT * PAGE_SIZE, 0xFFF)
        each.set_special_registers(special)


def run_soon(vcpu: KvmVcpu) -> Exit:
    """``run`` of a guest that should exit at once; Kicked if it does not."""
    return run_for(vcpu, patient(5))


def run_for(vcpu: KvmVcpu, seconds: float) -> Exit:
    """``run`` to the next exit, or Kicked after that time."""
    timer = threading.Timer(seconds, vcpu.kick)
    timer.start()
    try:
        return vcpu.run()
    finally:
        timer.cancel()
        timer.join()
