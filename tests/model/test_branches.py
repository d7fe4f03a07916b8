"""Near branches (SDM vol. 2, CALL, JMP, RET, LOOP, JrCXZ); conditions are in test_moves.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.model.cpu.decode import Decoder
from pykvm.model.cpu.flags import ZF
from pykvm.model.cpu.instruction import CS
from tests.model.chip import CODE, DATA, Chip

RAX, RCX, RBX, RSP = 0, 1, 3, 4
TOP = DATA + 0x800


def chip_with_stack(bits: int = 64) -> Chip:
    chip = Chip(bits)
    chip.regs[RSP] = TOP
    return chip


@pytest.mark.parametrize(
    ("bits", "code", "target"),
    [
        (64, "eb10", CODE + 0x12),
        (64, "ebf0", CODE - 14),
        (64, "e900010000", CODE + 0x105),
        (32, "66e90001", CODE + 0x104),
        (32, "66e90080", 4),  # a 16-bit operand cuts EIP: 0x8004 + 0xffff8000
        (16, "e90080", 3),
        (16, "66e900000000", CODE + 6),
        (64, "ffe0", 0x7654),
        (32, "66ffe0", 0x7654),
        (64, "ff23", 0x6789),
        (64, "ff250a000000", 0x4321),
    ],
)
def test_jumps(bits: int, code: str, target: int) -> None:
    chip = chip_with_stack(bits)
    chip.regs[RAX], chip.regs[RBX] = 0x7654, DATA
    chip.put(DATA, (0x6789).to_bytes(8, "little"))
    chip.put(CODE + 16, (0x4321).to_bytes(8, "little"))
    assert chip.do(code) is None
    assert chip.next_rip == target


@pytest.mark.parametrize(
    ("bits", "code", "size", "target"),
    [
        (64, "e800010000", 8, CODE + 0x105),
        (32, "e800010000", 4, CODE + 0x105),
        (32, "66e80001", 2, CODE + 0x104),
        (16, "e80001", 2, CODE + 0x103),
        (16, "66e800010000", 4, CODE + 0x106),
        (64, "ffd0", 8, 0x7654),
        (64, "ff1424", 8, 0x9876),  # the target is read before the return address is pushed
    ],
)
def test_call_and_return(bits: int, code: str, size: int, target: int) -> None:
    chip = chip_with_stack(bits)
    chip.regs[RAX] = 0x7654
    chip.put(TOP, (0x9876).to_bytes(8, "little"))
    assert chip.do(code) is None
    assert chip.next_rip == target
    assert chip.regs[RSP] == TOP - size
    assert chip.at(TOP - size, size) == CODE + len(bytes.fromhex(code))
    back = "66c20800" if size == (2 if bits == 32 else 4 if bits == 16 else 0) else "c20800"
    assert chip.do(back) is None
    assert chip.next_rip == CODE + len(bytes.fromhex(code))
    assert chip.regs[RSP] == TOP + 8


def test_operand_size_of_near_branches_in_64_bit_mode() -> None:
    """Intel ignores 66 (SDM vol. 2, RET: f64); AMD takes 16 bits (APM vol. 3, RET)."""
    for amd, size in ((False, 8), (True, 2)):
        chip = chip_with_stack()
        chip._decoders[64] = Decoder(64, amd=amd)
        chip.put(TOP, (0x1_2345).to_bytes(8, "little"))
        assert chip.do("66c3") is None
        assert (chip.next_rip, chip.regs[RSP]) == (0x12345 if size == 8 else 0x2345, TOP + size)


@pytest.mark.parametrize("code", ["ffe0", "ffd0", "c3"])
def test_targets_must_be_in_the_segment(code: str) -> None:
    for bits, target in ((64, 1 << 47), (32, 0x20000)):
        chip = chip_with_stack(bits)
        if bits == 32:
            chip.set_segment(CS, replace(chip.segments[CS], limit=0x1FFFF, g=0))
        chip.regs[RAX] = target
        chip.put(TOP, target.to_bytes(8, "little"))
        assert chip.do(code) == "#GP(0x0)"
        assert chip.regs[RSP] == TOP
        chip.regs[RAX] = target - 1
        chip.put(TOP, (target - 1).to_bytes(8, "little"))
        assert chip.do(code) is None


@pytest.mark.parametrize(
    ("bits", "code", "rcx", "zero", "taken", "left"),
    [
        (64, "e210", 2, False, True, 1),
        (64, "e210", 1, False, False, 0),
        (64, "e210", 0, False, True, 2**64 - 1),
        (64, "67e210", 0x5_00000001, False, False, 0),  # ECX: its upper half is cleared
        (32, "67e210", 0x50001, False, False, 0x50000),
        (32, "e210", 0x10000, False, True, 0xFFFF),
        (16, "e210", 0x10001, False, False, 0x10000),
        (64, "e110", 2, True, True, 1),
        (64, "e110", 2, False, False, 1),
        (64, "e110", 1, True, False, 0),
        (64, "e010", 2, False, True, 1),
        (64, "e010", 2, True, False, 1),
        (64, "e310", 0, False, True, 0),
        (64, "e310", 1 << 32, False, False, 1 << 32),
        (64, "67e310", 1 << 32, False, True, 1 << 32),
        (32, "67e310", 0x10000, False, True, 0x10000),
        (16, "e310", 0x10000, False, True, 0x10000),
        (16, "67e310", 0x10000, False, False, 0x10000),
    ],
)
def test_loops(bits: int, code: str, rcx: int, zero: bool, taken: bool, left: int) -> None:
    chip = chip_with_stack(bits)
    chip.regs[RCX], chip.rflags = rcx, 2 | ZF * zero
    assert chip.do(code) is None
    after = CODE + len(bytes.fromhex(code))
    assert chip.next_rip == after + (0x10 if taken else 0)
    assert chip.regs[RCX] == left
    assert chip.rflags == 2 | ZF * zero
