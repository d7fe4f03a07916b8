"""Segment loads, far transfers, exceptions and tasks on the model and on a real KVM: the same end.

On hosts whose KVM emulates guest code at CPL 0 this tests KVM's in-kernel emulator; what it cannot do or
does otherwise than the SDM says is listed here and in docs/kvm-findings.md.
"""

from __future__ import annotations

from dataclasses import fields

import pytest

from pykvm.kvm import KvmSystem
from pykvm.machine import SpecialRegisters
from pykvm.machine.exits import Exit, Halted, InternalError
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.model.cpu.processor import Processor
from pykvm.model.system import ModelSystem
from pykvm.x86.registers import SEGMENTS, Registers
from tests.model.chip import SIZE
from tests.model.flow import World, handler, same_segment
from tests.model.flow_cases import WORLDS
from tests.model.flow_kvm import emulates_cpl0, ended_on_kvm, under_tcg

pytestmark = pytest.mark.timeout(60)

_NATIVE = "at CPL 3 the host's processor runs with the host's GDT"
_INVALID = "at CPL 3 what the emulator does not do is #UD"
_UNCHECKED = "delivery does not check gate and segment"
_OTHERWISE = {
    "task gate for an exception": "a task gate is taken for an interrupt gate",
    "task gate with an error code": "a task gate is taken for an interrupt gate",
    "invalid opcode by 16-bit gate": "a 16-bit gate pushes 32-bit values",
    "absent gate": "the fault of a delivery is always a double fault",
    "no gate": "the fault of a delivery is always a double fault",
    "gate to null": "the fault of a delivery is always a double fault",
    "gate to data": _UNCHECKED,
    "gate to absent code": _UNCHECKED,
    "gate to user code": _UNCHECKED,
    "long gate to 32-bit code": _UNCHECKED,
    "stack beyond its limit": "delivery pushes beyond the stack's limit",
    "real stack wrap": "delivery pushes beyond the stack's limit",
    "real invalid opcode beyond the ivt": "the limit of the IDTR is ignored in real mode",
    "invalid opcode with flags": "delivery clears RFLAGS.AC",
    "local tss": "error code 0 instead of the selector",
    "long return to 32 bits with null stack": "IRETQ to 32-bit code takes a null SS",
    "long return not canonical": "#GP at the target, after IRETQ has loaded the rest",
    "push of a segment register": "a 32-bit push of a segment register writes 16 bits, AMD's processors 32",
    "single step over mov ss": "MOV SS does not hold off the single-step trap",
    "data breakpoint": "data breakpoints never fire (hosts.md C.4)",
    "user interrupt": _INVALID,
    "user interrupt by trap gate": _INVALID,
    "user interrupt without privilege": _INVALID,
    "user breakpoint without privilege": _INVALID,
    "user interrupt by 16-bit gate": _INVALID,
    "user iret keeps if and iopl": _INVALID,
    "call gate": _INVALID,
    "call gate and return": _INVALID,
    "call gate of 16 bits": _INVALID,
    "call gate to conforming code": _INVALID,
    "jump through a call gate to inner code": _INVALID,
    "call gate without privilege": _INVALID,
    "long user interrupt": _INVALID,
    "long call gate": _NATIVE,
    "long call gate and return": _NATIVE,
    "long user far jump to 32 bits": _NATIVE,
    "long user segments": "KVM_GET_SREGS does not show null segments of native code",
    "long user breakpoint without privilege": "INT3 does not check the gate's DPL",
    "long return to user": "IRETQ to CPL 3 leaves segments of CPL 0 in DS, ES, FS and GS",
    "long return to 32-bit user": "IRETQ to CPL 3 leaves segments of CPL 0 in DS, ES, FS and GS",
    "general detect": "#DB of general detect pushes RF clear, although it is a fault",
}
"""What a KVM that emulates CPL 0 does otherwise than the SDM (docs/kvm-findings.md)."""
_LIMIT = "does not check segment limits"
_EXT = "leaves EXT clear in the error code of a fault during a delivery"
_TASK = "switches tasks itself, though KVM intercepts that, and not as the SDM says"
_UNDER_TCG = {
    "task with a null stack": _TASK,
    "task with absent code": _TASK,
    "task with data as code": _TASK,
    "task with system segment in ds": _TASK,
    "task with absent ds": _TASK,
    "task with a bad ldt": _TASK,
    "task gate with an error code": _TASK,
    "call a 16-bit tss": _TASK,
    "task trap": _TASK,
    "stack beyond its limit": _LIMIT,
    "real stack wrap": _LIMIT,
    "absent gate": _EXT,
    "no gate": _EXT,
    "gate to null": _EXT,
    "gate to data": _EXT,
    "gate to absent code": _EXT,
    "gate to user code": _EXT,
    "long gate to 32-bit code": _EXT,
    "general detect": "pushes RF clear for general detect",
    "long return to 32 bits with null stack": "IRET takes a null SS in 32-bit code",
    "long return not canonical": "#GP comes at the target of the IRET, with SS and RSP loaded",
    "user breakpoint without privilege": "pushes the address behind an INT3 that faults",
    "long user breakpoint without privilege": "pushes the address behind an INT3 that faults",
    "call gate to conforming code": "a call gate to conforming code leaves RPL 0 in CS",
    "accessed bits": "a far transfer does not mark the code segment accessed",
    "access through null": "memory is accessed through null segments",
    "expand-down segment": _LIMIT,
    "write to read-only": "does not check a segment's type at the access",
    "beyond the limit": _LIMIT,
    "general protection": _LIMIT,
    "far return beyond the limit": _LIMIT,
    "real far jump beyond the limit": _LIMIT,
    "real beyond the limit": _LIMIT,
    "call gate beyond the limit": _LIMIT,
    "null in ltr": "LTR takes a null selector",
    "long far jump to wide and long": "takes a code segment with both L and D, which VMRUN refuses then",
    "double fault": "pushes RF clear for a double fault",
    "long with ist": "makes SS null when the interrupt stack table switches stacks",
    "long null ss with rpl": "MOV takes any null selector for SS in 64-bit mode",
    "compatibility data segments": _LIMIT,
    "syscall": "SYSCALL loses the arithmetic flags",
    "return to user with absent stack": "IRET to an absent stack raises #NP in place of #SS",
}
"""Where QEMU's TCG is no faithful processor."""


def _on_kvm(system: KvmSystem, world: World) -> tuple[Exit, Registers, SpecialRegisters, bytes]:
    with ended_on_kvm(system, world) as (exit_, vcpu, memory):
        return exit_, vcpu.get_registers(), vcpu.get_special_registers(), bytes(memory.read(0, SIZE))


def _differences(cpu: Processor, registers: Registers, special: SpecialRegisters, memory: bytes) -> list[str]:
    found = []
    mine, mine_special = cpu.get_registers(), cpu.get_special_registers()
    for each in fields(Registers):
        a, b = getattr(mine, each.name), getattr(registers, each.name)
        if a != b:
            found.append(f"{each.name}: model {a:#x}, KVM {b:#x}")
    for name in ("cr0", "cr2", "cr3", "cr4", "efer", "gdt", "idt"):
        x, y = getattr(mine_special, name), getattr(special, name)
        if x != y:
            found.append(f"{name}: model {x}, KVM {y}")
    for name in SEGMENTS:
        c, d = getattr(mine_special, name), getattr(special, name)
        if not same_segment(c, d):
            found.append(f"{name}: model {c}\n{' ' * len(name)}  KVM   {d}")
    image = bytes(cpu.bus.bytes)  # type: ignore[attr-defined]
    pages = range(0, SIZE, PAGE_SIZE)
    return found + [
        f"[{at:#x}]: model {image[at : at + 4].hex()}, KVM {memory[at : at + 4].hex()}"
        for page in pages
        if image[page : page + PAGE_SIZE] != memory[page : page + PAGE_SIZE]
        for at in range(page, page + PAGE_SIZE, 4)
        if image[at : at + 4] != memory[at : at + 4]
    ]


def _against_kvm(system: KvmSystem, world: World) -> list[str]:
    exit_, registers, special, memory = _on_kvm(system, world)
    if isinstance(exit_, InternalError) and exit_.suberror == 1 and emulates_cpl0(system):
        pytest.xfail("KVM cannot emulate it")
    cpu = world.processor(cpuid=system.supported_cpuid)
    ours = cpu.run(10000)
    if type(ours) is not type(exit_):
        return [f"model {ours} at {cpu.rip:#x}, KVM {exit_} at {registers.rip:#x}"]
    return _differences(cpu, registers, special, memory) if isinstance(exit_, Halted) else []


@pytest.mark.parametrize("name", under_tcg(WORLDS, _UNDER_TCG))
def test_model_and_kvm_end_alike(system: KvmSystem, name: str) -> None:
    found = _against_kvm(system, WORLDS[name]())
    if found and name in _OTHERWISE and emulates_cpl0(system):
        pytest.xfail(_OTHERWISE[name])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_queued_interrupt_does_not_wait_for_if(system: KvmSystem, bits: int) -> None:
    """KVM_INTERRUPT is for a host that asked whether the guest takes one; the model does as KVM."""
    ends = []
    for opened in (system, ModelSystem()):
        world = World(bits).code("90f4")
        with opened, opened.create_machine() as vm, GuestMemory(SIZE) as memory:
            memory.write(0, bytes(world.memory))
            vm.create_slot(memory, 0)
            vcpu = vm.create_vcpu()
            vcpu.set_cpuid(vm.supported_cpuid)
            vcpu.set_special_registers(world.special)
            vcpu.set_registers(world.registers)
            vcpu.interrupt(0x30)
            assert vcpu.get_events().interrupt_injected
            assert vcpu.run() == Halted()
            ends.append(vcpu.get_registers())
    assert ends[0] == ends[1]
    assert ends[0].rip == handler(0x30) + 1
