"""Machine code as text, for messages (capstone)."""

from __future__ import annotations

import capstone

_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}


def disassemble_one(code: bytes, bits: int, address: int = 0) -> str:
    """The first instruction of ``code`` in Intel syntax, or "" where the bytes are none.

    ``bits`` is the code size: 16, 32 or 64.
    """
    for _, _, mnemonic, operands in capstone.Cs(capstone.CS_ARCH_X86, _MODES[bits]).disasm_lite(
        code, address, 1
    ):
        return f"{mnemonic} {operands}".rstrip()
    return ""
