"""Every MMX and SSE instruction against the host's processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.errors import HostError
from tests.model.native import Twin, vector_cases

CASES = 2
_NEEDED = {"sse4_1", "sse4_2", "ssse3", "pclmulqdq"}
_IMMEDIATE = {"0f70", "0f71", "0f72", "0f73", "0fc2", "0fc4", "0fc5", "0fc6"}
OPCODES = (
    [
        f"0f{n:02x}"
        for n in (*range(0x10, 0x18), 0x28, 0x29, *range(0x2A, 0x30), 0x51, *range(0x54, 0x77), 0x77)
    ]
    + [f"0f{n:02x}" for n in (0x7C, 0x7D, 0x7E, 0x7F, 0xC2, 0xC4, 0xC5, 0xC6, 0x50, *range(0xD0, 0xFF))]
    + [f"0f38{n:02x}" for n in range(0x42)]
    + [f"0f3a{n:02x}" for n in (*range(8, 0x18), 0x20, 0x21, 0x22, *range(0x40, 0x45), *range(0x60, 0x64))]
)
"""All opcodes of MMX to SSE4.2 but RCP, RSQRT and MOVNTI, and the reserved ones between them."""
FORMS = {
    "registers": ("", 0xC1),
    "high registers": ("45", 0xCA),
    "wide": ("48", 0xD3),
    "memory": ("", 0x07),
    "same register": ("", 0xED),
}
_SHIFT_GROUPS = {"0f71", "0f72", "0f73"}


@pytest.fixture(scope="module")
def twin() -> Iterator[Twin]:
    """Skips where the host lacks the instructions, or does not let us trace."""
    if not set(Path("/proc/cpuinfo").read_text().split()) >= _NEEDED:
        pytest.skip("the host's processor lacks SSE4.2 or PCLMULQDQ")
    try:
        made = Twin()
    except HostError as why:
        pytest.skip(str(why))
    yield made
    made.close()


def _encodings(opcode: str) -> Iterator[tuple[bytes, bool, bool]]:
    """Each form with each prefix: the bytes, whether MMX registers may be in it, whether memory is."""
    immediates = (0x00, 0x5B, 0xE6) if opcode in _IMMEDIATE or opcode.startswith("0f3a") else (None,)
    for prefix in ("", "66", "f3", "f2"):
        for name, (rex, modrm) in FORMS.items():
            fields = range(2, 8) if opcode in _SHIFT_GROUPS else (0,)
            for field in fields:
                for immediate in immediates:
                    tail = bytes([modrm | field << 3 if len(fields) > 1 else modrm])
                    tail += b"" if immediate is None else bytes([immediate])
                    mmx = not prefix or opcode in {"0f2a", "0f2c", "0f2d", "0fd6"}
                    yield bytes.fromhex(prefix + rex + opcode) + tail, mmx, name == "memory"


@pytest.mark.parametrize("opcode", OPCODES)
def test_instruction_leaves_what_the_host_leaves(twin: Twin, opcode: str) -> None:
    for number, (code, mmx, memory) in enumerate(_encodings(opcode)):
        offsets = (0, 16, 8, 5) if memory else (0,)
        for case in vector_cases(code, number, CASES, mmx=mmx, offsets=offsets):
            assert twin.difference(case) == "", code.hex(" ")
