"""Decoding: prefixes by the SDM's rules, and an example of each correction of capstone.

The expected values are the SDM's or APM's; "host" marks those that were seen on a processor (AMD Zen 4), by
placing the instruction before a page that cannot be fetched and single-stepping over it.
"""

from __future__ import annotations

import pytest

from pykvm.model.cpu import decode, instructions
from pykvm.model.cpu.instruction import (
    ControlRegister,
    HighByte,
    Immediate,
    Instruction,
    Memory,
    Operand,
    Register,
    SegmentRegister,
)

__all__ = ["instructions"]  # its import fills the table of semantics
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")


def decoded(bits: int, code: str, *, amd: bool = True) -> Instruction:
    return decode.Decoder(bits, amd=amd).decode(bytes.fromhex(code))


def described(operand: Operand) -> str:
    """An operand in a few letters: r0.4 is EAX, h0 AH, -1.2 a word, m.8 memory, s3 DS, c8 CR8."""
    match operand:
        case Register():
            return f"r{operand.index}.{operand.size}"
        case HighByte():
            return f"h{operand.index}"
        case Immediate():
            return f"{operand.value:#x}.{operand.size}"
        case Memory():
            return f"m.{operand.size}"
        case SegmentRegister():
            return f"s{operand.index}"
        case ControlRegister():
            return f"c{operand.index}"
    return type(operand).__name__


def summary(insn: Instruction) -> str:
    return " ".join([insn.name, *(described(each) for each in insn.operands)])


@pytest.mark.parametrize(
    ("bits", "code", "expected"),
    [
        # names (SDM vol. 2, the instructions' pages)
        (64, "a5", "movs m.4 m.4"),  # capstone: movsd, as the SSE instruction
        (64, "f20f1000", "movsd Xmm m.8"),
        (64, "a7", "cmps m.4 m.4"),
        # SSE comparisons, which share one name in capstone
        (64, "0fc2c100", "cmpps Xmm Xmm"),
        (64, "660fc2c101", "cmppd Xmm Xmm"),
        (64, "f30fc2c107", "cmpss Xmm Xmm"),
        (64, "66f20fc20103", "cmpsd Xmm m.8"),
        (64, "48ab", "stos m.8 r0.8"),
        (64, "8ed8", "mov_sreg s3 r0.4"),
        (64, "0f22c0", "mov_cr c0 r0.8"),
        (64, "0fa0", "push_sreg s4"),
        (32, "1f", "pop_sreg s3"),
        (64, "ff18", "lcall m.8"),
        (64, "ff28", "ljmp m.8"),
        (64, "48b8ffffffffffffffff", "mov r0.8 0xffffffffffffffff.8"),  # capstone: movabs
        (64, "a0ffffffffffffffff", "mov r0.1 m.1"),
        (64, "d0f0", "shl r0.1 0x1.1"),  # capstone: sal; the reg field 6 repeats 4
        (64, "c1f003", "shl r0.4 0x3.1"),
        (64, "f6c801", "test r0.1 0x1.1"),  # the reg field 1 repeats 0 (host)
        (64, "f7c801000000", "test r0.4 0x1.4"),
        (32, "82c0ff", "add r0.1 0xff.1"),  # 82 repeats 80
        (32, "d6", "salc"),
        (64, "4090", "nop"),
        (64, "4190", "xchg r8.4 r0.4"),  # SDM vol. 2, XCHG
        (64, "f390", "pause"),
        (64, "66f390", "pause"),  # host
        (64, "67f390", "pause"),  # host
        (64, "66f34190", "xchg r8.2 r0.2"),  # host
        # byte registers (SDM vol. 2, table 3-1)
        (64, "88e0", "mov r0.1 h0"),
        (64, "4088e0", "mov r0.1 r4.1"),
        (32, "88f8", "mov r0.1 h3"),
        # immediates: sign-extended where the SDM says so
        (64, "83c0ff", "add r0.4 0xffffffff.4"),
        (64, "4881c0ffffffff", "add r0.8 0xffffffffffffffff.8"),
        (64, "6683c0ff", "add r0.2 0xffff.2"),
        (64, "6aff", "push 0xffffffffffffffff.8"),
        (64, "666aff", "push 0xffff.2"),
        (16, "6aff", "push 0xffff.2"),
        (64, "6668ff00", "push 0xff.2"),
        (64, "c8ffffff", "enter 0xffff.2 0xff.1"),  # capstone extends the sign
        (64, "c2ffff", "ret 0xffff.8"),
        # MOVSXD (SDM vol. 2)
        (64, "63c1", "movsxd r0.4 r1.4"),
        (64, "6663c1", "movsxd r0.2 r1.2"),  # capstone: a 32-bit source
        (64, "6763c1", "movsxd r0.4 r1.4"),  # capstone rejects 67 (host)
        # REX.W wins over 66 (SDM vol. 2, 2.2.1.2; host)
        (64, "66480fbdc1", "bsr r0.8 r1.8"),
        (64, "66486bc102", "imul r0.8 r1.8 0x2.8"),
        (64, "66480f38f000", "movbe r0.8 m.8"),
        (64, "66f2480f38f1c1", "crc32 r0.8 r1.8"),
        (64, "6648c20100", "ret 0x1.4"),  # capstone: 7 bytes
        (64, "6648ff30", "push m.8"),
        # prefixes without meaning (SDM vol. 2, 2.1.1; host)
        (64, "66f30f47c1", "cmova r0.2 r1.2"),  # capstone: 32 bits
        (64, "f20fbcc1", "bsf r0.4 r1.4"),
        (64, "66f20f820000", "jb 0x0.8"),
        (64, "f3660fb8c1", "popcnt r0.2 r1.2"),
        (64, "66f30fbcc1", "tzcnt r0.2 r1.2"),
        # reserved NOPs and prefetches (SDM vol. 2, table A-6, group 16; APM vol. 3, PREFETCH; host)
        (64, "0f1ef8", "nop r0.4"),
        (64, "0f1ac1", "nop r1.4"),
        (64, "0f18d0", "nop r0.4"),
        (64, "f30f1ec8", "nop r0.4"),
        (64, "0f0d28", "prefetch m.1"),
        # fences ignore r/m (SDM vol. 2, LFENCE; host)
        (64, "0faee9", "lfence"),
        (64, "0faef7", "mfence"),
        (64, "0faeff", "sfence"),
        # x87 encodings that repeat others (APM vol. 3, table A-15; host)
        (64, "ddd8", "fstp StackRegister"),
        (64, "dfd8", "fstp StackRegister"),
        # AMD: LOCK MOV CR0 is CR8 (APM vol. 3, MOV CRn; host)
        (32, "f00f20c0", "mov_cr r0.4 c8"),
        # AMD: F2 and F3 choose the condition of LOOPcc (host)
        (64, "f2e100", "loopne 0x0.8"),
        (64, "f3e000", "loope 0x0.8"),
        # VEX outside 64-bit mode: with a register form (SDM vol. 2, 2.3.5)
        (32, "c4e278f2c1", "andn r0.4 r0.4 r1.4"),
        (16, "c4e278f2c1", "andn r0.4 r0.4 r1.4"),
        (32, "c408", "les r1.4 m.4"),
        (32, "6208", "bound r1.4 m.8"),
        # 16-bit code, where capstone takes a mandatory 66 for the operand size (host)
        (16, "660f38f6c1", "adcx r0.4 r1.4"),
        (16, "660f6fc1", "movdqa Xmm Xmm"),
        (16, "660fb6c1", "movzx r0.4 r1.1"),
        (16, "f20f38f1c1", "crc32 r0.4 r1.2"),
    ],
)
def test_instructions_are_named_and_sized(bits: int, code: str, expected: str) -> None:
    insn = decoded(bits, code)
    try:
        assert summary(insn) == expected
    finally:
        assert insn.length == len(bytes.fromhex(code))


@pytest.mark.parametrize(
    ("bits", "code"),
    [
        (64, "d6"), (64, "82c001"), (64, "27"), (64, "60"), (64, "06"), (64, "ce"), (64, "d40a"), (64, "9a"),
        (64, "8fc8"),  # XOP
        (64, "c6c800"), (64, "fed0"), (64, "fff8"), (64, "0fbac001"), (64, "0fc700"),
        (64, "660fc300"), (64, "66480fc300"), (64, "f3480fc300"),  # MOVNTI takes no prefix (host)
        (16, "660fc307"),
        (64, "660faee8"), (64, "66480faee8"), (64, "f30faef8"),  # nor do fences
        (64, "f30fae00"), (64, "660fc720"),  # nor FXSAVE and XSAVEC (host)
        (64, "f3480f297d00"),  # MOVAPS
        (64, "66c4e278f2c1"), (64, "f2c4e278f2c1"), (64, "f0c4e278f2c1"), (64, "48c4e278f2c1"),
        (64, "c5f857c0"), (64, "62f17c4857c0"),  # AVX and AVX-512 are not offered
        (64, "0f78c0"), (64, "0f01d8"),  # VMX and SVM are off
        (64, "f08900"), (64, "f001c0"), (64, "f03900"), (64, "f00fa300"), (64, "f0a5"), (64, "f00f1000"),
    ],
)  # fmt: skip
def test_reserved_encodings_are_undefined(bits: int, code: str) -> None:
    with pytest.raises(decode.InvalidEncodingError):
        decoded(bits, code.ljust(30, "0"))


@pytest.mark.parametrize("code", ["f00100", "f0ff00", "f00fb108", "f00fc708", "f08700", "f00fab08", "f0f600"])
def test_lock_with_a_memory_destination(code: str) -> None:
    if code == "f0f600":  # TEST has no destination
        with pytest.raises(decode.InvalidEncodingError):
            decoded(64, code + "00")
    else:
        assert decoded(64, code).lock


@pytest.mark.parametrize(
    ("amd", "code", "length", "operand_size"),
    [
        # SDM vol. 2, CALL, superscript f64; APM vol. 3, "Near branches" (host)
        (False, "66e811223344", 6, 8),
        (True, "66e811223344", 4, 2),
        (True, "6648e811223344", 7, 8),
        (True, "660f8411223344", 5, 2),
        (False, "66c3", 2, 8),
        (True, "66c3", 2, 2),
        (True, "66ffd0", 3, 2),
        (False, "66ffd0", 3, 8),
        (True, "66eb11", 3, 2),
        (True, "6650", 2, 2),
        (False, "6650", 2, 2),
        (False, "c9", 1, 8),
        (False, "cb", 1, 4),
    ],
)
def test_operand_size_of_near_branches_and_stack(
    amd: bool, code: str, length: int, operand_size: int
) -> None:
    insn = decoded(64, code, amd=amd)
    assert (insn.length, insn.operand_size) == (length, operand_size)


@pytest.mark.parametrize(
    ("bits", "code", "displacement"),
    [
        (64, "e8f0ffffff", -16),
        (64, "ebfe", -2),
        (64, "66e8f0ff", -16),
        (16, "e8f0ff", -16),
        (16, "7480", -128),
        (16, "660f824bf6cd2e", 0x2ECDF64B),  # capstone cuts the target to 16 bits
        (32, "67e8f0ffffff", -16),  # capstone takes 67 for the operand size
    ],
)
def test_branches_hold_displacements(bits: int, code: str, displacement: int) -> None:
    (operand,) = decoded(bits, code).operands
    assert isinstance(operand, Immediate)
    assert (operand.value, operand.size) == (displacement % 2**64, 8)


@pytest.mark.parametrize(
    ("bits", "code", "segment"),
    [
        (64, "268900", "ds"),  # null prefixes in 64-bit mode
        (64, "64268900", "fs"),
        (64, "6564268900", "fs"),  # the last counts
        (32, "2e8900", "cs"),
        (32, "2e368900", "ss"),
        (32, "894500", "ss"),  # EBP
        (32, "890424", "ss"),  # ESP
        (32, "893cad00000000", "ds"),  # EBP as index alone
        (64, "41894500", "ds"),  # R13
        (16, "8902", "ss"),  # BP + SI
        (16, "8907", "ds"),
        (16, "89060000", "ds"),
    ],
)
def test_segments(bits: int, code: str, segment: str) -> None:
    memory = decoded(bits, code).operands[0]
    assert isinstance(memory, Memory)
    assert SEGMENTS[memory.segment] == segment


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("6666666689c1", "mov r1.2 r0.2"),  # repeated
        ("4866 89c1", "mov r1.2 r0.2"),  # REX counts only before the opcode
        ("4840 89c1", "mov r1.4 r0.4"),
        ("f2f3 a4", "movs m.1 m.1"),
    ],
)
def test_prefix_soup(code: str, expected: str) -> None:
    assert summary(decoded(64, code)) == expected


def test_the_last_of_f2_and_f3_counts() -> None:
    assert decoded(64, "f2f3a6").rep == 0xF3
    assert decoded(64, "f3f2a6").rep == 0xF2


def test_address_size() -> None:
    assert [decoded(bits, "8907").address_size for bits in (16, 32, 64)] == [2, 4, 8]
    assert [decoded(bits, "678907" + "00" * 4).address_size for bits in (16, 32, 64)] == [4, 2, 4]


def test_length_limit() -> None:
    """SDM vol. 3, 6.15, interrupt 13: more than 15 bytes."""
    assert decoded(64, "2e" * 13 + "01c0").length == 15
    assert decoded(64, "2e" * 9 + "81c011223344").length == 15
    for code in ("2e" * 14 + "01c0", "2e" * 15, "2e" * 10 + "81c011223344"):
        with pytest.raises(decode.TooLongError):
            decoded(64, code)


@pytest.mark.parametrize(
    "code",
    [
        "",
        "66",
        "48",
        "0f",
        "0f38",
        "81",
        "81c0",
        "81c0112233",
        "8904",
        "c4e2",
        "c4e278f2",
        "e8",
        "0fc7",
        "0fba",
        "0f71",
        "f20f38",
    ],
)
def test_truncated(code: str) -> None:
    with pytest.raises(decode.TruncatedError):
        decoded(64, code)


def test_missing_semantics_are_named() -> None:
    with pytest.raises(decode.UnknownInstructionError, match="aesenc xmm0, xmm1") as caught:
        decoded(64, "660f38dcc1")
    assert caught.value.encoding == bytes.fromhex("660f38dcc1")
