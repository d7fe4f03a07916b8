"""MMX and SSE instructions that shift, shuffle, pack, unpack, widen, blend, insert and extract."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.instruction import Immediate, Memory, Mmx
from pykvm.model.cpu.semantics import semantics
from pykvm.model.cpu.vector import (
    M64,
    M128,
    Combine,
    begin,
    finish,
    join,
    lanes,
    packed,
    packed_immediate,
    read,
    saturate,
    saturate_unsigned,
    signed,
    signed_lanes,
    touch_mmx,
)

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.model.cpu.processor import Processor

# --- shifts -----------------------------------------------------------------------------------------------


def _shift(width: int, function: Callable[[int, int], int], arithmetic: bool = False) -> Combine:
    """Each lane by the count in the source's low 64 bits; counts beyond the lane shift everything out."""
    split = signed_lanes if arithmetic else lanes

    def combine(a: int, b: int, bits: int) -> int:
        count = min(b & M64, width)
        return join((function(lane, count) for lane in split(a, width, bits)), width)

    return combine


def _left(value: int, count: int) -> int:
    return value << count


def _right(value: int, count: int) -> int:
    return value >> count


for _name, _function in (
    ("psllw", _shift(16, _left)),
    ("pslld", _shift(32, _left)),
    ("psllq", _shift(64, _left)),
    ("psrlw", _shift(16, _right)),
    ("psrld", _shift(32, _right)),
    ("psrlq", _shift(64, _right)),
    ("psraw", _shift(16, _right, True)),
    ("psrad", _shift(32, _right, True)),
):
    packed(_name, "mmx", "sse2", _function)

packed("pslldq", "", "sse2", lambda a, b, bits: a << 8 * min(b, 16) & M128)
packed("psrldq", "", "sse2", lambda a, b, bits: a >> 8 * min(b, 16))

# --- pack, unpack, widen ----------------------------------------------------------------------------------


def _pack(width: int, limit: Callable[[int, int], int]) -> Combine:
    """Signed lanes of ``width``, of the destination first, to saturated ones of half the width."""
    return lambda a, b, bits: join(
        (limit(lane, width // 2) for lane in signed_lanes(a, width, bits) + signed_lanes(b, width, bits)),
        width // 2,
    )


def _interleave(width: int, high: bool) -> Combine:
    """Lanes of the lower or upper halves by turns."""

    def combine(a: int, b: int, bits: int) -> int:
        half = slice(bits // width // 2, None) if high else slice(0, bits // width // 2)
        pairs = zip(lanes(a, width, bits)[half], lanes(b, width, bits)[half], strict=True)
        return join((lane for pair in pairs for lane in pair), width)

    return combine


for _name, _mmx, _xmm, _function in (
    ("packsswb", "mmx", "sse2", _pack(16, saturate)),
    ("packssdw", "mmx", "sse2", _pack(32, saturate)),
    ("packuswb", "mmx", "sse2", _pack(16, saturate_unsigned)),
    ("packusdw", "", "sse41", _pack(32, saturate_unsigned)),
    ("punpcklbw", "mmx", "sse2", _interleave(8, False)),
    ("punpcklwd", "mmx", "sse2", _interleave(16, False)),
    ("punpckldq", "mmx", "sse2", _interleave(32, False)),
    ("punpcklqdq", "", "sse2", _interleave(64, False)),
    ("punpckhbw", "mmx", "sse2", _interleave(8, True)),
    ("punpckhwd", "mmx", "sse2", _interleave(16, True)),
    ("punpckhdq", "mmx", "sse2", _interleave(32, True)),
    ("punpckhqdq", "", "sse2", _interleave(64, True)),
    ("unpcklps", "", "sse", _interleave(32, False)),
    ("unpcklpd", "", "sse2", _interleave(64, False)),
    ("unpckhps", "", "sse", _interleave(32, True)),
    ("unpckhpd", "", "sse2", _interleave(64, True)),
):
    packed(_name, _mmx, _xmm, _function)

_WIDTHS: Final = {"b": 8, "w": 16, "d": 32, "q": 64}


def _widen(source: int, target: int, split: Callable[[int, int, int], list[int]]) -> Combine:
    return lambda a, b, bits: join(split(b, source, bits * source // target), target)


for _forms in ("bw", "bd", "bq", "wd", "wq", "dq"):
    _from, _to = _WIDTHS[_forms[0]], _WIDTHS[_forms[1]]
    packed(f"pmovsx{_forms}", "", "sse41", _widen(_from, _to, signed_lanes))
    packed(f"pmovzx{_forms}", "", "sse41", _widen(_from, _to, lanes))

# --- shuffles ---------------------------------------------------------------------------------------------


def _select(order: int, values: list[int]) -> list[int]:
    """Four of four, two bits of ``order`` each."""
    return [values[order >> at & 3] for at in (0, 2, 4, 6)]


def _pshufb(a: int, b: int, bits: int) -> int:
    table = lanes(a, 8, bits)
    return join((0 if at & 0x80 else table[at & bits // 8 - 1] for at in lanes(b, 8, bits)), 8)


def _pshufhw(a: int, b: int, order: int) -> int:
    return b & M64 | join(_select(order, lanes(b >> 64, 16, 64)), 16) << 64


def _pshuflw(a: int, b: int, order: int) -> int:
    return b >> 64 << 64 | join(_select(order, lanes(b, 16, 64)), 16)


def _shufps(a: int, b: int, order: int) -> int:
    low, high = _select(order, lanes(a, 32, 128)), _select(order, lanes(b, 32, 128))
    return join(low[:2] + high[2:], 32)


def _shufpd(a: int, b: int, order: int) -> int:
    return join((lanes(a, 64, 128)[order & 1], lanes(b, 64, 128)[order >> 1 & 1]), 64)


def _palignr(size: int) -> Combine:
    return lambda a, b, count: (a << 8 * size | b) >> 8 * count & (1 << 8 * size) - 1


def _mpsadbw(a: int, b: int, control: int) -> int:
    """Eight sums of four absolute differences (SDM vol. 2, MPSADBW)."""
    first, four = lanes(a, 8, 128)[4 * (control >> 2 & 1) :], lanes(b, 8, 128)[4 * (control & 3) :][:4]
    return join((sum(abs(first[at + n] - four[n]) for n in range(4)) for at in range(8)), 16)


def _pclmulqdq(a: int, b: int, control: int) -> int:
    """The product of two polynomials over GF(2): quadwords by bits 0 and 4 of the control."""
    x, y = lanes(a, 64, 128)[control & 1], lanes(b, 64, 128)[control >> 4 & 1]
    result = 0
    for bit in range(64):
        if y >> bit & 1:
            result ^= x << bit
    return result


def _blend(width: int) -> Combine:
    """Lanes of the source where the immediate has a one."""
    return lambda a, b, mask: join(
        (
            y if mask >> n & 1 else x
            for n, (x, y) in enumerate(zip(lanes(a, width, 128), lanes(b, width, 128), strict=True))
        ),
        width,
    )


for _name, _mmx, _xmm, _function in (
    ("pshufw", "sse", "", lambda a, b, order: join(_select(order, lanes(b, 16, 64)), 16)),
    ("pshufd", "", "sse2", lambda a, b, order: join(_select(order, lanes(b, 32, 128)), 32)),
    ("pshufhw", "", "sse2", _pshufhw),
    ("pshuflw", "", "sse2", _pshuflw),
    ("shufps", "", "sse", _shufps),
    ("shufpd", "", "sse2", _shufpd),
    ("pblendw", "", "sse41", _blend(16)),
    ("blendps", "", "sse41", _blend(32)),
    ("blendpd", "", "sse41", _blend(64)),
    ("mpsadbw", "", "sse41", _mpsadbw),
    ("pclmulqdq", "", "pclmulqdq", _pclmulqdq),
):
    packed_immediate(_name, _mmx, _xmm, _function)

packed("pshufb", "ssse3", "ssse3", _pshufb)


@semantics("palignr")
def palignr(cpu: Processor, insn: Instruction) -> None:
    """Bytes out of destination and source side by side."""
    target, operand, count = insn.operands
    size = begin(cpu, insn, "ssse3", "ssse3")
    value = _palignr(size)(target.read(cpu), read(cpu, operand, size), count.read(cpu))
    finish(cpu, target, value)


def _blend_by_xmm0(name: str, width: int) -> None:
    """Lanes of the source where the lane of XMM0 is negative."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand = insn.operands[:2]
        begin(cpu, insn, "", "sse41")
        signs = lanes(cpu.xmm[0], width, 128)
        mask = sum((sign >> width - 1) << n for n, sign in enumerate(signs))
        finish(cpu, target, _blend(width)(target.read(cpu), read(cpu, operand, 16), mask))

    semantics(name)(execute)


_blend_by_xmm0("pblendvb", 8)
_blend_by_xmm0("blendvps", 32)
_blend_by_xmm0("blendvpd", 64)

# --- insert, extract, masks -------------------------------------------------------------------------------


def _insert(name: str, width: int, mmx: str, xmm: str) -> None:
    """One lane from a general register or memory."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand, position = insn.operands
        size = begin(cpu, insn, mmx, xmm)
        shift = position.read(cpu) % (8 * size // width) * width
        lane = read(cpu, operand, width // 8) & (1 << width) - 1
        finish(cpu, target, target.read(cpu) & ~((1 << width) - 1 << shift) | lane << shift)

    semantics(name)(execute)


_insert("pinsrb", 8, "", "sse41")
_insert("pinsrw", 16, "sse", "sse2")
_insert("pinsrd", 32, "", "sse41")
_insert("pinsrq", 64, "", "sse41")


def _extract(name: str, width: int, mmx: str, xmm: str) -> None:
    """One lane to memory, or zero-extended to a general register."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand, position = insn.operands
        # The form of PEXTRW with a memory operand is part of SSE4.1.
        size = begin(cpu, insn, mmx, "sse41" if insn.opcode[1] == 0x3A else xmm)
        lane = lanes(operand.read(cpu), width, 8 * size)[position.read(cpu) % (8 * size // width)]
        target.write(cpu, lane)
        if isinstance(operand, Mmx):
            touch_mmx(cpu)

    semantics(name)(execute)


_extract("pextrb", 8, "", "sse41")
_extract("pextrw", 16, "sse", "sse2")
_extract("pextrd", 32, "", "sse41")
_extract("pextrq", 64, "", "sse41")
_extract("extractps", 32, "", "sse41")


@semantics("insertps")
def insertps(cpu: Processor, insn: Instruction) -> None:
    """A lane of the source register (or the only one in memory), and zeros by the low four bits."""
    target, operand, immediate = insn.operands
    assert isinstance(immediate, Immediate)
    begin(cpu, insn, "", "sse41")
    control = immediate.value
    chosen = 0 if isinstance(operand, Memory) else control >> 6
    result = lanes(target.read(cpu), 32, 128)
    result[control >> 4 & 3] = lanes(read(cpu, operand, 4), 32, 128)[chosen]
    finish(cpu, target, join((0 if control >> n & 1 else lane for n, lane in enumerate(result)), 32))


def _mask_of_signs(name: str, width: int, mmx: str, xmm: str) -> None:
    """The sign bits of the lanes as an integer."""

    def execute(cpu: Processor, insn: Instruction) -> None:
        target, operand = insn.operands
        size = begin(cpu, insn, mmx, xmm)
        values = lanes(operand.read(cpu), width, 8 * size)
        target.write(cpu, sum(1 << n for n, lane in enumerate(values) if signed(lane, width) < 0))
        if isinstance(operand, Mmx):
            touch_mmx(cpu)

    semantics(name)(execute)


_mask_of_signs("pmovmskb", 8, "sse", "sse2")
_mask_of_signs("movmskps", 32, "", "sse")
_mask_of_signs("movmskpd", 64, "", "sse2")
