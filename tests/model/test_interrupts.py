"""Delivery of exceptions and interrupts, software interrupts and IRET; expected values from the SDM."""

from __future__ import annotations

import pytest

from pykvm.machine.exits import Halted, InternalError, Shutdown
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import CS, DS, ES, FS, GS, RAX, RBX, RCX, RSP, SS
from pykvm.model.cpu.processor import Processor
from pykvm.x86.bits import Cr4, Rflags
from pykvm.x86.exceptions import Vector
from pykvm.x86.registers import DescriptorTable, Segment
from tests.model.flow import (
    CODE,
    CODE32,
    CODE32_USER,
    CODE64,
    CODE64_USER,
    CONFORMING,
    DATA,
    DATA32,
    DATA_USER,
    FREE,
    STACK,
    STACK3,
    STACK_IST,
    STACK_TSS,
    TSS,
    World,
    descriptor,
    gate,
    handler,
)
from tests.model.flow_cases import WORLDS

_NOPS = "90" * 16


def _top(cpu: Processor, count: int, size: int = 4) -> list[int]:
    return [cpu.load(SS, cpu.regs[RSP] + number * size, size) for number in range(count)]


# --- frames ---------------------------------------------------------------------------------------------


def test_a_fault_pushes_the_instruction_with_rf() -> None:
    """SDM vol. 3, 18.3.1.1: RF is set in the image of a fault."""
    ended = WORLDS["invalid opcode with flags"]().run()
    assert ended.vector == Vector.UD
    assert ended.stack(3, 4) == [CODE + 6, CODE32, 0x40AD7 & ~Rflags.TF | Rflags.RF]
    assert ended.cpu.rflags == 0x408D7  # IF goes


def test_a_trap_gate_leaves_if() -> None:
    assert WORLDS["invalid opcode by trap gate"]().run().cpu.rflags == 0x202


def test_a_16_bit_gate_pushes_words() -> None:
    ended = WORLDS["invalid opcode by 16-bit gate"]().run()
    assert (ended.stack(3, 2), ended.cpu.regs[RSP]) == ([CODE, CODE32, 2], STACK - 6)


def test_an_inner_level_gets_its_stack() -> None:
    ended = WORLDS["user invalid opcode"]().run()
    assert ended.stack(5, 4) == [CODE, CODE32_USER, 0x10002, STACK3, DATA_USER]
    assert (ended.cpu.regs[RSP], ended.cpu.segments[SS].selector) == (STACK_TSS - 20, DATA32)
    assert ended.cpu.segments[DS].selector == DATA_USER


def test_long_mode_aligns_and_pushes_the_stack_always() -> None:
    ended = WORLDS["long aligned"]().run()
    assert ended.cpu.regs[RSP] == STACK - 16 - 40
    assert ended.stack(5, 8) == [CODE + 2, CODE64, 0x10002, STACK - 8, DATA32]


def test_ist() -> None:
    ended = WORLDS["long with ist"]().run()
    assert (ended.cpu.regs[RSP], ended.cpu.segments[SS].selector) == (STACK_IST - 40, DATA32)
    ended = WORLDS["long user invalid opcode with ist"]().run()
    assert (ended.cpu.regs[RSP], ended.cpu.segments[SS].selector) == (STACK_IST - 40, 0)


def test_long_mode_from_cpl_3() -> None:
    ended = WORLDS["long user invalid opcode"]().run()
    assert ended.stack(5, 8) == [CODE, CODE64_USER, 0x10002, STACK3, DATA_USER]
    assert (ended.cpu.cpl, ended.cpu.segments[SS].selector) == (0, 0)


def test_a_page_fault_leaves_its_address() -> None:
    ended = WORLDS["long page fault on write"]().run()
    assert (ended.vector, ended.cpu.cr2, ended.stack(1, 8)) == (Vector.PF, 0x200FFE, [2])
    assert WORLDS["long page fault"]().run().stack(2, 8) == [0, CODE]


def test_real_mode() -> None:
    ended = WORLDS["real invalid opcode"]().run()
    assert ended.vector == Vector.UD
    assert ended.stack(3, 2) == [CODE + 2, 0, 0x602]
    assert ended.cpu.rflags == 0x402
    cpu = WORLDS["interrupt and return"]().run().cpu
    assert (cpu.regs[RAX], cpu.regs[RCX], cpu.regs[RBX], cpu.regs[RSP]) == (1, 3, 2, STACK)


def test_traps_push_the_next_instruction() -> None:
    assert WORLDS["real overflow trap"]().run().stack(1, 2) == [CODE + 5]
    assert WORLDS["real breakpoint"]().run().stack(1, 2) == [CODE + 1]
    assert WORLDS["user interrupt"]().run().stack(3, 4) == [CODE + 2, CODE32_USER, 2]


# --- what is wrong with a gate --------------------------------------------------------------------------

REFUSED = {
    # world: vector and error code; EXT is set for exceptions, clear for software interrupts
    "absent gate": (Vector.NP, 6 * 8 + 3),
    "no gate": (Vector.GP, 6 * 8 + 3),
    "gate to null": (Vector.GP, 1),
    "gate to data": (Vector.GP, DATA32 + 1),
    "gate to absent code": (Vector.NP, FREE + 1),
    "gate to user code": (Vector.GP, (CODE32_USER & ~3) + 1),
    "long gate to 32-bit code": (Vector.GP, CODE32 + 1),
    "user interrupt without privilege": (Vector.GP, 0x80 * 8 + 2),
    "user breakpoint without privilege": (Vector.GP, 3 * 8 + 2),
    "long user breakpoint without privilege": (Vector.GP, 3 * 8 + 2),
    "user halt": (Vector.GP, 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_delivery_that_faults(name: str) -> None:
    ended = WORLDS[name]().run()
    assert (ended.vector, ended.stack(2, 8 if ended.cpu.bits64 else 4)) == (
        REFUSED[name][0],
        [REFUSED[name][1], CODE],
    )


def test_beyond_the_idt() -> None:
    world = World().code("cd21")
    world.special.idt = DescriptorTable(world.special.idt.base, 0x21 * 8 + 6)
    ended = world.run()
    assert (ended.vector, ended.stack(1, 4)) == (Vector.GP, [0x21 * 8 + 2])


def test_the_handler_must_lie_in_its_segment() -> None:
    world = World().code("cd21").define(FREE, descriptor(0xB, limit=0x8FFF, flags=4))
    ended = world.handle(0x21, 0x9000, selector=FREE).run()
    assert (ended.vector, ended.stack(2, 4)) == (Vector.GP, [0, CODE])


def test_a_failed_delivery_leaves_nothing() -> None:
    """SS0 is absent: neither stack nor registers show that #UD was tried."""
    world = World(cpl=3).code("0f0b").define(DATA32, descriptor(3, p=0))
    world.handle(Vector.SS, handler(Vector.SS), selector=CONFORMING)
    cpu = world.processor()
    cpu.step()
    assert cpu.rip == handler(Vector.SS)
    assert _top(cpu, 4) == [DATA32 | 1, CODE, CODE32_USER, 0x10002]
    assert cpu.regs[RSP] == STACK3 - 16
    assert cpu.bus.dirty == {STACK3 - 16 >> 12}  # type: ignore[attr-defined]


# --- double and triple faults ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "gates", "expected"),
    [
        # SDM vol. 3, table 6-5: rows contributory and page fault, columns benign to page fault
        ("66b800108ed8", {13: bytes(8)}, Vector.DF),  # #GP, then #GP
        ("66b800108ed8", {13: gate(0xE, CODE32, 0, p=0)}, Vector.DF),  # #GP, then #NP
        ("0f0b", {6: gate(0xE, CODE32, 0, p=0)}, Vector.NP),  # benign, then #NP
        ("0f0b", {6: bytes(8), 13: bytes(8)}, Vector.DF),  # benign, then #GP, then #GP
        ("31c9f7f1", {0: bytes(8)}, Vector.DF),  # #DE, then #GP
    ],
)
def test_double_faults(first: str, gates: dict[int, bytes], expected: int) -> None:
    world = World().code(first)
    for vector, data in gates.items():
        world.gate(vector, data)
    ended = world.run()
    assert ended.vector == expected
    if expected == Vector.DF:
        assert ended.stack(1, 4) == [0]


def test_a_page_fault_and_another_make_a_double_fault() -> None:
    """The stack is not mapped: #PF, #PF again while pushing, then #DF on its own stack."""
    world = World(64).code("8b0425000020 00".replace(" ", "")).set(rsp=0x400000)
    ended = world.handle(Vector.DF, handler(Vector.DF), count=1).run()
    assert (ended.vector, ended.stack(2, 8), ended.cpu.cr2) == (Vector.DF, [0, CODE], 0x400000 - 8)


def test_a_page_fault_after_a_contributory_one_is_served() -> None:
    """#GP with an unmapped stack: #PF takes its place, on a stack of its own."""
    world = World(64).code("8ed8").set(rax=0x1000, rsp=0x400008)
    ended = world.handle(Vector.PF, handler(Vector.PF), count=1).run()
    assert ended.vector == Vector.PF
    assert ended.stack(6, 8) == [2, CODE, CODE64, 0x10002, 0x400008, DATA32]


def test_triple_fault() -> None:
    world = World().code("0f0b")
    world.special.idt = DescriptorTable(0, 0)
    cpu = world.processor()
    assert cpu.run(10) == Shutdown()
    assert cpu.run(10) == Shutdown()
    assert (cpu.rip, cpu.regs[RSP]) == (CODE, STACK)


def test_an_interrupt_is_no_exception() -> None:
    """A fault in the delivery of vector 13 as an interrupt is served itself."""
    world = World().code(_NOPS).set(rflags=0x202).gate(13, gate(0xE, CODE32, handler(13), p=0))
    cpu = world.processor()
    cpu.pending_interrupt = 13
    cpu.step()
    assert (cpu.rip, _top(cpu, 2)) == (handler(Vector.NP), [13 * 8 + 3, CODE])


def test_tables_in_a_hole_end_in_an_internal_error() -> None:
    world = World().code("0f0b")
    world.special.idt = DescriptorTable(0x200000, 0xFFF)
    cpu = world.processor()
    assert cpu.run(10) == InternalError(3, ())
    assert cpu.rip == CODE


# --- interrupts, NMI, injection -------------------------------------------------------------------------


def test_an_interrupt_waits_for_if_and_the_shadow_of_sti() -> None:
    cpu = World().code("90fb9090").processor()  # nop; sti; nop; nop
    cpu.pending_interrupt = 0x30
    for expected in (CODE + 1, CODE + 2, CODE + 3, handler(0x30)):
        cpu.step()
        assert cpu.rip == expected
    assert _top(cpu, 3) == [CODE + 3, CODE32, 0x202]
    assert cpu.pending_interrupt is None


def test_nmi_is_masked_until_iret() -> None:
    cpu = World().code(_NOPS).put(handler(2), "90cf").processor()  # nop; iret
    cpu.pending_nmi = True
    cpu.step()
    assert (cpu.rip, cpu.nmi_masked) == (handler(2), True)
    cpu.pending_nmi = True
    cpu.step()
    assert cpu.rip == handler(2) + 1
    cpu.step()
    assert (cpu.rip, cpu.nmi_masked) == (CODE, False)
    cpu.step()
    assert cpu.rip == handler(2)


def test_nmi_comes_before_interrupts() -> None:
    cpu = World().code(_NOPS).set(rflags=0x202).processor()
    cpu.pending_nmi, cpu.pending_interrupt = True, 0x30
    cpu.step()
    assert (cpu.rip, cpu.pending_interrupt) == (handler(2), 0x30)


def test_a_halted_processor_wakes() -> None:
    cpu = World().code("fbf4").processor()  # sti; hlt
    assert cpu.run(10) == Halted()
    cpu.pending_interrupt = 0x30
    cpu.step()
    assert (cpu.rip, _top(cpu, 1)) == (handler(0x30), [CODE + 2])


@pytest.mark.parametrize(
    ("count", "rcx", "rip", "rf"), [(2000, 976, CODE, Rflags.RF), (1000, 0, CODE + 2, 0)]
)
def test_an_interrupt_amid_a_repetition_pushes_rf(count: int, rcx: int, rip: int, rf: int) -> None:
    """SDM vol. 3, 18.3.1.1: after any iteration but the last."""
    cpu = World().code("f3aa" + _NOPS).set(rflags=0x202, rcx=count, rdi=FREE).processor()
    cpu.step()
    cpu.pending_interrupt = 0x30
    cpu.step()
    assert (cpu.regs[RCX], _top(cpu, 3)) == (rcx, [rip, CODE32, 0x202 | rf])


def test_a_single_step_trap_amid_a_repetition_pushes_rf() -> None:
    cpu = World().code("f3aa" + _NOPS).set(rflags=0x102, rcx=2, rdi=FREE).processor()
    for rip, rf in ((CODE, Rflags.RF), (CODE + 2, 0)):
        cpu.step()
        cpu.step()
        assert _top(cpu, 3) == [rip, CODE32, 0x102 | rf]
        cpu.rip, cpu.rflags = rip, 0x102


def test_a_software_interrupt_pushes_rf_clear() -> None:
    """RF is cleared when the instruction begins (SDM vol. 3, 18.3.1.1)."""
    assert World().code("cd21").set(rflags=0x10002).run().stack(3, 4) == [CODE + 2, CODE32, 2]


def test_injected_exceptions_carry_their_error_code() -> None:
    cpu = World().code(_NOPS).processor()
    cpu.injected_exception = Fault(Vector.GP, 0x1234)
    cpu.step()
    assert (cpu.rip, _top(cpu, 2)) == (handler(13), [0x1234, CODE])


# --- debug exceptions -----------------------------------------------------------------------------------


def test_single_step() -> None:
    """POPF sets TF: the trap follows the next instruction; the handler runs without."""
    ended = WORLDS["single step"]().run()
    assert (ended.vector, ended.stack(3, 4)) == (Vector.DB, [CODE + 7, CODE32, 0x102])
    assert (ended.cpu.dr6, ended.cpu.rflags) == (0xFFFF4FF0, 2)


def test_no_trap_between_mov_ss_and_the_next_instruction() -> None:
    assert WORLDS["single step over mov ss"]().run().stack(1, 4) == [CODE + 14]


def test_no_single_step_into_a_software_interrupt() -> None:
    ended = World().code("cd21").set(rflags=0x102).run()
    assert (ended.vector, ended.stack(3, 4)) == (0x21, [CODE + 2, CODE32, 0x102])


def test_int1_is_a_trap_without_privilege_or_cause() -> None:
    ended = World(cpl=3).code("f1").run()
    assert (ended.vector, ended.stack(2, 4), ended.cpu.dr6) == (
        Vector.DB,
        [CODE + 1, CODE32_USER],
        0xFFFF0FF0,
    )


def test_a_code_breakpoint_is_a_fault_that_rf_holds_off() -> None:
    """The image's RF is as it was: the handler sets it, and IRET loads it for one instruction."""
    # or dword [esp+8], 0x10000; iret
    world = World().code(_NOPS).put(handler(1), "814c240800000100cf")
    cpu = world.processor()
    cpu.dr[0], cpu.dr7 = CODE + 1, 0x401
    cpu.step()
    cpu.step()
    assert (cpu.rip, _top(cpu, 3), cpu.dr6) == (handler(1), [CODE + 1, CODE32, 2], 0xFFFF0FF1)
    cpu.step()
    cpu.step()
    assert (cpu.rip, cpu.rflags) == (CODE + 1, 0x10002)
    cpu.step()
    assert (cpu.rip, cpu.rflags) == (CODE + 2, 2)


def test_a_data_breakpoint_is_a_trap() -> None:
    ended = WORLDS["data breakpoint"]().run()
    assert (ended.vector, ended.stack(1, 4), ended.cpu.dr6) == (Vector.DB, [CODE + 0x15], 0xFFFF0FF1)


def test_general_detect() -> None:
    """DR6.BD; the handler may use the registers: GD is clear."""
    ended = WORLDS["general detect"]().run()
    assert (ended.vector, ended.cpu.dr6, ended.cpu.dr7 & 0x2000) == (Vector.DB, 0xFFFF2FF0, 0)
    assert ended.stack(3, 4) == [CODE + 8, CODE32, 0x10002]


# --- IRET -----------------------------------------------------------------------------------------------


def test_return_to_an_outer_level() -> None:
    ended = WORLDS["return to user"]().run()
    assert ended.stack(5, 4) == [DATA, CODE32_USER, 0x17246, STACK3, DATA_USER]
    assert [ended.cpu.segments[number].selector for number in (DS, ES, FS, GS)] == [0] * 4


RETURNS = {
    "return to user with kernel stack": (Vector.GP, DATA32),
    "return to user with null stack": (Vector.GP, 0),
    "return to user with absent stack": (Vector.SS, FREE),
    "long return not canonical": (Vector.GP, 0),
    "long return to 32 bits with null stack": (Vector.GP, 0),
}


@pytest.mark.parametrize("name", RETURNS)
def test_refused_returns(name: str) -> None:
    ended = WORLDS[name]().run()
    assert (ended.vector, ended.stack(1, 4)[0]) == RETURNS[name]


@pytest.mark.parametrize(
    ("cpl", "iopl", "image", "after"),
    [
        # SDM vol. 2, IRET: IF by IOPL, IOPL by CPL 0
        (0, 0, 0x3FFD7, 0x17FD7),
        (3, 0, 0x3202, 0x10002),
        (3, 3, 0x0202, 0x13202),
    ],
)
def test_which_flags_iret_loads(cpl: int, iopl: int, image: int, after: int) -> None:
    world = World(cpl=cpl).code("cf").put(DATA, "0f0b").set(rflags=iopl << 12 | 2)
    image &= ~(Rflags.TF | Rflags.VM)
    code = CODE32_USER if cpl else CODE32
    assert world.frame(DATA, code, image).run().stack(3, 4)[2] == after & ~Rflags.TF


def test_16_bit_iret_leaves_the_upper_flags() -> None:
    world = World().code("66cf").put(DATA, "0f0b").set(rflags=0x240002)
    assert world.frame(DATA, CODE32, 0xAD7 & ~0x200, size=2).run().stack(3, 4)[2] == 0x2508D7


def test_64_bit_returns() -> None:
    ended = WORLDS["long return to user"]().run()
    assert ended.stack(5, 8) == [DATA, CODE64_USER, 0x10202, STACK3, DATA_USER]
    ended = WORLDS["long return to 32-bit user"]().run()
    assert ended.stack(5, 8) == [DATA + 5, CODE32_USER, 0x10202, STACK3, DATA_USER]
    assert WORLDS["long return"]().run().cpu.segments[SS].selector == 0


def test_nested_task_in_ia_32e_mode() -> None:
    ended = World(64).code("48cf").set(rflags=0x4002).run()
    assert (ended.vector, ended.stack(1, 8)) == (Vector.GP, [0])


def test_fs_base_behind_a_null_selector_survives_a_return() -> None:
    world = WORLDS["long return to user"]()
    world.special.fs = Segment(0x123456, 0, 0, 0, present=0, s=0, unusable=1)
    assert world.run().cpu.segments[FS].base == 0x123456


# --- virtual-8086 mode ----------------------------------------------------------------------------------


def test_into_virtual_8086_mode_and_out() -> None:
    """SDM vol. 3, 21.2.5 and 21.3.1.1: all segments on the inner stack, then null."""
    ended = WORLDS["virtual-8086 invalid opcode"]().run()
    assert ended.vector == Vector.UD
    assert ended.stack(9, 4) == [2, 0x905, 0x30202, 0x100, 0x904, 0x903, 0x902, 0x901, 0x900]
    assert (ended.cpu.regs[RAX], ended.cpu.vm86, ended.cpu.cpl) == (0x902, False, 0)
    assert all(ended.cpu.segments[number].unusable for number in (DS, ES, FS, GS))
    assert ended.cpu.segments[CS].selector == CODE32


def test_virtual_8086_interrupts_need_iopl_3() -> None:
    assert WORLDS["virtual-8086 interrupt"]().run().vector == 0x21
    ended = WORLDS["virtual-8086 interrupt without iopl"]().run()
    assert (ended.vector, ended.stack(2, 4)) == (Vector.GP, [0, 0])


def test_handlers_of_virtual_8086_mode_run_at_cpl_0() -> None:
    world = WORLDS["virtual-8086 invalid opcode"]().handle(6, handler(6), selector=CONFORMING)
    ended = world.run()
    assert (ended.vector, ended.stack(1, 4)) == (Vector.GP, [CONFORMING | 1])


def test_return_within_virtual_8086_mode() -> None:
    """IOPL 3: flags but IOPL, VIP and VIF are loaded."""
    world = WORLDS["virtual-8086 interrupt"]().put(0x9050, "cf").put(0x9140, "00000609d70e")
    ended = world.put(0x9060, "0f0b").run()
    assert ended.stack(4, 4) == [0, 0x906, 0x33ED7, 0x106]


def test_redirected_interrupts() -> None:
    """CR4.VME and a clear bit: the 8086 program's own handler, VIF in place of IF (SDM vol. 3, 21.3.3.2)."""
    world = WORLDS["virtual-8086 interrupt without iopl"]().put(0x21 * 4, "00000709").put(0x9070, "0f0b")
    world.special.cr4 |= Cr4.VME
    world.put(TSS + 0x66, (0x88).to_bytes(2, "little"))
    ended = world.run()
    assert (ended.vector, ended.stack(2, 4)) == (Vector.UD, [0, 0x907])
    stack = 0x9040 + 0x100 - 6
    assert [ended.at(stack + at, 2) for at in (0, 2, 4)] == [2, 0x905, 0x3002]
    ended = world.put(TSS + 0x68 + 4, b"\x02").run()
    assert (ended.vector, ended.stack(1, 4)) == (Vector.GP, [0])
