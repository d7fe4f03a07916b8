"""The snippets that an ``Access`` step runs: one access, or a few, each ending with an OUT.

Encodings are those of SDM vol. 2 for 64-bit code.  All take the linear address of their operand in RDI, a
value in RAX, a count or second value in RCX, and a second address in RSI.  They are laid out one after the
other, 32 bytes each, so that a snippet has the same address in every scenario of this version.
"""

from __future__ import annotations

from typing import Final, NamedTuple

PORT: Final = 0x10
"""Where every snippet writes AL at its end."""
FETCH_OFFSET: Final = 0xFF0
"""Where in a page code lies that ``fetch`` can jump to."""
STRIDE: Final = 32
SIZES: Final = (1, 2, 4, 8)


class Snippet(NamedTuple):
    """``code`` without its OUT.  ``writes``: whether [RDI] is stored to; ``reads_second``: whether [RSI] is
    read; ``kernel``: whether it needs CPL 0; ``size``: bytes of the operand; ``fpu``: whether KVM's emulator
    (hosts.md C.2) lacks the instruction, so that a guest whose CPL 0 is emulated cannot run it there;
    ``counted``: whether RCX is a count of elements."""

    code: bytes
    size: int = 8
    writes: bool = True
    reads_second: bool = False
    kernel: bool = False
    counted: bool = False
    lacking: bool = False


def _sized(byte: int, wide: int, modrm: bytes, size: int, *, prefix: bytes = b"") -> bytes:
    """``opcode modrm`` with the prefixes for an operand of ``size`` bytes."""
    before = {1: b"", 2: b"\x66", 4: b"", 8: b"\x48"}[size]
    return prefix + before + bytes([byte if size == 1 else wide]) + modrm


def _all_sizes(
    name: str, byte: int, wide: int, modrm: bytes = b"\x07", *, lock: bool = False, writes: bool = True
) -> dict[str, Snippet]:
    prefix = b"\xf0" if lock else b""
    return {
        f"{name}{size}": Snippet(_sized(byte, wide, modrm, size, prefix=prefix), size, writes)
        for size in SIZES
    }


def _of(code: str, size: int = 8, **properties: bool) -> Snippet:
    return Snippet(bytes.fromhex(code), size, **properties)


SNIPPETS: Final[dict[str, Snippet]] = {
    **_all_sizes("load", 0x8A, 0x8B, writes=False),
    **_all_sizes("store", 0x88, 0x89),
    **_all_sizes("add", 0x00, 0x01),
    **_all_sizes("or", 0x08, 0x09),
    **_all_sizes("and", 0x20, 0x21),
    **_all_sizes("xor", 0x30, 0x31),
    **_all_sizes("xchg", 0x86, 0x87),
    **_all_sizes("lock_add", 0x00, 0x01, lock=True),
    **_all_sizes("lock_or", 0x08, 0x09, lock=True),
    **_all_sizes("inc", 0xFE, 0xFF),
    **_all_sizes("lock_inc", 0xFE, 0xFF, lock=True),
    "store_immediate8": _of("48c70755000000"),
    "store_immediate4": _of("c70767000000", 4),
    "sub8": _of("482907"),
    "not8": _of("48f717"),
    "neg4": _of("f71f", 4),
    "dec8": _of("48ff0f"),
    "rotate8": _of("48d107"),
    "shift8": _of("48d127"),
    "shift_by_zero4": _of("c12700", 4),
    "xadd8": _of("480fc107"),
    "xadd4": _of("0fc107", 4),
    "lock_xadd8": _of("f0480fc107"),
    "cmpxchg8": _of("480fb10f"),
    "cmpxchg4": _of("0fb10f", 4),
    "lock_cmpxchg8": _of("f0480fb10f"),
    "cmpxchg8b": _of("0fc70f"),
    "lock_cmpxchg8b": _of("f00fc70f"),
    "cmpxchg16b": _of("480fc70f", 16, lacking=True),
    "bts8": _of("480fba2f05"),
    "btr8": _of("480fba3705"),
    "btc4": _of("0fba3f06", 4),
    "lock_bts8": _of("f0480fba2f06"),
    "bt8": _of("480fba2705", writes=False),
    "test8": _of("488507", writes=False),
    "compare4": _of("3907", 4, writes=False),
    "setc": _of("0f9207", 1),
    "push": _of("488d670850"),
    "push_immediate": _of("488d67086a07"),
    "pop": _of("488d268f07", reads_second=True),
    "call": _of("488d6708e800000000"),
    "stos1": _of("f3aa", 1, counted=True),
    "stos8": _of("f348ab", counted=True),
    "stos8_down": _of("fdf348abfc", counted=True),
    "movs1": _of("f3a4", 1, counted=True, reads_second=True),
    "movs8": _of("f348a5", counted=True, reads_second=True),
    "movups": _of("0f1107", 16),
    "movaps": _of("0f2907", 16),
    "movdqu": _of("f30f7f07", 16),
    "movntdq": _of("660fe707", 16),
    "load_movups": _of("0f1007", 16, writes=False),
    "movnti8": _of("480fc307"),
    "movnti4": _of("0fc307", 4),
    "movq_mm": _of("0f7f07"),
    "movq_xmm": _of("660fd607", lacking=True),
    "fxsave": _of("0fae07", 512, lacking=True),
    "clflush": _of("0fae3f", 1, writes=False),
    "prefetchw": _of("0f0d0f", 1, writes=False),
    "fetch": _of("ffe7", 1, writes=False),
    # Several in one KVM_RUN.
    "store_load": _of("488907488b1e", reads_second=True),
    "load_store": _of("488b1f488907"),
    "store_store": _of("488907488906", reads_second=True),
    "store4_times": _of("488907488947084889471048894718", 32),
    "add4_times": _of("480107480147084801471048014718", 32),
    "store_twice": _of("488907488907"),
    # At CPL 0.
    "invlpg": _of("0f013f", 1, writes=False, kernel=True),
    "store_invlpg_load": _of("4889070f013e488b1e", reads_second=True, kernel=True),
    "load_cr3": _of("0f22d8", 0, writes=False, kernel=True),
    "store_reload_cr3": _of("4889070f20d90f22d9", kernel=True),
    "load_cr0": _of("0f22c0", 0, writes=False, kernel=True),
    "load_cr4": _of("0f22e0", 0, writes=False, kernel=True),
}
"""By name.  Append only: the place in this table is the place in memory."""

_OUT: Final = bytes([0xE6, PORT, 0xEB, 0xFC])
"""out PORT, al; jmp back to it: whoever goes on finds the same again."""
FETCHED: Final = _OUT
"""What ``fetch`` needs at its address."""


def image() -> bytes:
    """All snippets, each with its OUT."""
    return b"".join((snippet.code + _OUT).ljust(STRIDE, b"\x90") for snippet in SNIPPETS.values())


_PLACES: Final = {name: STRIDE * number for number, name in enumerate(SNIPPETS)}


def place(name: str) -> int:
    """The snippet's offset in ``image``."""
    return _PLACES[name]
