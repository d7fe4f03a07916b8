"""How kvm_pvm differs from hosts with hardware virtualization in what comes between instructions.

Measured on such a host (docs/reference/hosts.md B.10, C.2): user code runs with the host's descriptor tables
and without I/O privileges, what it may not do goes to KVM's emulator, and events are delivered by software.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu import gates, stacks
from pykvm.model.cpu.cpuid_table import supported_cpuid
from pykvm.model.cpu.descriptors import null_segment
from pykvm.model.cpu.faults import Fault, NeedInput, TripleFault
from pykvm.model.cpu.features import Features
from pykvm.model.cpu.instruction import FS, GS, RSP, SS, SegmentRegister
from pykvm.model.cpu.stacks import push_all, stack_error
from pykvm.model.mmu.emulated_opcodes import LENIENT
from pykvm.model.paging import Access
from pykvm.x86.bits import Cr0, PageFault, Rflags
from pykvm.x86.exceptions import Vector

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.profiled.access import HostAccess
    from pykvm.model.profiled.processor import HostProcessor

_TRAPPED: Final = frozenset(
    {"in", "out", "ins", "outs", "sgdt", "sidt", "sldt", "str", "smsw", "hlt", "cli", "sti", "int"}
)
_HOST_DATA: Final = frozenset({0, 4, 5, 6, 15})
"""Entries of the host's GDT that user code may load: null, its code and data, and the CPU number's."""
_NOT_EMULATED: Final = b"\x0f\x0b"
"""UD2 goes to the guest at once; after any other #UD the emulator tries."""
_DIRECT: Final = frozenset({"swapgs"}) | LENIENT
BASES: Final = {
    "rdfsbase": (FS, False),
    "rdgsbase": (GS, False),
    "wrfsbase": (FS, True),
    "wrgsbase": (GS, True),
}
"""Instructions on the bases of FS and GS: which one, and whether they write it."""

LOST_FLAGS: Final = int(Rflags.IOPL3)
"""What user code does not have in RFLAGS, whatever was set there."""
HOST_AREA: Final = 0x1FFFF00
"""Upper bits, from 39 on, of addresses that user code cannot have: entry 256 of the PML4 is the host's."""


def host_area_fault(address: int, access: int) -> Fault:
    """What user code gets there, whatever its tables say; KVM does not see it as a fault of its own."""
    error = PageFault.US
    if access & Access.WRITE:
        error |= PageFault.WR
    if access & Access.FETCH:
        error |= PageFault.ID
    return Fault(Vector.PF, int(error), address=address)


def hardware(guest: Features) -> Features:
    """What user code finds in the host's processor, whatever the guest's CPUID says."""
    return replace(_reference(), amd=guest.amd, physical_bits=guest.physical_bits)


@cache
def _reference() -> Features:
    return Features.of(supported_cpuid())


def cannot_run(cpu: HostProcessor) -> bool:
    """Whether the vCPU is in a paging mode that the host refuses: all but that of long mode."""
    return bool(cpu.cr0 & Cr0.PG) and not cpu.long_mode


def is_trapped(cpu: HostProcessor, insn: Instruction) -> bool:
    """Whether native user code cannot do this itself, so that KVM's emulator does it."""
    name = insn.name
    if name in _TRAPPED:
        return True
    if name in {"mov_sreg", "pop_sreg"} and isinstance(insn.operands[0], SegmentRegister):
        if name == "pop_sreg":
            return False
        selector = insn.operands[1]
        if selector.is_memory:
            return False
        value = selector.read(cpu) & 0xFFFF
        return bool(value & 4) or value >> 3 not in _HOST_DATA
    return False


def emulates_fault(cpu: HostProcessor, fault: Fault) -> bool:
    """Whether KVM's emulator tries the instruction that ended in this fault."""
    if fault.vector == Vector.UD:
        return not cpu.at(_NOT_EMULATED)
    return fault.vector == Vector.GP and cpu.decoded_name not in _DIRECT


def repairs_fault(cpu: HostProcessor, fault: Fault) -> bool:
    """Whether kvm_pvm itself carries out the instruction that ended in this fault."""
    return fault.vector == Vector.GP and cpu.decoded_name in LENIENT


def move_base(cpu: HostProcessor, insn: Instruction) -> None:
    """RDFSBASE and its like as kvm_pvm does them, whatever CR4.FSGSBASE says."""
    segment, writes = BASES[insn.name]
    (operand,) = insn.operands
    base = cpu.segments[segment].base
    if writes:
        cpu.set_segment(segment, replace(cpu.segments[segment], base=operand.read(cpu)))
    else:
        operand.write(cpu, base & (1 << 8 * operand.size) - 1)
    cpu.rip = cpu.rip + insn.length & cpu.ip_mask
    cpu.instructions += 1


class EndlessDelivery(Exception):
    """The handler's code segment cannot be loaded: kvm_pvm goes there nevertheless, and its first instruction
    faults for ever.  KVM_RUN returns for a signal only."""


def enter_handler(cpu: HostAccess, event: gates.Event) -> None:
    """Deliver an event by software.  Raises TripleFault for any fault on the way: no second one is delivered,
    nor counted, and CR2 stays."""
    cpu.probing = True
    try:
        _deliver(cpu, event)
    except (Fault, NeedInput):
        cpu.rollback()
        raise TripleFault from None
    finally:
        cpu.probing = False


def _deliver(cpu: HostAccess, event: gates.Event) -> None:
    """Gate, stack, frame, and the code segment last, whose accessed bit stays as it is."""
    if not cpu.long_mode:
        gates.enter(cpu, event)
        return
    gate = gates.read_gate(cpu, event, 16)
    ist = gate.parameters & 7
    frame = gates.long_frame(cpu, event)
    rsp = cpu.regs[RSP]
    inner = cpu.cpl != 0
    if ist:
        rsp = stacks.interrupt_stack(cpu, ist, event.ext)
    elif inner:
        rsp = stacks.inner_stack64(cpu, 0, event.ext)
    if inner:
        cpu.set_segment(SS, null_segment(0, 0))
    cpu.regs[RSP] = rsp & ~0xF
    with stack_error(event.ext):
        push_all(cpu, frame, 8, event.error)
    try:
        code = gates.handler_code(cpu, gate.selector, event.ext, marks=False)
    except Fault as fault:
        if fault.vector != Vector.PF:
            raise EndlessDelivery from None
        # A double fault comes as far: its frame lies where this one is, and its error code is 0.
        cpu.regs[RSP] = rsp & ~0xF
        with stack_error(event.ext):
            push_all(cpu, frame, 8, 0)
        raise
    gates.leave(cpu, gate, code, event.ext)
