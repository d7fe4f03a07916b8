"""SYSCALL, SYSRET, SYSENTER and SYSEXIT; expected values from SDM vol. 2 and APM vol. 3."""

from __future__ import annotations

import pytest

from pykvm.model.cpu import msrs
from pykvm.model.cpu.instruction import CS, R11, RCX, RDX, RSP, SS
from pykvm.model.cpu.processor import Processor
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.exceptions import Vector
from pykvm.x86.registers import Segment
from tests.model.flow import CODE, CODE32, CODE64, DATA, STACK, World, amd_cpuid, handler

_FLAT_CODE64 = Segment(0, 0xFFFFFFFF, CODE64, 0xB, 1, 0, 0, 1, 1, 1)
_USER_BASE = 0x30
"""SYSRET: 32-bit code here, data 8 above, 64-bit code 16 above."""


def _processor(world: World, *, amd: bool = False) -> Processor:
    cpuid: tuple[CpuidEntry, ...] | None = amd_cpuid() if amd else None
    cpu = world.processor(cpuid)
    cpu.msrs |= {
        msrs.STAR: _USER_BASE << 48 | CODE64 << 32 | 0xC000,
        msrs.LSTAR: DATA,
        msrs.CSTAR: DATA + 0x100,
        msrs.SYSCALL_MASK: 0x700,
        msrs.SYSENTER_CS: CODE32,
        msrs.SYSENTER_ESP: 0x6000,
        msrs.SYSENTER_EIP: DATA + 0x200,
    }
    cpu.efer |= 1 if world.bits != 16 else 0
    return cpu


def test_syscall() -> None:
    cpu = _processor(World(64, cpl=3).code("0f05").set(rflags=0x10AD7))
    cpu.step()
    assert (cpu.rip, cpu.cpl, cpu.regs[RCX], cpu.regs[R11]) == (DATA, 0, CODE + 2, 0xAD7)
    assert (cpu.rflags, cpu.segments[CS]) == (0x8D7, _FLAT_CODE64)
    assert cpu.segments[SS] == Segment(0, 0xFFFFFFFF, CODE64 + 8, 3, 1, 0, 1, 1, 0, 1)
    assert cpu.regs[RSP] == 0xE000


def test_syscall_that_masks_tf_is_not_stepped() -> None:
    cpu = _processor(World(64).code("0f05").set(rflags=0x102).put(DATA, "90"))
    cpu.step()
    cpu.step()
    assert cpu.rip == DATA + 1


@pytest.mark.parametrize(
    ("code", "target", "selector", "long"),
    [("480f07", 0x7FFFFFFFF000, 0x43, 1), ("0f07", 0xFFFFF000, 0x33, 0)],
)
def test_sysret(code: str, target: int, selector: int, long: int) -> None:
    cpu = _processor(World(64).code(code).set(rcx=0x7FFFFFFFF000, r11=0x3FFFD7))
    cpu.step()
    assert (cpu.rip, cpu.cpl, cpu.rflags) == (target, 3, 0x3C7FD7)
    assert (cpu.segments[CS].selector, cpu.segments[CS].l, cpu.segments[CS].dpl) == (selector, long, 3)
    assert cpu.segments[SS].selector == 0x3B


def test_sysret_to_an_address_that_is_not_canonical() -> None:
    """Intel's processors fault in the kernel, on its stack; AMD's at the target, at CPL 3."""
    world = World(64).code("480f07").set(rcx=1 << 47, r11=2)
    cpu = _processor(world)
    cpu.step()
    assert (cpu.rip, cpu.regs[RSP]) == (handler(Vector.GP), STACK - 48)
    cpu = _processor(world, amd=True)
    cpu.step()
    assert (cpu.rip, cpu.cpl) == (1 << 47, 3)
    cpu.step()
    assert (cpu.rip, cpu.cpl) == (handler(Vector.GP), 0)


def test_amd_leaves_the_stack_segment_alone() -> None:
    world = World(64).code("31c08ed00f07").set(rcx=DATA, r11=2)  # xor eax, eax; mov ss, ax; sysret
    cpu = _processor(world, amd=True)
    cpu.run(3)
    assert (cpu.segments[SS].selector, cpu.segments[SS].unusable, cpu.cpl) == (0x3B, 1, 3)
    cpu = _processor(world)
    cpu.run(3)
    assert (cpu.segments[SS].unusable, cpu.cpl) == (0, 3)


def test_sysret_needs_cpl_0() -> None:
    cpu = _processor(World(64, cpl=3).code("480f07"))
    cpu.step()
    assert cpu.rip == handler(Vector.GP)


def test_syscall_without_sce() -> None:
    cpu = _processor(World(64).code("0f05"))
    cpu.efer &= ~1
    cpu.step()
    assert cpu.rip == handler(Vector.UD)


def test_syscall_outside_64_bit_code_is_amds() -> None:
    world = World().code("0f05").set(rflags=0x202)
    cpu = _processor(world)
    cpu.step()
    assert cpu.rip == handler(Vector.UD)
    cpu = _processor(world, amd=True)
    cpu.step()
    assert (cpu.rip, cpu.regs[RCX], cpu.rflags, cpu.segments[CS].db) == (0xC000, CODE + 2, 2, 1)
    # from compatibility mode to CSTAR, in 64-bit code
    world = World(64).code("0f05")
    world.special.cs = Segment(0, 0xFFFFFFFF, CODE32, 0xB, 1, 0, 1, 1, 0, 1)
    cpu = _processor(world, amd=True)
    cpu.step()
    assert (cpu.rip, cpu.segments[CS]) == (DATA + 0x100, _FLAT_CODE64)


def test_sysenter_and_sysexit() -> None:
    cpu = _processor(World(cpl=3).code("0f34").put(DATA + 0x200, "0f35").set(rdx=0x1234, rflags=0x202))
    cpu.step()
    assert (cpu.rip, cpu.regs[RSP], cpu.cpl, cpu.rflags) == (DATA + 0x200, 0x6000, 0, 2)
    assert (cpu.segments[CS].selector, cpu.segments[SS].selector) == (CODE32, CODE32 + 8)
    cpu.regs[RCX], cpu.regs[RDX] = 0x5678, 0x1234
    cpu.step()
    assert (cpu.rip, cpu.regs[RSP], cpu.cpl) == (0x1234, 0x5678, 3)
    assert (cpu.segments[CS].selector, cpu.segments[SS].selector) == (CODE32 + 16 | 3, CODE32 + 24 | 3)


def test_long_sysenter_and_sysexit() -> None:
    cpu = _processor(World(64, cpl=3).code("0f34").put(DATA + 0x200, "480f35"))
    cpu.step()
    assert (cpu.rip, cpu.bits, cpu.cpl) == (DATA + 0x200, 64, 0)
    cpu.regs[RCX], cpu.regs[RDX] = 0x7FFF12345678, 0x7FFF00001234
    cpu.step()
    assert (cpu.rip, cpu.regs[RSP], cpu.bits, cpu.cpl) == (0x7FFF00001234, 0x7FFF12345678, 64, 3)
    assert (cpu.segments[CS].selector, cpu.segments[SS].selector) == (CODE32 + 32 | 3, CODE32 + 40 | 3)


def test_amd_has_no_sysenter_in_ia_32e_mode() -> None:
    cpu = _processor(World(64).code("0f34"), amd=True)
    cpu.step()
    assert cpu.rip == handler(Vector.UD)


@pytest.mark.parametrize("code", ["0f34", "0f35"])
def test_sysenter_without_a_selector(code: str) -> None:
    cpu = _processor(World().code(code))
    cpu.msrs[msrs.SYSENTER_CS] = 3
    cpu.step()
    assert cpu.rip == handler(Vector.GP)


def test_sysenter_in_real_mode() -> None:
    cpu = _processor(World(16).code("0f34"))
    cpu.step()
    assert cpu.rip == handler(Vector.GP)
