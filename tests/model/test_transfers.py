"""Far JMP, CALL and RET and call gates; expected values from SDM vol. 2 and vol. 3, 5.8."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from pykvm.model.cpu.instruction import CS, DS, ES, RBX, RCX, RSP, SS
from pykvm.x86.exceptions import Vector
from tests.model.flow import (
    CODE16,
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
    STACK_TSS,
    TSS,
    TSS_SELECTOR,
    World,
    amd_cpuid,
    descriptor,
    gate,
    handler,
)
from tests.model.flow_cases import WORLDS

REFUSED = {
    # world: vector and error code
    "far jump to data": (Vector.GP, 0x10),
    "far jump to null": (Vector.GP, 0),
    "far jump to absent code": (Vector.NP, 0x80),
    "far jump beyond the limit": (Vector.GP, 0),
    "far jump to user code": (Vector.GP, 0x30),
    "far return to null": (Vector.GP, 0),
    "far return to data": (Vector.GP, 0x10),
    "far return to absent code": (Vector.NP, 0x80),
    "far return beyond the limit": (Vector.GP, 0),
    "jump through a call gate to inner code": (Vector.GP, 0x08),
    "call gate without privilege": (Vector.GP, 0x80),
    "absent call gate": (Vector.NP, 0x80),
    "call gate to null": (Vector.GP, 0),
    "call gate to data": (Vector.GP, 0x10),
    "call gate beyond the limit": (Vector.GP, 0),
    "long far jump to wide and long": (Vector.GP, 0x80),
    "long call gate to 32-bit code": (Vector.GP, 0x08),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reached(name: str) -> None:
    ended = WORLDS[name]().run()
    assert (ended.vector, ended.stack(1, 4)[0]) == REFUSED[name]


def test_a_jump_keeps_the_cpl_in_the_selector() -> None:
    """A conforming segment reached with RPL 3 at CPL 0 has RPL 0."""
    ended = WORLDS["far jump to conforming code"]().run()
    assert (ended.cpu.segments[CS].selector, ended.cpu.rip) == (CONFORMING, DATA + 1)


def test_a_jump_to_an_inner_rpl_needs_the_same_dpl() -> None:
    """RPL 3 above CPL 0 in a nonconforming segment."""
    ended = WORLDS["far jump to inner rpl"]().run()
    assert (ended.vector, ended.stack(1, 4)) == (Vector.GP, [CODE32])


def test_16_bit_code() -> None:
    ended = WORLDS["far jump to 16 bits"]().run()
    assert (ended.cpu.segments[CS].selector, ended.cpu.bits) == (CODE16, 16)
    assert ended.cpu.regs[0] == 0x12345678


def test_call_and_return() -> None:
    cpu = WORLDS["far call and return"]().run().cpu
    assert (cpu.regs[0], cpu.regs[RCX], cpu.regs[RBX], cpu.regs[RSP]) == (0x8007, CODE32, 1, STACK)


def test_return_releases_parameters() -> None:
    assert WORLDS["far call and release"]().run().cpu.regs[RSP] == STACK


def test_16_bit_frames() -> None:
    world = World().code("669a00900800").put(DATA, "f4")  # call far 8:9000 of 16 bits
    assert world.run().stack(2, 2) == [0x8006, CODE32]


def test_return_to_an_outer_level() -> None:
    """Parameters go on both stacks; what the outer level may not use becomes null."""
    ended = WORLDS["far return to user"]().run()
    # ud2 at CPL 3 came back through the TSS: its frame shows where the return went
    assert ended.vector == Vector.UD
    assert ended.stack(5, 4)[0:2] == [DATA, CODE32_USER]
    assert ended.stack(5, 4)[3:] == [STACK3 + 8, DATA_USER]
    assert [ended.cpu.segments[number].selector for number in (DS, ES)] == [0, 0]


def test_a_call_gate_switches_stacks_and_copies_parameters() -> None:
    ended = WORLDS["call gate"]().run()
    assert ended.stack(6, 4) == [0x800B, CODE32_USER, 2, 1, STACK3 - 8, DATA_USER]
    cpu = ended.cpu
    assert (cpu.regs[RSP], cpu.cpl, cpu.segments[SS].selector) == (STACK_TSS - 24, 0, DATA32)
    assert cpu.segments[CS].selector == CODE32


def test_a_16_bit_call_gate_pushes_words() -> None:
    ended = WORLDS["call gate of 16 bits"]().run()
    assert ended.stack(8, 2) == [0x800B, CODE32_USER, 2, 0, 1, 0, STACK3 - 8, DATA_USER]


def test_through_a_call_gate_and_back() -> None:
    ended = WORLDS["call gate and return"]().run()
    assert ended.vector == Vector.UD
    assert ended.stack(5, 4) == [0x800B, CODE32_USER, 0x10002, STACK3, DATA_USER]


def test_a_call_gate_at_the_same_level_copies_nothing() -> None:
    ended = WORLDS["call gate at the same level"]().run()
    assert (ended.stack(2, 4), ended.cpu.regs[RSP]) == ([0x8007, CODE32], STACK - 8)


def test_a_call_gate_to_conforming_code_stays_at_cpl_3() -> None:
    ended = WORLDS["call gate to conforming code"]().run()
    assert ended.stack(2, 4) == [DATA, CONFORMING | 3]


def test_a_long_call_gate_loads_a_null_stack_selector() -> None:
    ended = WORLDS["long call gate"]().run()
    assert ended.stack(4, 8) == [0x8007, CODE64_USER, STACK3, DATA_USER]
    assert (ended.cpu.segments[SS].selector, ended.cpu.regs[RSP]) == (0, STACK_TSS - 32)


def test_through_a_long_call_gate_and_back() -> None:
    ended = WORLDS["long call gate and return"]().run()
    assert ended.vector == Vector.UD
    assert ended.stack(5, 8) == [0x8007, CODE64_USER, 0x10002, STACK3, DATA_USER]


@pytest.mark.parametrize(
    ("selector", "offset", "vector", "error"),
    [
        (0, STACK_TSS, Vector.TS, 0),
        (DATA32 | 3, STACK_TSS, Vector.TS, DATA32),
        (0x1008, STACK_TSS, Vector.TS, 0x1008),
        (CODE32, STACK_TSS, Vector.TS, CODE32),
        (DATA_USER & ~3, STACK_TSS, Vector.TS, DATA_USER & ~3),
        (FREE + 8, STACK_TSS, Vector.SS, FREE + 8),
        (FREE + 16, 8, Vector.SS, FREE + 16),
    ],
    ids=["null", "rpl 3", "beyond the gdt", "code", "dpl 3", "absent", "no room"],
)
def test_a_bad_inner_stack(selector: int, offset: int, vector: int, error: int) -> None:
    """SDM vol. 2, CALL, MORE-PRIVILEGE.  The handler is conforming code, so it needs no inner stack."""
    world = WORLDS["call gate"]().define(FREE + 8, descriptor(3, p=0)).define(FREE + 16, descriptor(3))
    world.put(TSS + 4, struct.pack("<II", offset, selector))
    world.handle(vector, handler(vector), selector=CONFORMING)
    if offset == 8:
        world.define(FREE + 16, descriptor(7, limit=0xFFF, flags=4))  # expand-down: from 0x1000 on
    cpu = world.processor()
    cpu.run(3)
    assert (cpu.rip, cpu.cpl, cpu.segments[SS].selector) == (handler(vector), 3, DATA_USER)
    assert cpu.load(SS, cpu.regs[RSP], 4) == error


def test_a_tss_too_small_for_its_stack() -> None:
    world = WORLDS["call gate"]().handle(Vector.TS, handler(Vector.TS), selector=CONFORMING)
    world.special.tr = replace(world.special.tr, limit=8)
    cpu = world.processor()
    cpu.run(3)
    assert cpu.rip == handler(Vector.TS)
    assert cpu.load(SS, cpu.regs[RSP], 4) == TSS_SELECTOR


def test_far_transfers_between_64_and_32_bits() -> None:
    ended = WORLDS["long far jump to 32 bits"]().run()
    assert (ended.cpu.bits, ended.cpu.segments[CS].selector, ended.cpu.regs[0]) == (32, CODE32, 0x12345678)
    ended = WORLDS["long far jump back"]().run()
    assert (ended.cpu.bits, ended.cpu.segments[CS].selector) == (64, CODE64)
    assert ended.cpu.regs[0] == 0xFFFFFFFFFFFFFFFF


def test_ia_32e_mode_has_no_task_gates_and_16_bit_call_gates() -> None:
    for data in (gate(5, 0x70, 0), gate(4, CODE64, DATA), descriptor(9, s=0), descriptor(2, s=0)):
        world = World(64).code("ff2c2520900000").put(DATA + 32, "000000008000").define(FREE, data)
        ended = world.run()
        assert (ended.vector, ended.stack(1, 8)) == (Vector.GP, [FREE])


def test_amd_has_no_64_bit_far_pointers() -> None:
    """REX.W asks for 8 bytes of offset (SDM vol. 2, JMP, m16:64); AMD's ignore it (APM vol. 3, JMP)."""
    world = World(64).code("48ff2c2520900000")  # jmp far [0x9020] with REX.W
    world.put(DATA + 32, "00a10000180000000800").put(0xA100, "f4")
    assert world.run().vector == Vector.GP  # 0x1800000a100 is not mapped, and CS is 8
    ended = world.run(cpuid=amd_cpuid())
    assert (ended.cpu.segments[CS].selector, ended.cpu.rip) == (CODE64, 0xA101)


def test_real_mode_far_transfers() -> None:
    ended = WORLDS["real far call and return"]().run()
    assert (ended.cpu.segments[CS].base, ended.cpu.regs[RBX], ended.cpu.regs[RSP]) == (0, 1, STACK)
    ended = WORLDS["real far jump"]().run()
    assert (ended.cpu.segments[CS].base, ended.cpu.rip) == (0x1000, 0x8001)
    assert WORLDS["real far jump beyond the limit"]().run().vector == Vector.GP


def test_protected_mode_from_real_mode() -> None:
    cpu = WORLDS["to protected mode"]().run().cpu
    assert (cpu.bits, cpu.segments[DS].selector, cpu.segments[SS].limit) == (32, DATA32, 0xFFFFFFFF)
