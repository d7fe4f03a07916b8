"""Addition, subtraction and logic: every flag by its definition (SDM vol. 1, 3.4.3.1), at the edges."""

from __future__ import annotations

from itertools import product

import pytest

from pykvm.model.cpu.flags import AF, CF, OF, PF, SF, STATUS, ZF
from tests.model.chip import DATA, Chip

RAX, RBX, RDX = 0, 3, 2
EDGES = (0, 1, 2, 0x0F, 0x10, 0x7E, 0x7F, 0x80, 0x81, 0xFE, 0xFF)
PREFIX = {1: "", 2: "66", 4: "", 8: "48"}


def values(size: int) -> list[int]:
    """The edges of a byte, at both ends of the operand."""
    top = 8 * (size - 1)
    return sorted(set(EDGES) | {each << top for each in EDGES} | {(1 << 8 * size) - 1})


def signed(value: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(size, "little"), "little", signed=True)


def of_result(result: int, size: int) -> int:
    """SF, ZF and PF by looking at the digits."""
    digits = f"{result:0{8 * size}b}"
    return (
        (SF if digits[0] == "1" else 0)
        | (ZF if "1" not in digits else 0)
        | (PF if digits[-8:].count("1") % 2 == 0 else 0)
    )


def sum_flags(a: int, b: int, carry: int, size: int) -> tuple[int, int]:
    result = (a + b + carry) % 2 ** (8 * size)
    exact = signed(a, size) + signed(b, size) + carry
    return result, (
        of_result(result, size)
        | (CF if a + b + carry >= 2 ** (8 * size) else 0)
        | (AF if a % 16 + b % 16 + carry >= 16 else 0)
        | (OF if exact != signed(result, size) else 0)
    )


def difference_flags(a: int, b: int, borrow: int, size: int) -> tuple[int, int]:
    result = (a - b - borrow) % 2 ** (8 * size)
    exact = signed(a, size) - signed(b, size) - borrow
    return result, (
        of_result(result, size)
        | (CF if a < b + borrow else 0)
        | (AF if a % 16 < b % 16 + borrow else 0)
        | (OF if exact != signed(result, size) else 0)
    )


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("opcode", "subtracts", "with_carry", "writes"),
    [(0x00, False, False, True), (0x10, False, True, True), (0x28, True, False, True),
     (0x18, True, True, True), (0x38, True, False, False)],
    ids=["add", "adc", "sub", "sbb", "cmp"],
)  # fmt: skip
def test_sums_and_differences(
    size: int, opcode: int, subtracts: bool, with_carry: bool, writes: bool
) -> None:
    chip = Chip()
    code = f"{PREFIX[size]}{opcode + (size > 1):02x}d8"  # op al, bl …
    for a, b, carry in product(values(size), values(size), (0, 1)):
        chip.regs[RAX], chip.regs[RBX], chip.rflags = a, b, 2 | carry
        assert chip.do(code) is None
        result, status = (difference_flags if subtracts else sum_flags)(
            a, b, carry if with_carry else 0, size
        )
        assert chip.regs[RAX] == (result if writes else a)
        assert chip.rflags & STATUS == status


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(("opcode", "name"), [(0x20, "and"), (0x08, "or"), (0x30, "xor"), (0x84, "test")])
def test_logic_clears_carry_and_overflow(size: int, opcode: int, name: str) -> None:
    chip = Chip()
    for a, b in product(values(size), values(size)):
        chip.regs[RAX], chip.regs[RBX], chip.rflags = a, b, 2 | STATUS
        assert chip.do(f"{PREFIX[size]}{opcode + (size > 1):02x}d8") is None
        digits = [x + y for x, y in zip(f"{a:064b}", f"{b:064b}", strict=True)]
        ones = {"and": {"11"}, "or": {"01", "10", "11"}, "xor": {"01", "10"}, "test": {"11"}}[name]
        result = int("".join("1" if each in ones else "0" for each in digits), 2)
        assert chip.regs[RAX] == (a if name == "test" else result)
        assert chip.rflags & (STATUS & ~AF) == of_result(result, size)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_inc_dec_neg_not(size: int) -> None:
    chip = Chip()
    group = f"{PREFIX[size]}{0xFE + (size > 1):02x}"
    unary = f"{PREFIX[size]}{0xF6 + (size > 1):02x}"
    for value, carry in product(values(size), (0, 1)):
        for code, (result, status) in {
            f"{group}c0": sum_flags(value, 1, 0, size),
            f"{group}c8": difference_flags(value, 1, 0, size),
        }.items():
            chip.regs[RAX], chip.rflags = value, 2 | carry
            assert chip.do(code) is None
            assert (chip.regs[RAX], chip.rflags & STATUS) == (result, status & ~CF | carry)
        chip.regs[RAX], chip.rflags = value, 2 | carry
        assert chip.do(f"{unary}d8") is None
        assert (chip.regs[RAX], chip.rflags & STATUS) == difference_flags(0, value, 0, size)
        chip.regs[RAX], chip.rflags = value, 2 | STATUS
        assert chip.do(f"{unary}d0") is None
        assert (chip.regs[RAX], chip.rflags & STATUS) == (2 ** (8 * size) - 1 - value, STATUS)


@pytest.mark.parametrize(
    ("code", "rax", "expected"),
    [
        ("04ff", 0x1234567812345601, 0x1234567812345600),
        ("6605ffff", 0x1234567812340001, 0x1234567812340000),
        ("0501000000", 0xFFFFFFFF00000001, 2),
        ("4805ffffffff", 0x100000000, 0xFFFFFFFF),
        ("80c4ff", 0x1234, 0x1134),
    ],
    ids=["al", "ax leaves the rest", "eax clears the upper half", "rax extends the immediate", "ah"],
)
def test_registers_of_all_sizes(code: str, rax: int, expected: int) -> None:
    chip = Chip()
    chip.regs[RAX] = rax
    assert chip.do(code) is None
    assert chip.regs[RAX] == expected


def test_carry_chain_of_adx() -> None:
    """ADCX touches CF alone, ADOX OF alone (SDM vol. 2)."""
    for code, flag in (("66480f38f6c3", CF), ("f3480f38f6c3", OF)):
        chip = Chip()
        for a, b, carry in product((0, 1, 2**64 - 1), (0, 2**64 - 1), (0, 1)):
            rest = STATUS & ~flag
            chip.regs[RAX], chip.regs[RBX], chip.rflags = a, b, 2 | rest | flag * carry
            assert chip.do(code) is None
            total = a + b + carry
            assert chip.regs[RAX] == total % 2**64
            assert chip.rflags & STATUS == rest | (flag if total >= 2**64 else 0)


@pytest.mark.parametrize(
    ("code", "rax", "rdx", "expected"),
    [
        ("6698", 0x1280, 0, (0xFF80, 0)),
        ("98", 0xFFFFFFFF00008000, 0, (0xFFFF8000, 0)),
        ("4898", 0x80000000, 0, (0xFFFFFFFF80000000, 0)),
        ("4898", 0x17FFFFFFF, 0, (0x7FFFFFFF, 0)),
        ("6699", 0x8000, 0x11110000, (0x8000, 0x1111FFFF)),
        ("99", 0x80000000, 2**64 - 1, (0x80000000, 0xFFFFFFFF)),
        ("4899", 1 << 63, 0, (1 << 63, 2**64 - 1)),
        ("4899", 1, 5, (1, 0)),
    ],
)
def test_sign_extension(code: str, rax: int, rdx: int, expected: tuple[int, int]) -> None:
    chip = Chip()
    chip.regs[RAX], chip.regs[RDX] = rax, rdx
    assert chip.do(code) is None
    assert (chip.regs[RAX], chip.regs[RDX]) == expected


def test_xadd() -> None:
    chip = Chip()
    chip.regs[RAX], chip.regs[RBX] = 5, 7
    assert chip.do("0fc1d8") is None  # xadd eax, ebx
    assert (chip.regs[RAX], chip.regs[RBX]) == (12, 5)
    assert chip.do("0fc1c0") is None  # of one register the sum stays
    assert chip.regs[RAX] == 24
    chip.put(DATA, (3).to_bytes(4, "little"))
    chip.regs[RBX] = DATA
    assert chip.do("f00fc11b") is None  # lock xadd [rbx], ebx: the address is the old one
    assert (chip.at(DATA, 4), chip.regs[RBX]) == (DATA + 3, 3)
