"""Hardware task switches; expected values from SDM vol. 3, chapter 7."""

from __future__ import annotations

import struct

import pytest

from pykvm.model.cpu.instruction import CS, DS, ES, FS, GS, RAX, RBX, RDI, RSP, SS
from pykvm.x86.bits import Cr0, Rflags
from pykvm.x86.exceptions import Vector
from tests.model.flow import (
    CODE,
    CODE32,
    CONFORMING,
    DATA,
    DATA32,
    DATA_USER,
    FREE,
    GDT,
    LDT_SELECTOR,
    STACK,
    STACK_TSS,
    TSS,
    TSS2,
    TSS2_SELECTOR,
    TSS_SELECTOR,
    World,
    descriptor,
    gate,
    handler,
)
from tests.model.flow_cases import WORLDS


def _type(world_memory: bytearray, selector: int) -> int:
    return world_memory[GDT + selector + 5] & 0xF


def test_a_jump_saves_the_old_task_and_loads_the_new() -> None:
    world = WORLDS["jump to a tss"]().set(rax=0x1111, rdi=0x7777, rflags=0xAD7 & ~Rflags.TF)
    ended = world.run()
    cpu = ended.cpu
    # figure 7-2: EIP, EFLAGS, EAX to EDI, ES to GS
    saved = struct.unpack_from("<16I", ended.memory, TSS + 0x20)
    assert saved[:2] == (CODE + 7, 0xAD7 & ~Rflags.TF)
    assert (saved[2], saved[6], saved[9]) == (0x1111, STACK, 0x7777)
    assert saved[10:] == (DATA32, CODE32, DATA32, DATA32, DATA32, DATA32)
    assert (cpu.rip, cpu.rflags) == (DATA + 1, 2)
    assert (cpu.regs[RAX], cpu.regs[RSP], cpu.regs[RDI]) == (0x11, STACK_TSS, 0x88)
    assert cpu.segments[FS].unusable
    assert cpu.tr.selector == TSS2_SELECTOR
    assert cpu.cr0 & Cr0.TS


def test_reserved_flags_in_a_tss_are_ignored() -> None:
    world = WORLDS["jump to a tss"]().put(
        TSS2 + 0x24, struct.pack("<I", 0xFFFFFFFF & ~Rflags.VM & ~Rflags.TF)
    )
    assert world.run().cpu.rflags == 0x3F7FD7 & ~Rflags.VM & ~Rflags.TF & ~Rflags.RF  # RF: HLT cleared it


def test_busy_bits_and_links() -> None:
    """Table 7-2: JMP frees the old task, CALL keeps it busy and leaves NT and a link."""
    memory = WORLDS["jump to a tss"]().run().memory
    assert (_type(memory, TSS_SELECTOR), _type(memory, TSS2_SELECTOR)) == (9, 0xB)
    ended = WORLDS["call a tss"]().run()
    assert (_type(ended.memory, TSS_SELECTOR), _type(ended.memory, TSS2_SELECTOR)) == (0xB, 0xB)
    assert (ended.at(TSS2, 2), ended.cpu.rflags) == (TSS_SELECTOR, 0x4002)
    ended = WORLDS["call a tss and return"]().run()
    assert (_type(ended.memory, TSS_SELECTOR), _type(ended.memory, TSS2_SELECTOR)) == (0xB, 9)


def test_return_from_a_nested_task() -> None:
    ended = WORLDS["call a tss and return"]().run()
    cpu = ended.cpu
    assert (cpu.regs[RAX], cpu.regs[RBX], cpu.tr.selector) == (0x12345678, 7, TSS_SELECTOR)
    assert not cpu.rflags & Rflags.NT
    assert not ended.at(TSS2 + 0x24, 4) & Rflags.NT  # the image of the task that returned


def test_task_gates() -> None:
    ended = WORLDS["jump through a task gate"]().run()
    assert (ended.cpu.tr.selector, ended.cpu.rip) == (TSS2_SELECTOR, DATA + 1)
    world = World(cpl=3).code("9a000000008000").task().define(FREE, gate(5, TSS2_SELECTOR, 0))
    ended = world.run()
    assert (ended.vector, ended.stack(1, 4)) == (Vector.GP, [FREE])


def test_a_task_gate_for_an_exception() -> None:
    """The fault's address is saved with RF, the error code goes to the new task's stack."""
    ended = WORLDS["task gate with an error code"]().run()
    assert (ended.cpu.rip, ended.cpu.regs[RSP], ended.stack(1, 4)) == (DATA + 1, STACK_TSS - 4, [0x1000])
    assert struct.unpack_from("<2I", ended.memory, TSS + 0x20) == (CODE + 5, 0x10002)
    assert ended.cpu.rflags == 0x4002


def test_a_16_bit_task() -> None:
    ended = WORLDS["call a 16-bit tss"]().run()
    cpu = ended.cpu
    assert (cpu.rip, cpu.regs[RAX], cpu.regs[RSP]) == (DATA + 1, 0xFFFF0011, 0xFFFF0000 | STACK_TSS)
    assert [cpu.segments[number].selector for number in (ES, CS, SS, DS, FS, GS)] == [
        DATA32, CODE32, DATA32, DATA32, 0, 0,
    ]  # fmt: skip


REFUSED = {
    # world: vector and error code, in the old task
    "jump to the running tss": (Vector.GP, TSS_SELECTOR),
    "jump to an absent tss": (Vector.NP, FREE),
    "jump to a short tss": (Vector.TS, FREE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_task_to_go_to(name: str) -> None:
    ended = WORLDS[name]().run()
    assert (ended.vector, ended.stack(2, 4)) == (REFUSED[name][0], [REFUSED[name][1], CODE])
    assert ended.cpu.tr.selector == TSS_SELECTOR
    assert ended.at(TSS + 0x20, 4) == 0


BROKEN = {
    # selectors of the new task: vector and error code (table 7-1)
    "null stack": ({"ss": 0}, Vector.TS, 0),
    "stack with rpl 3": ({"ss": DATA32 | 3}, Vector.TS, DATA32),
    "absent stack": ({"ss": FREE}, Vector.SS, FREE),
    "null code": ({"cs": 0}, Vector.TS, 0),
    "data as code": ({"cs": DATA32}, Vector.TS, DATA32),
    "absent code": ({"cs": FREE + 8}, Vector.NP, FREE + 8),
    "system segment in ds": ({"ds": TSS_SELECTOR}, Vector.TS, TSS_SELECTOR),
    "absent es": ({"es": FREE}, Vector.NP, FREE),
    "beyond the gdt": ({"fs": 0x1000}, Vector.TS, 0x1000),
    "data as ldt": ({"ldt": DATA32}, Vector.TS, DATA32),
}


@pytest.mark.parametrize("name", BROKEN)
def test_faults_of_the_new_task(name: str) -> None:
    """They come in its context: TR is the new one, EIP its first instruction.  A task gate serves them."""
    selectors, vector, error = BROKEN[name]
    world = World().code("ea000000007000").task("f4", **selectors)
    world.define(FREE, descriptor(3, p=0)).define(FREE + 8, descriptor(0xB, p=0))
    third = 0x26000
    values = (0, handler(vector), 2, *(0,) * 4, STACK, *(0,) * 3, DATA32, CODE32, DATA32, DATA32, 0, 0, 0)
    world.put(third, struct.pack("<28x18I", *values))
    world.define(FREE + 16, descriptor(9, base=third, limit=0x67, s=0, flags=0))
    world.gate(vector, gate(5, FREE + 16, 0))
    ended = world.run()
    assert (ended.vector, ended.stack(1, 4)) == (vector, [error])
    assert ended.at(third, 2) == TSS2_SELECTOR
    assert ended.at(TSS2 + 0x20, 4) == DATA
    assert (_type(ended.memory, TSS_SELECTOR), _type(ended.memory, TSS2_SELECTOR)) == (9, 0xB)


def test_a_task_with_an_ldt() -> None:
    ended = WORLDS["task with an ldt"]().run()
    assert (ended.cpu.ldt.selector, ended.cpu.ldt.limit) == (LDT_SELECTOR, 0x7F)


def test_the_t_bit_traps_before_the_first_instruction() -> None:
    ended = WORLDS["task trap"]().run()
    assert (ended.vector, ended.stack(1, 4), ended.cpu.dr6) == (Vector.DB, [DATA], 0xFFFF8FF0)


def test_local_breakpoints_end_with_their_task() -> None:
    cpu = WORLDS["jump to a tss"]().processor()
    cpu.dr7 = 0x4FF
    cpu.run(2)
    assert cpu.dr7 == 0x4AA


def test_a_virtual_8086_task() -> None:
    world = World().code("ea000000007000").task(cs=0x900, ss=0x910, ds=0x920).put(TSS2 + 0x24, "02000200")
    world.put(TSS2 + 0x20, bytes(4)).put(0x9000, "0f0b").put(TSS2 + 4, struct.pack("<II", STACK, DATA32))
    ended = world.run()
    assert ended.vector == Vector.UD
    assert ended.stack(9, 4) == [0, 0x900, 0x30002, STACK_TSS, 0x910, DATA32, 0x920, 0, 0]


def test_return_without_a_task() -> None:
    """The link of a TSS that nobody called is null."""
    ended = WORLDS["return without a nested task"]().run()
    assert (ended.vector, ended.stack(1, 4)) == (Vector.TS, [0])


def test_conforming_code_in_a_task() -> None:
    """Code of DPL 0 at CPL 3, with data and stack of DPL 3."""
    user = {"ss": DATA_USER, "ds": DATA_USER, "es": DATA_USER}
    world = World().code("ea000000007000").task("0f0b", cs=CONFORMING | 3, **user)
    ended = world.put(TSS2 + 4, struct.pack("<II", STACK, DATA32)).run()
    assert (ended.vector, ended.stack(2, 4)) == (Vector.UD, [DATA, CONFORMING | 3])
