"""Segment loads, LDTR and TR, and questions about selectors; expected values from SDM vol. 2 and 3."""

from __future__ import annotations

import struct

import pytest

from pykvm.model.cpu.instruction import DS, ES, FS, GS, RAX, RBX, RCX, RDX, RSP, SS
from pykvm.x86.exceptions import Vector
from pykvm.x86.registers import DescriptorTable, Segment
from tests.model.flow import (
    CODE16,
    CODE32,
    CODE32_USER,
    CONFORMING,
    DATA,
    DATA32,
    FREE,
    GDT,
    LDT,
    LDT_SELECTOR,
    STACK,
    TSS2_SELECTOR,
    TSS_SELECTOR,
    World,
    descriptor,
    gate,
)
from tests.model.flow_cases import WORLDS

REFUSED = {
    # world: vector and error code (SDM vol. 2, MOV, LLDT, LTR; vol. 3, 6.13)
    "access through null": (Vector.GP, 0),
    "null ss": (Vector.GP, 0),
    "system segment in ds": (Vector.GP, 0x50),
    "execute-only code in ds": (Vector.GP, 0x80),
    "absent data in ds": (Vector.NP, 0x80),
    "absent stack": (Vector.SS, 0x80),
    "read-only stack": (Vector.GP, 0x80),
    "stack with another rpl": (Vector.GP, 0x10),
    "stack with another dpl": (Vector.GP, 0x38),
    "beyond the gdt": (Vector.GP, 0x1000),
    "rpl above dpl": (Vector.GP, 0x10),
    "beyond the ldt": (Vector.GP, 0x84),
    "mov to cs": (Vector.UD, None),
    "reserved segment register": (Vector.UD, None),
    "pop null ss": (Vector.GP, 0),
    "absent far pointer": (Vector.NP, 0x80),
    "write to read-only": (Vector.GP, 0),
    "beyond the limit": (Vector.GP, 0),
    "busy tss in ltr": (Vector.GP, 0x50),
    "null in ltr": (Vector.GP, 0),
    "tss in lldt": (Vector.GP, 0x70),
    "absent ldt": (Vector.NP, 0x80),
    "absent tss": (Vector.NP, 0x80),
    "local tss": (Vector.GP, 0x84),
    "user load of kernel data": (Vector.GP, 0x10),
    "long null ss with rpl": (Vector.GP, 0),
    "long user null ss": (Vector.GP, 0),
    "long user load of kernel data": (Vector.GP, 0x10),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_not_be_loaded(name: str) -> None:
    vector, error = REFUSED[name]
    ended = WORLDS[name]().run()
    assert ended.vector == vector
    if error is not None:
        assert ended.stack(1, 4) == [error]


def test_a_load_takes_the_whole_descriptor() -> None:
    world = World().code("8ed8f4").set(rax=FREE | 3)  # mov ds, ax; hlt
    world.define(FREE, descriptor(3, base=0x89ABCDEF, limit=0x54321, dpl=3, flags=0xD))
    loaded = world.run().cpu.segments[DS]
    assert loaded == Segment(0x89ABCDEF, 0x54321FFF, FREE | 3, 3, 1, 3, 1, 1, 0, 1, 1, 0)


def test_a_table_wraps_at_the_end_of_32_bits() -> None:
    world = World().code("8ed8f4").set(rax=0xF000).put(0x7000, descriptor(2, base=0x12345))
    world.special.gdt = DescriptorTable(0xFFFF8000, 0xFFFF)
    ended = world.run()
    assert (ended.cpu.segments[DS].base, ended.memory[0x7005]) == (0x12345, 0x93)


def test_the_accessed_bit_is_written_only_where_it_is_clear() -> None:
    world = World().code("8ed88ec3f4").set(rax=FREE, rbx=FREE + 8)  # mov ds, ax; mov es, bx; hlt
    world.define(FREE, descriptor(2)).define(FREE + 8, descriptor(3))
    cpu = world.processor()
    cpu.run(2)
    assert cpu.bus.bytes[GDT + FREE + 5] == 0x93  # type: ignore[attr-defined]
    assert cpu.segments[DS].type == 3
    assert cpu.bus.dirty == {GDT >> 12}  # type: ignore[attr-defined]
    cpu.bus.dirty.clear()  # type: ignore[attr-defined]
    cpu.run(1)
    assert not cpu.bus.dirty  # type: ignore[attr-defined]


def test_a_refused_load_changes_nothing() -> None:
    world = World().code("8ed8").set(rax=FREE).define(FREE, descriptor(2, p=0))
    ended = world.run()
    assert ended.cpu.segments[DS].selector == DATA32
    assert ended.memory[GDT + FREE + 5] == 0x12


def test_null_is_loaded_and_not_used() -> None:
    ended = WORLDS["null data segments"]().run()
    assert [ended.cpu.segments[number].selector for number in (DS, ES, FS, GS)] == [0, 3, 3, 3]
    assert all(ended.cpu.segments[number].unusable for number in (DS, ES, FS, GS))


def test_null_ss_is_for_64_bit_code_below_cpl_3() -> None:
    ended = WORLDS["long null segments"]().run()
    assert ended.vector is None
    assert (ended.cpu.segments[SS].selector, ended.cpu.cpl, ended.cpu.regs[RSP]) == (0, 0, STACK - 8)
    ended = World(64, cpl=3).code("8ed0").set(rax=3).run()
    assert (ended.vector, ended.stack(1, 8)) == (Vector.GP, [0])


def test_conforming_code_is_readable_from_everywhere() -> None:
    ended = World(cpl=3).code("8ed80f0b").set(rax=CONFORMING).run()  # mov ds, ax; ud2
    assert ended.vector == Vector.UD
    assert ended.cpu.segments[DS].selector == CONFORMING


def test_expand_down_segments_end_below() -> None:
    """Offsets above the limit are inside: 0x9000 with a limit of 0x8fff, but not 0x8fff."""
    ended = WORLDS["expand-down segment"]().run()
    assert ended.cpu.regs[RAX] == 0x44332211
    assert ended.vector == Vector.GP


def test_real_mode_keeps_the_limit() -> None:
    ended = WORLDS["unreal mode"]().run()
    assert ended.cpu.regs[RAX] == ended.at(0x20100, 4) == 0x11223344
    assert ended.cpu.regs[RCX] == ended.at(0x20200, 4)
    assert ended.cpu.segments[ES].limit == 0xFFFFFFFF
    assert (ended.cpu.segments[ES].base, ended.cpu.segments[ES].selector) == (0x100, 0x10)


def test_real_mode_makes_a_null_segment_usable() -> None:
    # mov cr0, eax; mov ds, di; mov cr0, ecx; mov ds, bx; mov dl, [0xffff]; hlt
    world = World(16).code("0f22c0 8edf 0f22c1 8edb 8a16ffff f4").set(rax=0x11, rcx=0x10, rbx=0x900)
    ended = world.put(0x18FFF, "5a").run()
    assert (ended.cpu.regs[RDX], ended.cpu.segments[DS].limit) == (0x5A, 0xFFFF)


def test_mov_ss_holds_off_interrupts_for_one_instruction() -> None:
    world = World().code("8ed09090f4").set(rax=DATA32, rflags=0x202)  # mov ss, ax; nop; nop; hlt
    cpu = world.processor()
    cpu.step()
    cpu.pending_interrupt = 0x21
    cpu.step()
    assert cpu.rip == 0x8003
    cpu.step()
    assert cpu.rip == 0xA210


def test_a_push_of_32_bits_writes_16() -> None:
    ended = World().code("1ef4").frame(0xAAAAAAAA).set(rsp=STACK).run()  # push ds; hlt
    assert ended.stack(1, 4) == [0xAAAA0000 | DATA32]


def test_far_pointers() -> None:
    ended = WORLDS["far pointers"]().run()
    assert (ended.cpu.regs[RAX], ended.cpu.segments[ES].selector) == (0x7000, DATA32)
    assert (ended.cpu.regs[RSP], ended.cpu.segments[SS].selector) == (0x7000, DATA32)
    assert (ended.cpu.regs[RCX], ended.cpu.segments[FS].selector) == (DATA32, 0x3B)


def test_a_far_pointer_ends_within_its_segment() -> None:
    """Its selector would lie at 0x10000: the operand is one, and does not wrap (SDM vol. 3, 5.3)."""
    ended = World(16).code("66c41efcff f4").put(0xFFFC, "00000000").run()  # les ebx, [0xfffc]
    assert ended.vector == Vector.GP


def test_ltr_marks_the_tss_busy() -> None:
    ended = WORLDS["ldtr and tr"]().run()
    assert (ended.cpu.regs[RBX], ended.cpu.regs[RCX], ended.cpu.regs[RDX]) == (0, LDT_SELECTOR, TSS2_SELECTOR)
    assert ended.memory[GDT + TSS2_SELECTOR + 5] == 0x8B
    assert (ended.cpu.tr.type, ended.cpu.ldt.base) == (0xB, LDT)


def test_ia_32e_system_descriptors_have_64_bit_bases() -> None:
    ended = WORLDS["long ltr and lldt"]().run()
    assert ended.cpu.ldt.base == 0xFFFF800000000000 | LDT
    bad = World(64).code("0f00d0").set(rax=FREE)  # lldt ax
    bad.define(FREE, descriptor(2, s=0) + struct.pack("<II", 0x8000, 0))
    ended = bad.run()
    assert (ended.vector, ended.stack(1, 8)) == (Vector.GP, [FREE])
    bad.define(FREE, descriptor(2, s=0) + struct.pack("<II", 0, 0x100))  # a type in the upper half
    ended = bad.run()
    assert (ended.vector, ended.stack(1, 8)) == (Vector.GP, [FREE])


@pytest.mark.parametrize(
    "code", ["0f00c0", "0f00c8", "0f00d0", "0f00d8", "0f00e0", "0f02c1", "0f03c1", "63c1"]
)
def test_unknown_in_real_mode(code: str) -> None:
    assert World(16).code(code).run().vector == Vector.UD


@pytest.mark.parametrize("code", ["0f00d0", "0f00d8"])
def test_only_cpl_0_loads_ldtr_and_tr(code: str) -> None:
    ended = World(cpl=3).code(code).set(rax=LDT_SELECTOR).run()
    assert (ended.vector, ended.stack(1, 4)) == (Vector.GP, [0])


# --- LAR, LSL, VERR, VERW, ARPL -------------------------------------------------------------------------

_QUESTIONS = "0f02d8 0f94c2 0f03c8 0f94c6 f4"  # lar ebx, ax; setz dl; lsl ecx, ax; setz dh; hlt
_EXTRA = {
    FREE: descriptor(3, limit=0x12345, flags=0x4),
    FREE + 8: gate(0xC, CODE32, DATA),
    FREE + 16: gate(5, TSS_SELECTOR, 0),
    FREE + 24: gate(0xE, CODE32, DATA),
    FREE + 32: descriptor(2, p=0),
}


@pytest.mark.parametrize(
    ("selector", "rights", "limit"),
    [
        (DATA32, 0xCF9300, 0xFFFFFFFF),
        (FREE, 0x419300, 0x12345),
        (CODE16, 0x009B00, 0xFFFF),
        (TSS_SELECTOR, 0x008B00, 0x2067),
        (LDT_SELECTOR, 0x008200, 0x7F),
        (FREE + 8, 0x008C00, None),
        (FREE + 16, 0x008500, None),
        (FREE + 24, None, None),
        (FREE + 32, 0xCF1200, 0xFFFFFFFF),
        (0, None, None),
        (3, None, None),
        (0x1000, None, None),
        (DATA32 | 1, None, None),
        (CONFORMING | 3, 0xCF9F00, 0xFFFFFFFF),
    ],
)
def test_lar_and_lsl(selector: int, rights: int | None, limit: int | None) -> None:
    """SDM vol. 2, LAR and LSL: what is visible, of which type."""
    world = World().code(_QUESTIONS).set(rax=selector, rbx=0x55, rcx=0x66)
    for number, data in _EXTRA.items():
        world.define(number, data)
    cpu = world.run().cpu
    assert cpu.regs[RBX] == (0x55 if rights is None else rights)
    assert cpu.regs[RCX] == (0x66 if limit is None else limit)
    assert cpu.regs[RDX] == (rights is not None) | (limit is not None) << 8


def test_ia_32e_mode_hides_16_bit_system_types_and_task_gates() -> None:
    for data in (descriptor(1, s=0), gate(5, TSS_SELECTOR, 0), gate(4, CODE32, DATA)):
        world = World(64).code(_QUESTIONS).set(rax=FREE, rbx=0x55).define(FREE, data)
        assert (world.run().cpu.regs[RBX], world.run().cpu.regs[RDX]) == (0x55, 0)


@pytest.mark.parametrize(
    ("selector", "readable", "writable"),
    [
        (DATA32, 1, 1),
        (CODE32, 1, 0),
        (FREE, 1, 0),
        (FREE + 8, 0, 0),
        (TSS_SELECTOR, 0, 0),
        (0, 0, 0),
        (DATA32 | 3, 0, 0),
        (CONFORMING | 3, 1, 0),
        (CODE32_USER, 1, 0),
    ],
)
def test_verr_and_verw(selector: int, readable: int, writable: int) -> None:
    # verr ax; setz dl; verw ax; setz dh; hlt
    world = World().code("0f00e0 0f94c2 0f00e8 0f94c6 f4").set(rax=selector)
    world.define(FREE, descriptor(1)).define(FREE + 8, descriptor(9))
    assert world.run().cpu.regs[RDX] == readable | writable << 8


@pytest.mark.parametrize(
    ("target", "source", "result", "zf"), [(0x10, 3, 0x13, 1), (0x13, 3, 0x13, 0), (0x13, 0x21, 0x13, 0)]
)
def test_arpl(target: int, source: int, result: int, zf: int) -> None:
    cpu = World().code("63c8 0f94c2 f4").set(rax=target, rcx=source).run().cpu  # arpl ax, cx; setz dl; hlt
    assert (cpu.regs[RAX], cpu.regs[RDX]) == (result, zf)
